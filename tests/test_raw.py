"""Raw pixels give the batches that the JPEGs they came from give, though they take another way to the network."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs import LonghaulError
from configs.schema import Crop, Input, PadCrop, ResizedCrop, ScaleCrop
from data_pipeline.direct import is_direct
from data_pipeline.ingest import Options, prepare
from data_pipeline.loader import Batch, evaluation_batches, training_batches
from data_pipeline.order import Order
from data_pipeline.sources import open_source
from data_pipeline.split import Split
from trainer.dealing import Work, deal

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROPS: list[Crop] = [ResizedCrop(), ScaleCrop(shorter=(36, 60))]


def config(crop: Crop, **changes: object) -> Input:
    return Input(size=32, mean=MEAN, std=STD, crop=crop, eval_resize=36, pca_colour=0.1, **changes)


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Split, Split]:
    """Twenty images as JPEGs and as pixels."""
    root = tmp_path_factory.mktemp("raw")
    rng = np.random.default_rng(0)
    for i in range(20):
        coarse = rng.integers(0, 256, (6, 7, 3), np.uint8)
        image = Image.fromarray(coarse).resize((40 + 3 * i, 90 - 2 * i), Image.Resampling.BICUBIC)
        path = root / "tree" / "ab"[i % 2] / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=92)
    found = []
    for name, options in (("jpeg", Options()), ("raw", Options(raw=True))):
        prepare(open_source(str(root / "tree"), 0.0), root / name, options=options)
        found.append(Split(root / name, "train"))
    return found[0], found[1]


def read(split: Split, shown: Input, micro: int = 5, threads: int = 1, world_size: int = 1) -> dict[tuple, Batch]:
    """Two epochs, by (step, micro)."""
    order = Order(7, len(split), 20, micro)
    found = {}
    for rank in range(world_size):
        work = Work(0, 2, deal(20 // micro, world_size, rank))
        batches = training_batches(split, shown, order, work, CPU, threads)
        found |= {tuple(place): batch for place, batch in zip(work, batches, strict=True)}
    return found


@pytest.mark.parametrize("crop", CROPS)
def test_training_on_pixels_is_training_on_the_jpegs_they_came_from(splits: tuple[Split, Split], crop: Crop) -> None:
    jpeg, raw = splits
    assert is_direct(config(crop))
    expected = read(jpeg, config(crop))
    for place, batch in read(raw, config(crop)).items():
        assert np.array_equal(batch.records, expected[place].records)
        assert torch.equal(batch.labels, expected[place].labels)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(batch.images, expected[place].images, rtol=0, atol=1e-5)


def test_the_pixels_are_the_same_whatever_the_batch_the_threads_and_the_worker(splits: tuple[Split, Split]) -> None:
    def by_sample(batches: dict[tuple, Batch]) -> dict[tuple[int, int], torch.Tensor]:
        return {
            (record[0], record[1]): image
            for batch in batches.values()
            for image, record in zip(batch.images, batch.records.tolist(), strict=True)
        }

    raw = splits[1]
    reference = by_sample(read(raw, config(ResizedCrop())))
    assert len(reference) == 40
    for other in ((20, 2, 1), (1, 3, 1), (4, 1, 3)):
        found = by_sample(read(raw, config(ResizedCrop()), *other))
        assert found.keys() == reference.keys()
        assert all(torch.equal(found[key], reference[key]) for key in found)


def test_what_only_dali_does_is_done_to_pixels_too(splits: tuple[Split, Split]) -> None:
    """Colour jitter and evaluation go through DALI, whatever the data set holds."""
    jpeg, raw = splits
    jittered = config(ResizedCrop(), colour_jitter={"brightness": 0.4})
    assert not is_direct(jittered) and not is_direct(config(PadCrop()))
    expected = read(jpeg, jittered)
    for place, batch in read(raw, jittered).items():
        torch.testing.assert_close(batch.images, expected[place].images, rtol=0, atol=1e-5)
    ids = [np.arange(13), np.arange(13, 20)]
    seen, wanted = (list(evaluation_batches(s, config(ResizedCrop()), ids, CPU, 2)) for s in (raw, jpeg))
    for one, other in zip(seen, wanted, strict=True):
        torch.testing.assert_close(one.images, other.images, rtol=0, atol=1e-5)


def test_evaluating_again_and_again_starts_no_more_threads(splits: tuple[Split, Split]) -> None:
    def evaluate() -> set[int | None]:
        list(evaluation_batches(splits[0], config(ResizedCrop()), [np.arange(20)], CPU, 2))
        return {thread.ident for thread in threading.enumerate() if thread.name.startswith("images")}

    first = evaluate()
    assert first and evaluate() == first


def test_reading_may_stop_early_and_what_goes_wrong_ahead_is_told(splits: tuple[Split, Split], tmp_path: Path) -> None:
    raw = splits[1]
    order = Order(0, len(raw), 4, 4)
    batches = training_batches(raw, config(ResizedCrop()), order, Work(0, 100_000, range(1)), CPU, 2)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    image = raw.images(np.array([11]))[0]
    file = Path(str(raw.location)) / raw.shards[0].file
    whole = bytearray(file.read_bytes())
    whole[whole.index(image.tobytes()) + 7] ^= 4
    for path in Path(str(raw.location)).iterdir():
        (tmp_path / path.name).write_bytes(whole if path.name == file.name else path.read_bytes())
    with pytest.raises(LonghaulError, match=r"row 11 \(.*\) does not have the bytes"):
        read(Split(tmp_path, "train"), config(ResizedCrop()))
