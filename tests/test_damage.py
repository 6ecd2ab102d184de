"""Images whose bytes changed after ingest: always found, named, and replaced only where the recipe says so."""

import io
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import LonghaulError
from configs.schema import Input, PadCrop, ResizedCrop
from data_pipeline.augment import augment
from data_pipeline.feed import sound
from data_pipeline.ingest import prepare
from data_pipeline.loader import Batch, evaluation_batches, training_batches
from data_pipeline.order import Order
from data_pipeline.records import substitutes
from data_pipeline.shards import SCHEMA, Manifest, write_batch
from data_pipeline.sources import open_source
from data_pipeline.split import Split
from tests import workers
from tests.workers import different, final_state, make_job, train
from trainer.dealing import Work
from trainer.verify import verify

CPU = torch.device("cpu")
CONFIG = Input(
    size=8, mean=(0.3, 0.3, 0.3), std=(0.4, 0.4, 0.4), crop=PadCrop(padding=1), eval_resize=None, damaged="substitute"
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "digits"
    prepare(open_source("digits", 0.0), out)
    return out


def damage(data: Path, split: str, samples: list[int]) -> Split:
    """Flip a bit in the middle of each of these samples, and open the split."""
    opened = Split(data, split)
    views = opened.images(np.array(samples))
    (file,) = (data / shard.file for shard in opened.manifest.splits[split])
    whole = bytearray(file.read_bytes())
    for view in views:
        at = whole.index(view.tobytes())
        whole[at + len(view) // 2] ^= 0x10
    file.unlink()  # what is mapped elsewhere stays as it was
    file.write_bytes(whole)
    return Split(data, split)


@pytest.fixture
def copy(digits: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(digits, tmp_path / "digits"))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.integers(0, 7))
def test_any_flipped_bit_of_any_image_is_found(digits: Path, place: int, bit: int) -> None:
    split = Split(digits, "train")
    ids = np.arange(len(split))
    views = split.images(ids)
    sample = place % len(split)
    spoilt = views[sample].copy()
    spoilt[place // len(split) % len(spoilt)] ^= 1 << bit
    views[sample] = spoilt
    assert split.damaged(ids, views) == [sample]


def test_a_damaged_sample_has_one_sound_substitute_whoever_looks(copy: Path) -> None:
    bad = list(range(4, 700))
    split = damage(copy, "train", bad)
    ids = np.array([6, 3, 4, 699])
    found = sound(split, ids, "substitute")
    assert found.ids[1] == 3 and not set(found.ids.tolist()) & set(bad)
    assert len({found.ids[0], found.ids[2], found.ids[3]}) == 3  # spread over the split, not all in one place
    assert all(np.array_equal(a, b) for a, b in zip(found.images, split.images(found.ids), strict=True))
    assert sound(Split(copy, "train"), ids[::-1], "substitute").ids.tolist() == found.ids[::-1].tolist()


def test_a_split_without_a_sound_sample_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tree" / "a").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (8, 8), (40 * i, 0, 90)).save(tmp_path / "tree" / "a" / f"{i}.jpg")
    prepare(open_source(str(tmp_path / "tree"), 0.0), tmp_path / "data")
    split = damage(tmp_path / "data", "train", [0, 1, 2])
    with pytest.raises(LonghaulError, match=r"Hardly a sample of .*data has the bytes that were written"):
        sound(split, np.array([1]), "substitute")


def test_a_substitute_has_its_own_label_and_crop_and_stands_in_the_record(copy: Path) -> None:
    split = damage(copy, "train", [10, 700])
    order = Order(3, len(split), len(split), len(split))
    (batch,) = training_batches(split, CONFIG, order, [(1, 0)], CPU, 1)
    expected = {sample: int(sound(split, np.array([sample]), "substitute").ids[0]) for sample in (10, 700)}
    assert sorted(substitutes(batch.records).tolist()) == [[1, sample, shown] for sample, shown in expected.items()]
    assert sorted(batch.records[:, 1].tolist()) == list(range(len(split)))
    for place, (epoch, sample, *box, flip, shown) in enumerate(batch.records.tolist()):
        assert shown == expected.get(sample, sample)
        assert batch.labels[place] == split.labels[shown]
        ids = np.array([shown])
        drawn = augment(CONFIG, order.seed, np.array([epoch]), ids, split.sizes[ids])
        assert (drawn.boxes[0].tolist(), drawn.flips[0]) == (box, flip)
    by_id = {sample: place for place, sample in enumerate(batch.records[:, 1].tolist())}
    assert torch.equal(batch.images[by_id[10]], batch.images[by_id[expected[10]]])


@pytest.mark.parametrize("policy", ["fail", "substitute"])
def test_an_evaluation_never_shows_a_substitute(copy: Path, policy: str) -> None:
    split = damage(copy, "val", [17])
    config = CONFIG.model_copy(update={"damaged": policy})
    with pytest.raises(LonghaulError, match=r"val-00000\.arrow, row 17 \(val/.*\) does not have the bytes"):
        list(evaluation_batches(split, config, [np.arange(40)], CPU, 1))


def read(split: Split, config: Input) -> list[Batch]:
    return list(training_batches(split, config, Order(0, len(split), 100, 50), Work(0, 20, range(2)), CPU, 1))


def test_the_image_is_named_where_the_recipe_says_fail(copy: Path) -> None:
    split = damage(copy, "train", [321])
    with pytest.raises(LonghaulError, match=r"row 321 \(train/.*input\.damaged=substitute"):
        read(split, CONFIG.model_copy(update={"damaged": "fail"}))


def test_an_image_that_dali_cannot_decode_is_named_though_its_bytes_are_right(tmp_path: Path) -> None:
    """As if ingest had let it through: a JPEG cut short after its header, with the right checksum."""
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (9, 80, 200)).save(buffer, "JPEG")
    good = buffer.getvalue()
    rows = [good] * 5
    rows[3] = good[:2] + bytes(len(good) - 2)
    columns = [rows, [0] * 5, [20] * 5, [20] * 5, [f"image{i}" for i in range(5)], [zlib.crc32(row) for row in rows]]
    batch = pa.record_batch(columns, schema=SCHEMA)
    shard = write_batch(tmp_path / "train-00000.arrow", batch)
    index = write_batch(tmp_path / "train.index.arrow", batch.select(["label", "height", "width", "crc32"]))
    Manifest("x", ["a"], {"train": [shard]}, {"train": index}, [0.5] * 3, [0.5] * 3, "x").write(tmp_path)
    config = Input(size=8, mean=(0.5,) * 3, std=(0.5,) * 3, crop=ResizedCrop(), eval_resize=8, damaged="substitute")
    split = Split(tmp_path, "train")
    with pytest.raises(LonghaulError, match=r"row 3 \(image3\) has the bytes .* but DALI cannot decode it"):
        list(training_batches(split, config, Order(0, 5, 5, 5), [(0, 0)], CPU, 1))


def test_a_run_over_damaged_data_goes_on_says_so_and_verifies(copy: Path, tmp_path: Path) -> None:
    split = damage(copy, "train", [5, 6, 900])
    jobs = []
    for name, world_size in (("one", 1), ("two", 2)):
        job = make_job(
            tmp_path / name, copy, "input.damaged=substitute", "batch={size: 128, micro: 64}", "duration=25it"
        )
        if world_size == 2:  # and a resume between
            processes = workers.start(job, 2)
            workers.wait_for(lambda j=job: workers.reached(j.run, 16))
            workers.kill(processes)
            workers.wait(processes)
        train(job, world_size)
        jobs.append(job)
    one, two = (job.run for job in jobs)
    # 25 steps of 128 are 2.2 epochs of 1,442 samples: three damaged ones, each at least twice
    found = final_state(one)["ledger.substitutes"].tolist()
    shown = [(sample, int(sound(split, np.array([sample]), "substitute").ids[0])) for sample in (5, 6, 900)]
    assert [row for row in found if row[0] < 2] == [[epoch, *pair] for epoch in (0, 1) for pair in shown]
    assert different(final_state(one), final_state(two)) == []
    findings = verify(one, copy)
    assert all(finding.holds for finding in findings)
    (named,) = (f for f in findings if "shown for a damaged one" in f.what)
    assert named.what.startswith(str(len(found))) and "row 5 (train/" in named.figures
    assert sum(e["num_substitutes"] for e in one.events() if e["event"] == "step") == len(found)


def test_a_run_says_which_image_is_damaged_and_ends(copy: Path, tmp_path: Path) -> None:
    damage(copy, "train", [5])
    job = make_job(tmp_path / "run", copy)
    told = workers.refusal(job)
    assert "row 5 (train/" in told and "input.damaged=substitute" in told
    assert json.loads((job.run.path / "events.jsonl").read_text().splitlines()[-1])["event"] == "failure"


def test_a_shard_that_cannot_be_read_is_replaced_sample_by_sample_or_named(tmp_path: Path) -> None:
    prepare(open_source("digits", 0.0), tmp_path / "data", shard_bytes=100_000)
    lost = tmp_path / "data" / "train-00001.arrow"
    lost.write_bytes(lost.read_bytes()[:-50])
    told = workers.refusal(make_job(tmp_path / "fail", tmp_path / "data"))
    assert "train-00001.arrow cannot be read" in told
    job = make_job(tmp_path / "substitute", tmp_path / "data", "input.damaged=substitute", "duration=2ep")
    train(job, 1)
    (warning,) = (event for event in job.run.events() if event["event"] == "warning")
    assert "train-00001.arrow cannot be read" in warning["message"]
    split = Split(tmp_path / "data", "train", damaged="substitute")
    rows = split.shards[1].rows
    found = final_state(job.run)["ledger.substitutes"].tolist()
    first = split.shards[0].rows
    assert [row[1] for row in found if row[0] == 0] == list(range(first, first + rows))
    shown = [row[2] for row in found if row[0] == 0]
    assert not set(shown) & set(range(first, first + rows)) and len(set(shown)) > rows // 2
    assert all(finding.holds for finding in verify(job.run, tmp_path / "data"))
