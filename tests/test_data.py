"""From images to batches: what `prepare` writes is whole and the same every time, and the loader's pixels are exact.

Pixels against PIL and torchvision: DALI resizes like PIL (triangle filter, antialiased) and rounds in other places.
Measured on CPU, mean absolute difference of the 8-bit values of a sample, the largest over the samples: training crops
0.20 on synthetic images and 0.20 on 32 ImageNet photographs, evaluation 0.18 and 0.19. The bound is twice that; a crop
that is one pixel off differs by 2 to 9. The bound on GPUs is wider, for their decoders interpolate chroma otherwise; no
GPU has been measured.
"""

import hashlib
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as vision

from configs import LonghaulError
from configs.schema import Crop, Input, PadCrop, ResizedCrop, ScaleCrop
from data_pipeline.augment import augment
from data_pipeline.ingest import prepare
from data_pipeline.loader import Batch, evaluation_batches, training_batches
from data_pipeline.order import Order
from data_pipeline.shards import Manifest
from data_pipeline.sources import open_source
from data_pipeline.split import Split
from trainer.dealing import Work, deal

PHOTOGRAPHS = Path(__file__).parent.parent.parent / "shared" / "data" / "imagenet-500.tar"

# --- making sources ----------------------------------------------------------------------------------------------


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth image with some detail, like a photograph: waves whose strength falls with their frequency."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 100.0
    image = np.zeros((height, width, 3))
    for frequency in (0.5, 1, 2, 4, 8, 16, 32):
        for channel in range(3):
            angle, phase = rng.uniform(0, 2 * np.pi, 2)
            wave = np.sin(2 * np.pi * frequency * (x * np.cos(angle) + y * np.sin(angle)) + phase)
            image[:, :, channel] += wave / frequency**0.75
    image -= image.min()
    return np.rint(image * (255 / image.max())).astype(np.uint8)


def encode(image: np.ndarray, kind: str = "JPEG", mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def decode(jpeg: bytes | np.ndarray) -> np.ndarray:
    with Image.open(io.BytesIO(bytes(jpeg))) as image:
        return np.asarray(image.convert("RGB"))


Files = dict[str, bytes]


def small_tree(per_class: int = 5, splits: Sequence[str] = ("train", "val"), size: tuple[int, int] = (20, 24)) -> Files:
    """JPEGs under split/class/name, every one different."""
    files = {}
    for split in splits:
        for label in ("cat", "dog"):
            for i in range(per_class):
                files[f"{split}/{label}/{i}.jpg"] = encode(photo(*size, seed=len(files)), quality=90)
    return files


def write_tree(root: Path, files: Files) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_zip(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, files: Files, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def ingest(source: Path | str, out: Path, holdout: float = 0.0, **options: int) -> Manifest:
    return prepare(open_source(str(source), holdout), out, shuffle=False, **options)


def prepared(tmp_path: Path, files: Files, **options: int) -> Path:
    """A data set made from `files`."""
    out = tmp_path / "out"
    ingest(write_tree(tmp_path / "source", files), out, **options)
    return out


def keys(directory: Path, split: str) -> list[str]:
    opened = Split(directory, split)
    return [opened.key(i) for i in range(len(opened))]


def everything(split: Split) -> np.ndarray:
    return np.arange(len(split), dtype=np.int64)


# --- prepare -----------------------------------------------------------------------------------------------------


def test_a_tree_in_a_directory_a_zip_or_a_tar_gives_the_same_data_set(tmp_path: Path) -> None:
    files = small_tree()
    backwards = dict(reversed(files.items()))
    (tmp_path / "in").mkdir()
    sources = [
        write_tree(tmp_path / "in" / "tree", files),
        write_zip(tmp_path / "in" / "tree.zip", backwards),
        write_tar(tmp_path / "in" / "tree.tar", backwards),
        write_tar(tmp_path / "in" / "tree.tgz", files, "w:gz"),
        write_tar(tmp_path / "in" / "other.tar", {f"./wrapper/inner/{name}": data for name, data in files.items()}),
    ]
    manifests = [ingest(source, tmp_path / f"out{i}", shard_bytes=4_000) for i, source in enumerate(sources)]
    assert len(manifests[0].splits["train"]) > 1  # several shards, each with its SHA-256 in the manifest
    assert [m.name for m in manifests] == ["tree", "tree", "tree", "tree", "other"]
    for manifest in manifests:
        assert replace(manifest, name="", source="") == replace(manifests[0], name="", source="")
    for split in ("train", "val"):
        for name in (shard.file for shard in manifests[0].splits[split]):
            assert len({(tmp_path / f"out{i}" / name).read_bytes() for i in range(len(sources))}) == 1


def test_the_manifest_read_back_is_the_manifest_returned_and_its_checksums_hold(tmp_path: Path) -> None:
    manifest = ingest(write_tree(tmp_path / "source", small_tree()), tmp_path / "out", shard_bytes=4_000)
    assert Manifest.read(tmp_path / "out") == manifest
    for shards in manifest.splits.values():
        for shard in shards:
            data = (tmp_path / "out" / shard.file).read_bytes()
            assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    files = {shard.file for shards in manifest.splits.values() for shard in shards} | {"manifest.json"}
    files |= {index.file for index in manifest.indexes.values()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}  # nothing unfinished is left


def test_the_digits_are_prepared_the_same_twice_and_are_scikit_learns(tmp_path: Path) -> None:
    first, second = (ingest("digits", tmp_path / name) for name in ("a", "b"))
    assert first == second
    assert first.classes == [str(digit) for digit in range(10)]
    assert first.num_samples("train") + first.num_samples("val") == 1_797
    share = first.num_samples("val") / 1_797
    assert 0.18 < share < 0.21
    from sklearn.datasets import load_digits

    digits = load_digits()
    for name in ("train", "val"):
        split = Split(tmp_path / "a", name)
        for sample in range(0, len(split), 25):
            index = int(Path(split.key(sample)).stem)
            assert split.labels[sample] == digits.target[index]
            shown = decode(split.images(np.array([sample]))[0])[:, :, 0].astype(int)
            assert np.abs(shown - digits.images[index] * 255 / 16).max() <= 3


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        (("train", "val"), "val"),
        (("Train", "TEST"), "TEST"),
        (("training", "validation"), "validation"),
        (("train", "val", "test"), "val"),  # not both: the test images are no more to be looked at
    ],
)
def test_folders_named_as_splits_become_splits(tmp_path: Path, folders: tuple[str, ...], found: str) -> None:
    out = prepared(tmp_path, small_tree(3, folders))
    assert keys(out, "train") == [f"{folders[0]}/{label}/{i}.jpg" for label in ("cat", "dog") for i in range(3)]
    assert keys(out, "val") == [f"{found}/{label}/{i}.jpg" for label in ("cat", "dog") for i in range(3)]
    assert Manifest.read(out).classes == ["cat", "dog"]
    assert Split(out, "val").labels.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("splits", [("",), ("train",)])
@pytest.mark.parametrize(("share", "held"), [(0.0, 0), (0.2, 2), (0.25, 2), (0.5, 5)])
def test_a_share_of_every_class_is_held_out_where_there_is_no_split(
    tmp_path: Path, splits: tuple[str, ...], share: float, held: int
) -> None:
    files = {name.lstrip("/"): data for name, data in small_tree(10, splits).items()}
    manifest = ingest(write_tree(tmp_path / "source", files), tmp_path / "out", share)
    assert manifest.num_samples("train") == 2 * (10 - held) and manifest.num_samples("val") == 2 * held
    if held:
        assert np.bincount(Split(tmp_path / "out", "val").labels).tolist() == [held, held]
        assert not set(keys(tmp_path / "out", "val")) & set(keys(tmp_path / "out", "train"))


def test_a_held_out_share_is_not_used_where_the_source_has_its_own(tmp_path: Path) -> None:
    manifest = ingest(write_tree(tmp_path / "source", small_tree(4)), tmp_path / "out", 0.5)
    assert manifest.num_samples("train") == 8


def test_a_class_is_the_topmost_folder_whatever_lies_below_it(tmp_path: Path) -> None:
    image = encode(photo(8, 8))
    files = {f"{split}/{label}/images/{i}.jpg": image for split in ("train", "val") for label in "ab" for i in range(2)}
    assert Manifest.read(prepared(tmp_path, files)).classes == ["a", "b"]
    plain = {"a/2020/x.jpg": image, "a/2021/x.jpg": image, "b/2020/x.jpg": image, "b/y.jpg": image}
    assert Manifest.read(prepared(tmp_path / "plain", plain)).classes == ["a", "b"]


def test_what_macos_hides_in_a_zip_and_stray_files_are_passed_over(tmp_path: Path) -> None:
    files = {f"set/{name}": data for name, data in small_tree(3).items()}
    stray = {f"__MACOSX/{name.replace('cat/', 'cat/._')}": b"\0\5\x16\7" for name in files}
    stray |= {"set/train/cat/._0.jpg": b"\0", "set/.hidden/x/0.jpg": b"\0", "set/train/cat/notes.txt": b"hello"}
    stray |= {"set/overview.png": files["set/train/cat/0.jpg"]}
    manifest = ingest(write_zip(tmp_path / "set.zip", stray | files), tmp_path / "out")
    assert (manifest.num_samples("train"), manifest.num_samples("val"), manifest.quarantined) == (6, 6, [])


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    write_tree(tmp_path / "all", small_tree(2))
    (tmp_path / "subset" / "train").mkdir(parents=True)
    for label in ("cat", "dog"):
        (tmp_path / "subset" / "train" / label).symlink_to(tmp_path / "all" / "train" / label)
    assert ingest(tmp_path / "subset", tmp_path / "out").num_samples("train") == 4


def test_cmyk_and_a_png_under_a_jpegs_name_are_repaired_and_the_rest_is_kept_byte_for_byte(tmp_path: Path) -> None:
    image, size = photo(40, 50), (40, 50)
    files = {
        "train/a/cmyk.JPEG": encode(image, mode="CMYK", quality=95),
        "train/a/png.JPEG": encode(image, "PNG"),
        "train/a/palette.png": encode(image, "PNG", mode="P"),
        "train/b/alpha.webp": encode(image, "WEBP", mode="RGBA", lossless=True),
        "train/b/grey.jpg": encode(image, mode="L", quality=95),
        "train/b/plain.jpg": encode(image, quality=80),
    }
    out = prepared(tmp_path, files)
    split = Split(out, "train")
    assert split.manifest.quarantined == []
    for sample, jpeg in enumerate(split.images(everything(split))):
        key = split.key(sample)
        with Image.open(io.BytesIO(bytes(jpeg))) as opened:
            assert (opened.format, opened.mode) == ("JPEG", "L" if "grey" in key else "RGB"), key
        if "grey" in key or "plain" in key:
            assert bytes(jpeg) == files[key]
        else:
            # Against the image as it was drawn; what is left is JPEG's own loss at quality 95, and dithering.
            assert np.abs(decode(jpeg).astype(int) - image).mean() < (20 if "palette" in key else 3), key
        assert tuple(split.sizes[sample]) == size
    # And they can be loaded.
    config = Input(size=16, mean=(0, 0, 0), std=(1, 1, 1), crop=ResizedCrop(), eval_resize=16)
    assert sum(len(b.labels) for b in evaluation_batches(split, config, [everything(split)], CPU, 1)) == 6


def broken_files() -> Files:
    jpeg = encode(photo(60, 60))
    sixteen_bits = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 999).save(sixteen_bits, "PNG")
    return {
        "train/cat/cut.jpg": jpeg[: len(jpeg) // 2],
        "train/cat/empty.jpg": b"",
        "train/dog/garbage.jpg": bytes(range(256)) * 4,
        "train/dog/text.png": b"<html>404 not found</html>",
        "train/dog/deep.png": sixteen_bits.getvalue(),
        "val/dog/cut.png": encode(photo(60, 60), "PNG")[:200],
    }


def test_images_that_cannot_be_decoded_are_named_with_the_reason_and_the_rest_is_kept(tmp_path: Path) -> None:
    good = small_tree(3)
    out = prepared(tmp_path, {**good, **broken_files()})
    manifest = Manifest.read(out)
    assert {entry["key"] for entry in manifest.quarantined} == set(broken_files())
    assert all(entry["reason"] for entry in manifest.quarantined)
    assert set(keys(out, "train")) | set(keys(out, "val")) == set(good)


def test_what_an_archive_cannot_give_back_is_named_and_the_rest_is_kept(tmp_path: Path) -> None:
    files = small_tree(3)
    path = write_zip(tmp_path / "tree.zip", files)
    data = bytearray(path.read_bytes())
    victim = files["train/dog/1.jpg"]
    data[data.index(victim) + len(victim) // 2] ^= 0xFF  # its CRC-32 in the zip no longer fits
    path.write_bytes(data)
    manifest = ingest(path, tmp_path / "out")
    assert [entry["key"] for entry in manifest.quarantined] == ["train/dog/1.jpg"]
    assert manifest.num_samples("train") == 5


def test_a_file_that_cannot_be_read_gives_its_error_and_the_next_ones_their_bytes(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree", small_tree(3))
    source = open_source(str(root), 0.0)
    items = source.listing().items
    (root / "train/cat/1.jpg").unlink()  # gone since it was listed; root may read anything, so chmod would not do
    read = list(source.read(items))
    assert [item.key for item, data in zip(items, read, strict=True) if isinstance(data, OSError)] == [
        "train/cat/1.jpg"
    ]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda p: write_tree(p / "x", {"train/a/1.jpg": b"no", "train/b/2.jpg": b"no"}), "No image of 'x'"),
        (lambda p: write_tree(p / "x", {"1.jpg": encode(photo(8, 8))}), "needs a folder for each class"),
        (lambda p: write_tree(p / "x", {"a/readme.txt": b"hello"}), "needs a folder for each class"),
        (lambda p: write_tree(p / "x.jpg", {"nothing": b""}) / "nothing", "neither a directory nor a zip or tar"),
        (lambda p: p / "nowhere", "There is no"),
    ],
)
def test_a_source_without_images_is_refused_and_leaves_nothing(tmp_path: Path, make, told: str) -> None:  # type: ignore[no-untyped-def]
    source = make(tmp_path)
    with pytest.raises(LonghaulError, match=told):
        ingest(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tar_that_was_cut_short_is_refused_by_name(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "tree.tar", small_tree(3))
    whole = path.read_bytes()
    for length in [512 * 6, *range(4_001, 8_000, 250)]:  # in a header, in an image, between the two
        path.write_bytes(whole[:length])
        with pytest.raises(LonghaulError, match=r"tree\.tar is not whole"):
            open_source(str(path), 0.0).listing()
    damaged = bytearray(whole)
    damaged[whole.index(b"train/dog/0.jpg") + 150] ^= 0xFF  # the checksum of its header
    path.write_bytes(damaged)
    with pytest.raises(LonghaulError, match=r"tree\.tar is not whole"):
        open_source(str(path), 0.0).listing()


def test_an_existing_out_is_refused_and_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("keep")
    with pytest.raises(LonghaulError, match="exists already"):
        ingest("digits", out)
    assert (out / "precious").read_text() == "keep"


def test_the_statistics_of_the_manifest_are_numpys_over_the_training_pixels(tmp_path: Path) -> None:
    files = small_tree(4)
    files["train/cat/large.jpg"] = encode(photo(64, 48, seed=99))  # images count by their pixels
    manifest = Manifest.read(prepared(tmp_path, files))
    train = [decode(data).reshape(-1, 3) for name, data in files.items() if name.startswith("train")]
    pixels = np.concatenate(train) / 255.0
    np.testing.assert_allclose(manifest.mean, pixels.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(manifest.std, pixels.std(axis=0), atol=1e-6)


# --- shards ------------------------------------------------------------------------------------------------------


def test_every_sample_is_read_back_by_id_across_the_borders_of_shards(tmp_path: Path) -> None:
    files = small_tree(12)
    out = prepared(tmp_path, files, shard_bytes=4_000)
    split = Split(out, "train")
    rows = [shard.rows for shard in split.manifest.splits["train"]]
    assert len(rows) > 3 and sum(rows) == len(split) == 24
    names = sorted(name for name in files if name.startswith("train"))
    assert keys(out, "train") == sorted(names, key=lambda name: tuple(name.split("/")))
    backwards = everything(split)[::-1]
    for sample, jpeg in zip(backwards, split.images(backwards), strict=True):
        assert bytes(jpeg) == files[split.key(sample)]
        assert not jpeg.flags.owndata  # a view of the mapped file
        assert split.labels[sample] == ("dog" in split.key(sample))
        assert tuple(split.sizes[sample]) == decode(jpeg).shape[:2]
    assert split.damaged(backwards, split.images(backwards)) == []


def spoil_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def spoil_empty(path: Path) -> None:
    path.write_bytes(b"")


def spoil_magic(path: Path) -> None:
    flip(path, -1)  # Arrow's magic, at the end; it does not look at the one at the beginning


def spoil_type(path: Path) -> None:
    """A type of the schema in the footer that Arrow does not know."""
    for position in range(path.stat().st_size - 10, 0, -1):
        before = path.read_bytes()
        flip(path, position)
        try:
            Split(path.parent, "train")
        except LonghaulError:
            return
        path.write_bytes(before)


def spoil_offsets(path: Path) -> None:
    """Where an image begins in the buffer: beyond its end."""
    lengths = [len(jpeg) for jpeg in pa.ipc.open_file(path).get_batch(0).column(0).to_pylist()]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32).tobytes()
    flip(path, path.read_bytes().index(offsets) + 4 + 2)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("spoil", [spoil_cut, spoil_empty, spoil_magic, spoil_type, spoil_offsets, Path.unlink])
def test_a_shard_that_cannot_be_read_is_named(tmp_path: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    out = prepared(tmp_path, small_tree(12), shard_bytes=4_000)
    spoil(out / "train-00002.arrow")
    with pytest.raises(LonghaulError, match=r"The shard .*train-00002\.arrow cannot be read \(.+\): prepare"):
        Split(out, "train")


def test_whatever_byte_of_a_shard_flips_opening_it_succeeds_or_names_it(tmp_path: Path) -> None:
    out = prepared(tmp_path, small_tree(2))
    path = out / "train-00000.arrow"
    whole = path.read_bytes()
    told = 0
    ends = len(whole) - 1500, len(whole)  # metadata stands at both ends; in between are the images
    for position in [*range(0, 700, 3), *range(*ends, 3)]:
        flip(path, position)
        try:
            Split(out, "train")
        except LonghaulError as error:
            told += "train-00000.arrow" in str(error)
        path.write_bytes(whole)
    assert told > 20


def test_a_shard_of_another_data_set_is_named(tmp_path: Path) -> None:
    out = prepared(tmp_path, small_tree(12), shard_bytes=4_000)
    other = prepared(tmp_path / "other", small_tree(1))
    shutil.copy(other / "train-00000.arrow", out / "train-00001.arrow")
    with pytest.raises(LonghaulError, match=r"train-00001\.arrow cannot be read \(it does not hold the rows"):
        Split(out, "train")


def test_an_image_whose_bytes_changed_is_named_when_it_cannot_be_decoded(tmp_path: Path) -> None:
    files = small_tree(4)
    out = prepared(tmp_path, files)
    path = out / "train-00000.arrow"
    data = bytearray(path.read_bytes())
    data[data.index(files["train/dog/2.jpg"])] ^= 0xFF  # JPEG's first byte
    path.write_bytes(data)
    split = Split(out, "train")
    with pytest.raises(LonghaulError, match=r"train-00000\.arrow, row 6 \(train/dog/2\.jpg\) does not have the bytes"):
        for _ in evaluation_batches(split, EVALUATION, [everything(split)], CPU, 1):
            pass
    order = Order(0, 8, 4, 4)
    with pytest.raises(LonghaulError, match=r"train/dog/2\.jpg"):
        for _ in training_batches(split, EVALUATION, order, Work(0, 2, range(1)), CPU, 1):
            pass


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is not a manifest"),
        ("[]", "is not a manifest"),
        ("3", "is not a manifest"),
        ("{}", "is not a manifest"),
        ('{"format": 2}', "is not a manifest"),
        ('{"format": 2, "splits": {"train": [{"file": "x"}]}}', "is not a manifest"),
        ('{"format": 1, "shards": []}', "has format 1, this version reads 2"),
    ],
)
def test_a_manifest_that_is_none_is_named(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(LonghaulError, match=r"manifest\.json.*" + told):
        Split(tmp_path, "train")


def test_a_manifest_that_promises_other_rows_is_found_out(tmp_path: Path) -> None:
    out = prepared(tmp_path, small_tree(4))
    values = json.loads((out / "manifest.json").read_text())
    values["splits"]["train"][0]["rows"] = 7
    (out / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(LonghaulError, match=r"train-00000\.arrow.*does not hold the rows"):
        Split(out, "train")


def test_a_missing_directory_manifest_or_split_is_told_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(LonghaulError, match=r"There is no data set at .*nowhere: make one with `longhaul prepare"):
        Split(tmp_path / "nowhere", "train")
    with pytest.raises(LonghaulError, match=r"has no manifest\.json"):
        Split(tmp_path, "train")
    out = prepared(tmp_path, small_tree(2, ("train",)))
    with pytest.raises(LonghaulError, match="has no split 'val'; it has train"):
        Split(out, "val")


# --- the loader --------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EVALUATION = Input(size=32, mean=MEAN, std=STD, crop=ResizedCrop(), eval_resize=36)


def input_for(crop: Crop, size: int = 32, pca_colour: float = 0.0) -> Input:
    resize = None if isinstance(crop, PadCrop) else size + 4
    return Input(size=size, mean=MEAN, std=STD, crop=crop, pca_colour=pca_colour, eval_resize=resize)


def as_bytes(images: torch.Tensor) -> np.ndarray:
    """Undo the normalisation: float64 [n, height, width, 3] in [0, 255]."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    return ((images.cpu().double() * std + mean) * 255).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """24 images of many sizes in several shards."""
    files = {}
    for i in range(24):
        label = "ab"[i % 2]
        files[f"train/{label}/{i:02d}.jpg"] = encode(photo(40 + 7 * (i % 5), 44 + 9 * (i % 4), seed=i), quality=92)
    return Split(prepared(tmp_path_factory.mktemp("mixed"), files, shard_bytes=10_000), "train")


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """24 images of 32 x 32."""
    files = {f"train/{'ab'[i % 2]}/{i:02d}.jpg": encode(photo(32, 32, seed=i), quality=92) for i in range(24)}
    return Split(prepared(tmp_path_factory.mktemp("square"), files, shard_bytes=10_000), "train")


def split_for(crop: Crop, mixed: Split, square: Split) -> Split:
    return square if isinstance(crop, PadCrop) else mixed


def samples(batches: Iterator[Batch]) -> dict[tuple[int, int], tuple[np.ndarray, int, list[int]]]:
    """(epoch, sample id) -> (pixels, label, record)."""
    found = {}
    for batch in batches:
        images, labels = batch.images.cpu().numpy(), batch.labels.cpu().tolist()
        for image, label, record in zip(images, labels, batch.records.tolist(), strict=True):
            assert (record[0], record[1]) not in found
            found[record[0], record[1]] = (image, label, record)
    return found


CROPS: list[Crop] = [ResizedCrop(), ScaleCrop(shorter=(36, 60)), PadCrop(padding=4)]


@pytest.mark.parametrize("crop", CROPS)
def test_a_samples_pixels_are_the_same_whatever_the_batch_the_threads_and_the_worker(
    mixed: Split, square: Split, crop: Crop, device: torch.device
) -> None:
    split, config = split_for(crop, mixed, square), input_for(crop, pca_colour=0.1)

    def read(batch: int, micro: int, threads: int, world_size: int = 1) -> dict:
        order = Order(7, len(split), batch, micro)
        found: dict = {}
        for rank in range(world_size):
            work = Work(0, 48 // batch, deal(batch // micro, world_size, rank))
            found |= samples(training_batches(split, config, order, work, device, threads))
        return found

    reference = read(batch=24, micro=8, threads=1)
    assert len(reference) == 48
    for other in (read(24, 8, 2), read(24, 24, 1), read(16, 2, 2), read(24, 4, 1, world_size=4), read(6, 1, 2, 3)):
        assert other.keys() == reference.keys()
        for key, (image, label, record) in other.items():
            assert np.array_equal(image, reference[key][0]) and (label, record) == reference[key][1:]


@pytest.mark.parametrize("crop", CROPS)
def test_work_may_be_done_in_any_order_and_from_any_step(mixed: Split, square: Split, crop: Crop) -> None:
    split, config = split_for(crop, mixed, square), input_for(crop)
    order = Order(3, len(split), 8, 4)
    straight = [(step, micro) for step in range(3) for micro in range(2)]
    reference = samples(training_batches(split, config, order, straight, CPU, 1))
    backwards = samples(training_batches(split, config, order, straight[::-1], CPU, 1))
    assert all(np.array_equal(backwards[key][0], reference[key][0]) for key in reference)
    # A run that resumes at step 2 goes on with the very pixels.
    resumed = samples(training_batches(split, config, order, Work(2, 3, range(2)), CPU, 1))
    assert len(resumed) == 8
    assert all(np.array_equal(resumed[key][0], reference[key][0]) for key in resumed)


@pytest.mark.parametrize("crop", CROPS)
def test_the_records_beside_the_pixels_are_what_order_and_augment_say(mixed: Split, square: Split, crop: Crop) -> None:
    split, config = split_for(crop, mixed, square), input_for(crop)
    order = Order(5, len(split), 10, 5)
    work = Work(0, 7, range(2))
    batches = list(training_batches(split, config, order, work, CPU, 2))
    assert len(batches) == len(work)
    for place, batch in zip(work, batches, strict=True):
        epochs, ids = order.micro_batch(*place)
        drawn = augment(config, order.seed, epochs, ids, split.sizes[ids])
        assert batch.records.dtype == np.int64
        assert np.array_equal(batch.records, np.column_stack([epochs, ids, drawn.boxes, drawn.flips, ids]))
        assert batch.labels.tolist() == split.labels[ids].tolist() and batch.labels.dtype == torch.int64


def test_batches_are_normalised_float32_with_channels_last_strides(square: Split, device: torch.device) -> None:
    config = input_for(PadCrop(padding=0)).model_copy(update={"flip": False})
    (batch,) = training_batches(square, config, Order(0, 24, 6, 6), [(0, 0)], device, 1)
    assert batch.images.shape == (6, 3, 32, 32) and batch.images.dtype == torch.float32
    assert batch.images.device.type == batch.labels.device.type == device.type
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    pixels = np.stack([decode(jpeg) for jpeg in square.images(batch.records[:, 1])]) / 255.0
    expected = ((pixels - MEAN) / STD).transpose(0, 3, 1, 2)
    # On the CPU PIL and DALI decode with the same library; a GPU's decoder may round otherwise.
    atol = 1e-5 if device.type == "cpu" else 0.05
    np.testing.assert_allclose(batch.images.cpu().numpy(), expected, atol=atol)


def pad_crop_reference(image: np.ndarray, record: list[int]) -> np.ndarray:
    """The paper's CIFAR crop, in numpy: pad with the mean colour, cut out, mirror."""
    _, _, y, x, height, width, flip, _ = record
    pad = 8
    colour = np.rint(255 * np.array(MEAN)).astype(np.uint8)
    padded = np.broadcast_to(colour, (image.shape[0] + 2 * pad, image.shape[1] + 2 * pad, 3)).copy()
    padded[pad:-pad, pad:-pad] = image
    cut = padded[y + pad : y + pad + height, x + pad : x + pad + width]
    return cut[:, ::-1] if flip else cut


def test_a_pad_crop_is_numpys_to_the_bit(square: Split) -> None:
    config = input_for(PadCrop(padding=4))
    found = samples(training_batches(square, config, Order(1, 24, 24, 12), Work(0, 8, range(2)), CPU, 1))
    assert len(found) == 8 * 24
    for (_, sample), (image, _, record) in found.items():
        reference = pad_crop_reference(decode(square.images(np.array([sample]))[0]), record)
        shown = as_bytes(torch.from_numpy(image)[None])[0]
        np.testing.assert_allclose(shown, reference, atol=1e-3)
    # The draw covered what matters: mirrored or not, and padding on each side.
    records = np.array([record for _, _, record in found.values()])
    assert set(records[:, 6]) == {0, 1} and records[:, 2:4].min() == -4 and records[:, 2:4].max() == 4


def test_the_colour_shift_is_added_before_normalising(square: Split) -> None:
    order, work = Order(1, 24, 24, 24), [(0, 0)]
    plain, coloured = (
        samples(training_batches(square, input_for(PadCrop(), pca_colour=sigma), order, work, CPU, 1))
        for sigma in (0.0, 0.1)
    )
    for (epoch, sample), (image, _, _) in coloured.items():
        ids = np.array([sample])
        config = input_for(PadCrop(), pca_colour=0.1)
        shift = augment(config, order.seed, np.array([epoch]), ids, square.sizes[ids]).shifts[0]
        assert np.abs(shift).max() > 0
        expected = plain[epoch, sample][0] + (shift / np.array(STD))[:, None, None]
        np.testing.assert_allclose(image, expected, atol=1e-5)


def test_a_short_last_evaluation_batch_holds_just_its_samples(mixed: Split, device: torch.device) -> None:
    ids = everything(mixed)
    whole = torch.cat([b.images for b in evaluation_batches(mixed, EVALUATION, [ids], device, 1)])
    for size in (1, 5, 7, 16, 100):
        chunks = [ids[i : i + size] for i in range(0, len(ids), size)]
        batches = list(evaluation_batches(mixed, EVALUATION, chunks, device, 2))
        assert [b.records[:, 0].tolist() for b in batches] == [chunk.tolist() for chunk in chunks]
        assert torch.equal(torch.cat([b.images for b in batches]), whole)
        assert torch.cat([b.labels for b in batches]).tolist() == mixed.labels.tolist()


def test_no_evaluation_batches_are_no_batches(mixed: Split) -> None:
    assert list(evaluation_batches(mixed, EVALUATION, [], CPU, 1)) == []


@pytest.mark.parametrize("crop", [PadCrop(), ResizedCrop()])
def test_a_wrong_image_size_is_refused_where_the_recipe_does_not_resize(mixed: Split, crop: Crop) -> None:
    config = Input(size=32, mean=MEAN, std=STD, crop=crop)
    height, width = mixed.sizes[0]
    told = rf"train/a/00\.jpg is {width}x{height} but input\.size is 32.*: set input\.size, or use a recipe"
    with pytest.raises(LonghaulError, match=told):
        next(evaluation_batches(mixed, config, [everything(mixed)], CPU, 1))
    with pytest.raises(LonghaulError, match=told):
        next(training_batches(mixed, config, Order(0, 24, 4, 4), [(0, 0)], CPU, 1))


# --- pixels against PIL and torchvision --------------------------------------------------------------------------


def resize_like_pil(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def torchvision_evaluation(image: np.ndarray, resize: int, size: int) -> np.ndarray:
    shown = vision.resize(Image.fromarray(image), [resize], antialias=True)
    return np.asarray(vision.center_crop(shown, [size, size]))


def mean_difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first.astype(np.float64) - second).mean())


def largest_difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(np.rint(first) - second).max())


def crop_differences(split: Split, device: torch.device, crop: Crop) -> list[float]:
    """Mean absolute difference, in 8-bit values, of each sample's training crop to PIL's resize of the same box."""
    config = Input(size=224, mean=MEAN, std=STD, crop=crop, eval_resize=256)
    order = Order(2, len(split), len(split), len(split))
    differences = []
    for image, _, record in samples(training_batches(split, config, order, [(0, 0)], device, 1)).values():
        _, sample, y, x, height, width, flip, _ = record
        source = decode(split.images(np.array([sample]))[0])
        expected = resize_like_pil(source[y : y + height, x : x + width], 224, 224)
        shown = as_bytes(torch.from_numpy(image)[None])[0]
        differences.append(mean_difference(shown, expected[:, :: 1 - 2 * flip]))
        if device.type == "cpu":  # the same decoder and the same filter, in fixed point
            assert largest_difference(shown, expected[:, :: 1 - 2 * flip]) <= 2
    return differences


def evaluation_differences(split: Split, device: torch.device) -> list[float]:
    """Mean absolute difference of each sample to torchvision's Resize(256) and CenterCrop(224)."""
    config = Input(size=224, mean=MEAN, std=STD, crop=ResizedCrop(), eval_resize=256)
    (batch,) = evaluation_batches(split, config, [everything(split)], device, 1)
    shown = as_bytes(batch.images)
    sources = [decode(jpeg) for jpeg in split.images(everything(split))]
    return [mean_difference(a, torchvision_evaluation(b, 256, 224)) for a, b in zip(shown, sources, strict=True)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Six smooth images of usual sizes, one of them small enough to be enlarged."""
    sizes = [(375, 500), (500, 375), (333, 500), (600, 800), (256, 256), (150, 200)]
    files = {f"train/{'ab'[i % 2]}/{i}.jpg": encode(photo(*size, seed=i), quality=95) for i, size in enumerate(sizes)}
    return Split(prepared(tmp_path_factory.mktemp("photos"), files), "train")


BOUND = {"cpu": 0.3, "cuda": 3.0}


@pytest.mark.parametrize("crop", [ResizedCrop(), ScaleCrop(shorter=(256, 480))])
def test_a_training_crop_looks_like_pils_antialiased_resize_of_its_box(
    photos: Split, device: torch.device, crop: Crop
) -> None:
    assert max(crop_differences(photos, device, crop)) < BOUND[device.type]


def test_evaluation_looks_like_torchvisions(photos: Split, device: torch.device) -> None:
    assert max(evaluation_differences(photos, device)) < BOUND[device.type]


def test_the_bound_on_evaluation_would_catch_a_shift_of_one_pixel_and_a_resize_without_antialias(
    photos: Split,
) -> None:
    for jpeg in photos.images(everything(photos)):
        right = torchvision_evaluation(decode(jpeg), 256, 224)
        assert mean_difference(right[1:], right[:-1]) > 2 * BOUND["cpu"]
        shown = torch.from_numpy(decode(jpeg).copy()).permute(2, 0, 1)
        plain = vision.center_crop(vision.resize(shown, [256], antialias=False), [224, 224]).permute(1, 2, 0).numpy()
        if min(decode(jpeg).shape[:2]) > 2 * 256:  # the less an image shrinks, the less antialiasing does
            assert mean_difference(right, plain) > 2 * BOUND["cpu"]


@pytest.mark.skipif(not PHOTOGRAPHS.is_file(), reason=f"{PHOTOGRAPHS} is not here")
def test_real_photographs_look_like_pils_and_torchvisions(tmp_path: Path, device: torch.device) -> None:
    """32 ImageNet photographs."""
    with tarfile.open(PHOTOGRAPHS) as archive:
        members = [m for m in archive if m.isfile() and m.name.endswith(".JPEG")][::15][:32]
        files = {f"train/{'ab'[i % 2]}/{i:02d}.jpg": archive.extractfile(m).read() for i, m in enumerate(members)}  # type: ignore[union-attr]
    split = Split(prepared(tmp_path, files), "train")
    assert len(split) == 32
    assert max(crop_differences(split, device, ResizedCrop())) < BOUND[device.type]
    assert max(evaluation_differences(split, device)) < BOUND[device.type]
