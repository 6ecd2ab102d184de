"""`longhaul data check` finds what was really spoilt and names it; `longhaul data show` shows what the network sees."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from configs import load_recipe
from data_pipeline.augment import augment
from data_pipeline.check import check_data
from data_pipeline.ingest import prepare
from data_pipeline.loader import training_batches
from data_pipeline.order import Order
from data_pipeline.shards import SCHEMA, Manifest, map_batch, write_batch
from data_pipeline.show import show_samples
from data_pipeline.sources import open_source
from launch.cli import app


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images in two classes, four of them held out, in several shards."""
    root = tmp_path_factory.mktemp("check")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for label in ("cat", "dog"):
            for i in range(count):
                path = root / "tree" / split / label / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (30 + i, 40, 3), np.uint8)).save(path, quality=90)
    prepare(open_source(str(root / "tree"), 0.0), root / "data", shard_bytes=6_000)
    return root / "data"


@pytest.fixture
def data(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "data"))


def wrong(data: Path, decode: float = 1.0) -> dict[str, str]:
    """What does not hold, and the figures."""
    return {finding.what: finding.figures for finding in check_data(data, decode, 1) if not finding.holds}


def flip(path: Path, position: int) -> None:
    whole = bytearray(path.read_bytes())
    whole[position] ^= 1
    path.write_bytes(whole)


def rewrite(data: Path, file: str, **columns: pa.Array) -> None:
    """Write a shard or an index anew with other columns, and its new checksum into the manifest: as if it had been
    written wrongly in the first place."""
    manifest = json.loads((data / "manifest.json").read_text())
    entries = [e for entries in manifest["splits"].values() for e in entries] + list(manifest["indexes"].values())
    (entry,) = (e for e in entries if e["file"] == file)
    old = pa.ipc.open_file(data / file).get_batch(0)
    new = [columns.get(name, old.column(name)) for name in old.schema.names]
    entry |= write_batch(data / file, pa.record_batch(new, schema=old.schema)).__dict__
    (data / "manifest.json").write_text(json.dumps(manifest))


def test_a_sound_data_set_passes_and_says_what_was_checked(sound: Path) -> None:
    findings = {finding.what: finding for finding in check_data(sound, 1.0, 2)}
    assert all(finding.holds for finding in findings.values())
    assert findings["train: images decode to the size in the index"].figures == "8 of 8 images"
    assert findings["train: every class has images"].figures == "4 to 4 images a class (median 4)"
    assert findings["images that occur more than once"].figures == "0 in train, 0 in val, 0 in both train and val"


def test_a_share_of_the_images_may_be_decoded(sound: Path) -> None:
    figures = {finding.what: finding.figures for finding in check_data(sound, 0.5, 1)}
    assert figures["train: images decode to the size in the index"] == "4 of 8 images"
    assert not any("decode" in what for what in (finding.what for finding in check_data(sound, 0.0, 1)))


def test_a_flipped_bit_in_an_image_is_named_with_shard_row_and_key(data: Path) -> None:
    file = data / Manifest.read(data).splits["train"][1].file
    image = map_batch(file, SCHEMA, Manifest.read(data).splits["train"][1].rows)
    key = image.column("key")[0].as_py()
    flip(file, file.read_bytes().index(image.column("image")[0].as_py()) + 500)
    found = wrong(data)
    assert found["every file has its size and SHA-256"] == f"{file.name} does not have the bytes that were written"
    assert f"{file.name}, row 0 ({key})" in found["train: every image has the bytes that were written"]


def test_a_missing_or_shortened_file_is_named(data: Path) -> None:
    first, second = (data / shard.file for shard in Manifest.read(data).splits["train"][:2])
    size = second.stat().st_size
    first.unlink()
    second.write_bytes(second.read_bytes()[:-8])
    found = wrong(data)
    assert f"{first.name} cannot be read (No such file" in found["every file has its size and SHA-256"]
    assert f"{second.name} has {size - 8:,} bytes instead of {size:,}" in found["every file has its size and SHA-256"]
    assert first.name in found["train: index and shards can be read"]
    assert "val: index and shards can be read" not in found


def test_an_index_that_says_something_else_than_a_shard_is_found(data: Path) -> None:
    labels = pa.array([0, 0, 0, 1, 1, 1, 1, 7], pa.int32())
    rewrite(data, "train.index.arrow", label=labels)
    found = wrong(data)["train: the index says what the shards say"]
    assert "label 7" in found and "row" in found and len(found.split(";")) >= 2


def test_an_image_of_another_size_than_the_index_says_is_found(data: Path) -> None:
    shard = Manifest.read(data).splits["val"][0]
    batch = pa.ipc.open_file(data / shard.file).get_batch(0)
    heights = batch.column("height").to_pylist()
    rewrite(data, shard.file, height=pa.array([heights[0] + 1, *heights[1:]], pa.int32()))
    index = pa.ipc.open_file(data / "val.index.arrow").get_batch(0).column("height").to_pylist()
    rewrite(data, "val.index.arrow", height=pa.array([index[0] + 1, *index[1:]], pa.int32()))
    (told,) = wrong(data).values()
    assert f"row 0 (val/cat/0.jpg) is 40x{heights[0]}, the index says 40x{heights[0] + 1}" in told


def test_a_class_without_training_images_and_repetitions_are_found(data: Path) -> None:
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["classes"].append("unicorn")
    manifest["splits"]["val"] = manifest["splits"]["train"]
    manifest["indexes"]["val"] = manifest["indexes"]["train"]
    (data / "manifest.json").write_text(json.dumps(manifest))
    assert wrong(data) == {"train: every class has images": "class unicorn has no image"}
    figures = {finding.what: finding.figures for finding in check_data(data, 0.0, 1)}
    assert figures["images that occur more than once"] == "0 in train, 0 in val, 8 in both train and val"


def test_the_command_exits_with_1_where_something_does_not_hold(data: Path) -> None:
    assert CliRunner().invoke(app, ["data", "check", str(data)]).exit_code == 0
    flip(data / "val-00000.arrow", 600)
    result = CliRunner().invoke(app, ["data", "check", str(data)])
    assert result.exit_code == 1 and "NO" in result.output and "val-00000.arrow" in result.output


def test_the_picture_shows_what_the_network_sees(sound: Path, tmp_path: Path) -> None:
    recipe = load_recipe("resnet50", ["input.size=128", "input.eval_resize=128", "batch={size: 2, micro: 2}", "seed=5"])
    out = tmp_path / "samples.png"
    show_samples(sound, recipe, out, num_samples=3, num_epochs=2)
    picture = np.asarray(Image.open(out))
    assert picture.shape == (3 * (128 + 16 + 6) + 6, 3 * (128 + 6) + 6, 3)
    from data_pipeline.split import Split

    split = Split(sound, "train")
    order = Order(5, len(split), len(split), len(split))
    sample = int(order.at(np.arange(3))[1][1])  # the second row
    for epoch in range(2):
        (batch,) = training_batches(split, recipe.input, order, [(epoch, 0)], torch.device("cpu"), 1)
        place = batch.records[:, 1].tolist().index(sample)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (recipe.input.mean, recipe.input.std))
        seen = ((batch.images[place] * std + mean) * 255).round().permute(1, 2, 0).numpy()
        top, left = 6 + 150, 6 + (1 + epoch) * 134
        shown = picture[top : top + 128, left : left + 128]
        assert np.array_equal(shown[2:-2, 2:-2], seen[2:-2, 2:-2])
        ids = np.array([sample])
        box = augment(recipe.input, 5, np.array([epoch]), ids, split.sizes[ids]).boxes[0]
        assert batch.records[place, 2:6].tolist() == box.tolist()


def test_a_picture_of_an_unknown_format_is_refused(sound: Path) -> None:
    result = CliRunner().invoke(app, ["data", "show", str(sound), "--recipe", "resnet50", "--out", "x.xyz"])
    assert "name a .png or .jpg file" in str(result.exception)
