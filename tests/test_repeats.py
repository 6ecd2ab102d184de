"""Repeated augmentation: R epochs run together, each still a permutation, copies in different micro-batches."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import LonghaulError, load_recipe
from configs.schema import GlobalShuffle
from data_pipeline.augment import augment
from data_pipeline.ingest import prepare
from data_pipeline.loader import training_batches
from data_pipeline.order import Order, WindowedOrder, build_order
from data_pipeline.sources import open_source
from data_pipeline.split import Split
from tests import workers
from tests.workers import different, final_state, make_job, start, train, wait, wait_for
from trainer.dealing import Work
from trainer.verify import verify

SEEDS = st.integers(0, 2**63 - 1)


@st.composite
def orders(draw: st.DrawFn, most: int = 120) -> Order:
    """Global and windowed orders, these over shards of any sizes, with one to six repeats."""
    micro, count, repeats = draw(st.integers(1, 9)), draw(st.integers(1, 7)), draw(st.integers(1, 6))
    if draw(st.booleans()):
        return Order(draw(SEEDS), draw(st.integers(1, most)), micro * count, micro, repeats=repeats)
    rows = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=10)))
    window = draw(st.integers(1, len(rows) + 2))
    return WindowedOrder(draw(SEEDS), sum(rows), micro * count, micro, rows, window, repeats=repeats)


def micro_batches(order: Order, step: int) -> list[list[tuple[int, int]]]:
    """The (epoch, sample) pairs of each micro-batch of a step."""
    drawn = [order.micro_batch(step, micro) for micro in range(order.batch_size // order.micro_size)]
    return [list(zip(epochs.tolist(), ids.tolist(), strict=True)) for epochs, ids in drawn]


@settings(max_examples=60)
@given(orders())
def test_every_epoch_uses_every_sample_exactly_once(order: Order) -> None:
    rounds = 2
    steps = -(-rounds * order.repeats * order.num_samples // order.batch_size)
    used = Counter(pair for step in range(steps) for part in micro_batches(order, step) for pair in part)
    for epoch in range(rounds * order.repeats):
        assert all(used[epoch, sample] == 1 for sample in range(order.num_samples))
    assert sum(used.values()) == steps * order.batch_size


@settings(max_examples=60)
@given(orders(), st.integers(0, 10**6))
def test_a_step_holds_its_part_of_the_stream_and_copies_stand_in_different_micro_batches(order: Order, at: int) -> None:
    parts = micro_batches(order, at)
    epochs, ids = order.at(np.arange(at * order.batch_size, (at + 1) * order.batch_size))
    expected = Counter(zip(epochs.tolist(), ids.tolist(), strict=True))
    assert Counter(pair for part in parts for pair in part) == expected
    most = -(-order.repeats // len(parts))  # with fewer micro-batches than repeats they cannot all be apart
    for part in parts:
        copies = Counter((epoch // order.repeats, sample) for epoch, sample in part)
        assert max(copies.values()) <= most


@given(orders(), st.integers(0, 10**6))
def test_copies_stand_together_in_the_stream_one_for_each_epoch_of_the_round(order: Order, place: int) -> None:
    epochs, ids = order.at(place * order.repeats + np.arange(order.repeats))
    assert len(set(ids.tolist())) == 1
    first = place // order.num_samples * order.repeats
    assert epochs.tolist() == list(range(first, first + order.repeats))
    alone = replace(order).at(np.array([(place + 1) * order.repeats - 1]))  # with nothing remembered
    assert (alone[0][0], alone[1][0]) == (epochs[-1], ids[-1])


@given(orders(), st.integers(0, 60))
def test_what_is_said_of_epochs_is_what_the_stream_gave(order: Order, steps: int) -> None:
    epochs, ids = order.at(np.arange(steps * order.batch_size))
    assert order.epochs_touched(steps) == len(np.unique(epochs))
    for epoch in range(order.epochs_touched(steps) + 1):
        mine = ids[epochs == epoch]
        assert order.used(epoch, steps) == len(mine)
        assert np.array_equal(order.first_of(epoch, len(mine)), mine)
    assert order.epoch_of(steps) == pytest.approx(len(ids) / order.num_samples)


@settings(max_examples=60)
@given(orders(), st.integers(0, 20), st.integers(0, 20))
def test_windows_are_those_that_the_steps_read(order: Order, first: int, steps: int) -> None:
    if not isinstance(order, WindowedOrder):
        return
    positions = np.arange(first * order.batch_size, (first + steps) * order.batch_size)
    places = np.unique(positions // order.repeats)
    once = replace(order, repeats=1, batch_size=1, micro_size=1)
    windows = list(order.windows(first, first + steps))
    assert windows == (list(once.windows(places[0], places[-1] + 1)) if steps else [])
    shards = np.searchsorted(np.cumsum(order.shard_rows), order.at(positions)[1], side="right")
    assert set(shards.tolist()) <= {shard for window in windows for shard in window}


def test_without_repeats_the_layout_is_what_it_was() -> None:
    recipe = load_recipe("digits")
    assert recipe.order == GlobalShuffle() and recipe.order.repeats == 1
    order = build_order(recipe, [1_437])
    for step, micro in ((0, 0), (0, 1), (22, 1)):
        first = step * 64 + micro * 32
        expected = order.at(np.arange(first, first + 32))
        assert all(np.array_equal(a, b) for a, b in zip(order.micro_batch(step, micro), expected, strict=True))


@pytest.mark.parametrize("kind", ["global", "windowed"])
def test_the_recipe_gives_the_repeats(kind: str) -> None:
    recipe = load_recipe("digits", [f"order={{kind: {kind}, repeats: 3}}"])
    assert build_order(recipe, [1_000, 437]).repeats == 3
    with pytest.raises(LonghaulError, match=r"order\.repeats: Input should be greater than 0"):
        load_recipe("digits", [f"order={{kind: {kind}, repeats: 0}}"])


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "digits"
    prepare(open_source("digits", 0.0), out)
    return out


def test_copies_of_a_sample_are_augmented_differently(digits: Path) -> None:
    split = Split(digits, "train")
    recipe = load_recipe("digits", ["order.repeats=4", "batch={size: 64, micro: 16}"])
    order = build_order(recipe, [len(split)])
    batches = list(training_batches(split, recipe.input, order, Work(0, 1, range(4)), torch.device("cpu"), 1))
    for slot in range(16):
        records = np.stack([batch.records[slot] for batch in batches])
        assert records[:, 0].tolist() == [0, 1, 2, 3] and len(set(records[:, 1].tolist())) == 1
    boxes = np.stack([batch.records[:, 2:4] for batch in batches])
    assert (boxes != boxes[0]).any(axis=(0, 2)).mean() > 0.5  # of the nine crops of a digit four are seldom the same
    for epoch, batch in enumerate(batches):
        drawn = augment(recipe.input, recipe.seed, np.full(16, epoch), batch.records[:, 1], split.sizes[:16])
        assert np.array_equal(drawn.boxes[:, :2], boxes[epoch])


KEYS = ("order.repeats=3", "batch={size: 192, micro: 48}", "precision=fp32", "duration=30it", "checkpoint.every=4it",
        "evaluate.every=30it")  # fmt: skip


@pytest.mark.slow
def test_a_run_with_repeats_is_verified_and_goes_on_after_a_stop_as_if_there_had_been_none(
    digits: Path, tmp_path: Path
) -> None:
    """30 steps of 192 images are a round of three epochs of the digits, and the beginning of another."""
    undisturbed = make_job(tmp_path / "one", digits, *KEYS)
    train(undisturbed, 1)
    job = make_job(tmp_path / "two", digits, *KEYS)
    processes = start(job, 1)
    wait_for(lambda: workers.reached(job.run, 6))
    job.run.stop_file.touch()
    assert wait(processes) == [0]
    assert any(event["event"] == "stopped" for event in job.run.events())
    train(job, 1)
    assert different(final_state(job.run), final_state(undisturbed.run)) == []
    findings = verify(job.run)
    assert all(finding.holds for finding in findings)
    left = 30 * 192 - 3 * len(Split(digits, "train"))
    parts = [-(-left // 3), -(-(left - 1) // 3), left // 3]
    under_way = " and ".join(map(str, parts))
    assert [f.figures for f in findings[1:3]] == ["3 epochs of 1,442 samples", f"{under_way} of 1,442"]
