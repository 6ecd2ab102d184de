"""Progressive resizing: the size is a function of the step, and a run across its changes is as exact as any other."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs import Duration, LonghaulError, load_recipe
from configs.augmentation import Progressive, RandAugment
from configs.schema import Input, ResizedCrop, ScaleCrop
from data_pipeline.augment import augment, central
from data_pipeline.loader import training_batches
from data_pipeline.order import Order
from data_pipeline.resolution import size_at
from data_pipeline.split import Split
from tests import workers
from tests.workers import different, final_state, make_job, start, train, wait, wait_for
from trainer.verify import verify

NUM_SAMPLES, BATCH = 10_000, 100


def recipe(
    start: str = "35ep", end: str = "80ep", size: int = 224, train_size: int | None = None, **keys: object
) -> Input:
    values = {"start_size": 160, "end_size": 192, "start": start, "end": end, **keys}
    return Input(
        size=size, train_size=train_size, mean=(0, 0, 0), std=(1, 1, 1), crop=ResizedCrop(), eval_resize=size,
        progressive=Progressive.model_validate(values),
    )  # fmt: skip


def sizes(config: Input, steps: range) -> list[int]:
    return [size_at(config, BATCH, NUM_SAMPLES, step) for step in steps]


@given(st.integers(1, 300), st.integers(0, 300), st.integers(1, 64), st.integers(0, 50), st.integers(0, 50))
def test_sizes_only_grow_from_the_first_to_the_last_in_multiples(
    first: int, more: int, multiple: int, begin: int, length: int
) -> None:
    last = first + more
    config = recipe(f"{begin}it", f"{begin + length}it", start_size=first, end_size=last, multiple=multiple)
    found = sizes(config, range(begin + length + 3))
    assert found == sorted(found) and found[-3:] == [last] * 3
    assert set(found[: begin + 1]) <= {first if length else last, first}
    assert all(size % multiple == 0 or size in (first, last) for size in found)


def test_the_schedule_is_ffcvs_at_every_whole_epoch() -> None:
    """libffcv/ffcv-imagenet, train_imagenet.py, get_resolution, with the settings of its rn50_88_epochs.yaml."""
    config = recipe("65ep", "76ep")
    for epoch in range(88):
        ramp = np.interp([epoch], [65, 76], [160, 192])
        expected = 160 if epoch <= 65 else 192 if epoch >= 76 else int(np.round(ramp[0] / 32)) * 32
        if ramp[0] / 32 % 1 != 0.5:  # NumPy rounds a half to the even number
            assert size_at(config, BATCH, NUM_SAMPLES, epoch * NUM_SAMPLES // BATCH) == expected


def test_without_an_end_size_images_grow_to_that_of_evaluation_and_without_the_key_not_at_all() -> None:
    assert sizes(recipe("0it", "4it", end_size=None), range(6)) == [160, 192, 192, 224, 224, 224]
    plain = Input(size=224, mean=(0, 0, 0), std=(1, 1, 1), crop=ResizedCrop(), eval_resize=256)
    assert set(sizes(plain, range(5))) == {224}


def test_training_images_may_have_a_size_of_their_own() -> None:
    plain = Input(size=224, train_size=176, mean=(0, 0, 0), std=(1, 1, 1), crop=ResizedCrop(), eval_resize=232)
    assert set(sizes(plain, range(5))) == {176}
    grown = recipe("0it", "4it", end_size=None, start_size=96, train_size=160, size=224)
    assert sizes(grown, range(6)) == [96, 128, 128, 160, 160, 160]
    whole = np.array([[500, 400]], np.int32)
    for size, expected in ((None, 224), (112, 112)):  # of an image resized to 224, all, or a half of its shorter side
        crop = ScaleCrop(shorter=(224, 224))
        config = Input(size=224, train_size=size, mean=(0, 0, 0), std=(1, 1, 1), crop=crop, eval_resize=256)
        drawn = augment(config, 0, np.zeros(1, np.int64), np.zeros(1, np.int64), whole)
        assert drawn.boxes[0, 2:].tolist() == [400 * expected // 224] * 2
        assert central(config, whole)[0].tolist() == [[320, 256]]  # evaluation does not know of it


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (["input.train_size=176", "input.crop={kind: pad_crop}"], "input.train_size needs a crop that is resized"),
        (["input.train_size=0"], "input.train_size: "),
        (
            ["input.train_size=128", "input.progressive={start_size: 160, start: 1ep, end: 8ep}"],
            "start_size=160 is larger than the size to end with, 128",
        ),
        (
            ["input.train_size=176", "input.progressive={start_size: 160, end_size: 192, start: 1ep, end: 8ep}"],
            "input.train_size=176 and input.progressive.end_size=192 both say",
        ),
        (["input.progressive={start_size: 160, start: 9ep, end: 8ep}"], "start=9ep is after input.progressive.end=8ep"),
        (["input.progressive={start_size: 256, start: 1ep, end: 8ep}"], "start_size=256 is larger than"),
        (["input.progressive={start_size: 160, start: 1ep}"], "the key 'input.progressive.end' is missing"),
        (
            ["input.progressive={start_size: 160, start: 1ep, end: 8ep}", "input.crop={kind: pad_crop}"],
            "needs a crop that is resized",
        ),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(keys: list[str], told: str) -> None:
    with pytest.raises(LonghaulError) as refused:
        load_recipe("resnet50", keys)
    assert told in str(refused.value)


def test_the_loader_gives_each_step_its_size_and_pixels_know_nothing_of_what_came_before(digits: Path) -> None:
    split = Split(digits, "train")
    config = recipe("1it", "3it", size=16, start_size=8, end_size=16, multiple=4)
    config = config.model_copy(update={"auto_augment": RandAugment()})
    order = Order(0, len(split), 32, 16)
    work = [(step, micro) for step in range(5) for micro in (0, 1)]
    device = torch.device("cpu")
    batches = list(training_batches(split, config, order, work, device, 1))
    smaller = config.model_copy(update={"progressive": None, "train_size": 12})
    assert next(training_batches(split, smaller, order, work, device, 1)).images.shape == (16, 3, 12, 12)
    assert [batch.images.shape[2] for batch in batches] == [8, 8, 8, 8, 12, 12, 16, 16, 16, 16]
    assert all(batch.images.shape[2] == batch.images.shape[3] for batch in batches)
    for first in (3, 4, 5):
        resumed = list(training_batches(split, config, order, work[first:], device, 1))
        assert all(torch.equal(a.images, b.images) for a, b in zip(resumed, batches[first:], strict=True))


KEYS = (
    "input.crop={kind: resized_crop}", "input.size=16", "input.eval_resize=16", "precision=fp32", "duration=12it",
    "input.progressive={start_size: 8, start: 3it, end: 9it, multiple: 4}", "evaluate.every=12it",
    "checkpoint.every=1it",
)  # fmt: skip


def test_a_run_across_size_changes_resumes_bit_for_bit_on_other_workers(digits: Path, tmp_path: Path) -> None:
    undisturbed = make_job(tmp_path / "one", digits, *KEYS)
    train(undisturbed, 1)
    job = make_job(tmp_path / "two", digits, *KEYS)
    processes = start(job, 2)
    wait_for(lambda: workers.reached(job.run, 5))
    job.run.stop_file.touch()
    assert wait(processes) == [0, 0]
    stopped = next(e["step"] for e in job.run.events() if e["event"] == "stopped")
    recipe_sizes = [size_at(job.recipe.input, 64, len(Split(digits, "train")), step) for step in range(12)]
    assert recipe_sizes[0] == 8 and recipe_sizes[-1] == 16 and 5 <= stopped < 12
    train(job, 1)
    assert different(final_state(job.run), final_state(undisturbed.run)) == []
    assert all(finding.holds for finding in verify(job.run))


def test_durations_of_different_units_may_be_mixed() -> None:
    config = recipe("1ep", "150it")
    assert config.progressive is not None and config.progressive.start == Duration.parse("1ep")
    assert sizes(config, range(99, 151))[0] == 160 and sizes(config, range(150, 151)) == [192]
