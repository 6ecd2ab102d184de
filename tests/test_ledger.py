"""The ledger tells apart what differs, does not see who computed what, and proves each sample used exactly once."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import Recipe, load_recipe
from data_pipeline.augment import augment
from data_pipeline.ingest import prepare
from data_pipeline.loader import training_batches
from data_pipeline.order import Order
from data_pipeline.records import training_records
from data_pipeline.sources import open_source
from data_pipeline.split import Split
from trainer import verify
from trainer.dealing import Work, deal
from trainer.group import Group, Rendezvous, join
from trainer.ledger import Ledger, Recorder, micro_digest, sample_hashes

CPU = torch.device("cpu")
SEEDS = st.integers(0, 2**63 - 1)


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    """A real process group, of one."""
    with join(Rendezvous.from_environment(), CPU, 60) as joined:
        yield joined


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Split:
    out = tmp_path_factory.mktemp("data") / "digits"
    prepare(open_source("digits", 0.0), out)
    return Split(out, "train")


def records_of(recipe: Recipe, order: Order, sizes: np.ndarray, step: int, micro: int) -> np.ndarray:
    """What comes out of the input pipeline beside the pixels of a micro-batch."""
    epochs, ids = order.micro_batch(step, micro)
    drawn = augment(recipe.input, order.seed, epochs, ids, sizes[ids])
    return training_records(epochs, ids, ids, drawn)


def small_run(seed: int, samples: int, micros: int, micro_size: int = 4) -> tuple[Recipe, Order, np.ndarray]:
    size = micros * micro_size
    recipe = load_recipe("digits", [f"seed={seed}", f"batch={{size: {size}, micro: {micro_size}}}", "input.flip=true"])
    return recipe, Order(seed, samples, size, micro_size), np.full((samples, 2), 8, np.int32)


def totals(ledgers: list[Ledger]) -> Ledger:
    """What the reduction over ranks makes of them: sums modulo 2**64."""
    steps = torch.stack([ledger.steps for ledger in ledgers]).sum(0)
    epochs = torch.stack([ledger.epochs for ledger in ledgers]).sum(0)
    return Ledger(steps, epochs, torch.cat([ledger.substitutes for ledger in ledgers]))


def same(first: Ledger, second: Ledger) -> bool:
    return all(torch.equal(tensor, second.state()[name]) for name, tensor in first.state().items())


def findings(order: Order, ledger: Ledger, steps: int) -> list[bool]:
    return [finding.holds for finding in verify._check_epochs(order, ledger, steps)]


# --- independent of who computes -----------------------------------------------------------------------------------


@settings(max_examples=30)
@given(SEEDS, st.integers(1, 90), st.integers(1, 7), st.integers(1, 6))
def test_the_ledger_does_not_show_how_many_workers_there_were(
    group: Group, seed: int, samples: int, micros: int, steps: int
) -> None:
    recipe, order, sizes = small_run(seed, samples, micros)
    every = {(s, m): records_of(recipe, order, sizes, s, m) for s in range(steps) for m in range(micros)}

    def merged(world_size: int) -> Ledger:
        ledgers = []
        for rank in range(world_size):
            recorder = Recorder(Ledger.empty(order, 0))
            for step, micro in Work(0, steps, deal(micros, world_size, rank)):
                recorder.record(step, micro, every[step, micro])
            # A group of one reduces nothing, so this is the rank's own part.
            ledgers.append(recorder.merge(order, steps, group))
        return totals(ledgers)

    alone = merged(1)
    assert all(same(merged(world_size), alone) for world_size in range(2, micros + 1))
    assert findings(order, alone, steps) == [True] * len(findings(order, alone, steps))


@settings(max_examples=30)
@given(SEEDS, st.integers(1, 60), st.integers(1, 4), st.integers(1, 8), st.data())
def test_checkpoints_on_the_way_leave_no_trace_in_the_ledger(
    group: Group, seed: int, samples: int, micros: int, steps: int, data: st.DataObject
) -> None:
    recipe, order, sizes = small_run(seed, samples, micros)
    borders = data.draw(st.sets(st.integers(1, steps))) | {steps}

    def run(borders: set[int], restart: bool) -> Ledger:
        ledger = Ledger.empty(order, 0)
        recorder = Recorder(ledger)
        for step in range(steps):
            for micro in range(micros):
                recorder.record(step, micro, records_of(recipe, order, sizes, step, micro))
            if step + 1 in borders:
                ledger = recorder.merge(order, step + 1, group)
                assert len(ledger.steps) == step + 1 and len(ledger.epochs) == order.epochs_touched(step + 1)
                if restart:
                    recorder = Recorder(ledger)
        return ledger

    straight = run({steps}, restart=False)
    assert same(run(borders, restart=False), straight)
    assert same(run(borders, restart=True), straight)


def test_merging_twice_in_a_row_across_a_checkpoint_goes_on_from_it(group: Group) -> None:
    recipe, order, sizes = small_run(seed=3, samples=50, micros=3)
    recorder = Recorder(Ledger.empty(order, 0))
    merged = []
    for first, last in ((0, 4), (4, 9)):
        for step, micro in Work(first, last, range(3)):
            recorder.record(step, micro, records_of(recipe, order, sizes, step, micro))
        merged.append(recorder.merge(order, last, group))
    early, late = merged
    assert torch.equal(late.steps[:4], early.steps)
    assert early.epochs[:, 0].tolist() == [48] and late.epochs[:, 0].tolist() == [50, 50, 8]
    expected = [
        sum(micro_digest(m, records_of(recipe, order, sizes, step, m)) for m in range(3)) % 2**64 for step in range(9)
    ]
    assert late.steps.numpy().view(np.uint64).tolist() == expected
    assert findings(order, late, 9) == [True, True]


def test_work_that_was_lost_after_a_checkpoint_and_done_again_counts_once(group: Group) -> None:
    recipe, order, sizes = small_run(seed=3, samples=50, micros=2)

    def go(recorder: Recorder, first: int, last: int) -> None:
        for step, micro in Work(first, last, range(2)):
            recorder.record(step, micro, records_of(recipe, order, sizes, step, micro))

    recorder = Recorder(Ledger.empty(order, 0))
    go(recorder, 0, 4)
    saved = recorder.merge(order, 4, group)
    go(recorder, 4, 7)  # killed before the next checkpoint
    again = Recorder(saved)
    go(again, 4, 10)
    straight = Recorder(Ledger.empty(order, 0))
    go(straight, 0, 10)
    assert same(again.merge(order, 10, group), straight.merge(order, 10, group))


# --- sensitive to every change -------------------------------------------------------------------------------------


@st.composite
def changes(draw: st.DrawFn) -> tuple[int, np.ndarray, int, np.ndarray]:
    """A micro-batch (its number and records), and the same with one thing changed."""
    count, micro = draw(st.integers(2, 32)), draw(st.integers(0, 4_095))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    records = np.column_stack(
        [
            np.sort(rng.integers(0, 3, count)),
            rng.integers(0, 1_000) + rng.permutation(count),
            rng.integers(-4, 500, (count, 4)),
            rng.integers(0, 2, count),
            rng.integers(0, 1_000, count),
        ]
    ).astype(np.int64)
    changed, row = records.copy(), draw(st.integers(0, count - 1))
    match draw(st.sampled_from(["value", "flip", "shown", "swap", "drop", "twice", "columns", "micro"])):
        case "value":
            changed[row, draw(st.integers(0, 5))] += draw(st.sampled_from([-(2**31), -1, 1, 2**31]))
        case "flip":
            changed[row, 6] ^= 1
        case "shown":
            changed[row, 7] += 1
        case "swap":
            changed[[row, row - 1]] = changed[[row - 1, row]]
        case "drop":
            changed = np.delete(changed, row, axis=0)
        case "twice":
            changed[row] = changed[row - 1]
        case "columns":
            changed[row, 2:4] = changed[row, [3, 2]] + [0, 1000]
        case "micro":
            return micro, records, micro + 1, changed
    return micro, records, micro, changed


@settings(max_examples=400)
@given(changes())
def test_one_changed_sample_box_flip_or_place_changes_the_digest(case: tuple[int, np.ndarray, int, np.ndarray]) -> None:
    micro, records, other, changed = case
    assert micro_digest(micro, records) == micro_digest(micro, records.copy())
    assert micro_digest(micro, records) != micro_digest(other, changed)


def test_two_samples_swapped_between_micro_batches_change_the_step() -> None:
    """Batch norm sees other images, though the step uses the same ones."""
    recipe, order, sizes = small_run(seed=0, samples=100, micros=2)
    first, second = (records_of(recipe, order, sizes, 0, micro) for micro in (0, 1))

    def digest(a: np.ndarray, b: np.ndarray) -> int:
        return (micro_digest(0, a) + micro_digest(1, b)) % 2**64

    before = digest(first, second)
    assert digest(second, first) != before
    other_first, other_second = first.copy(), second.copy()
    other_first[1], other_second[1] = second[1], first[1]
    assert digest(other_first, other_second) != before


def test_hashes_of_a_million_samples_and_ten_epochs_do_not_collide() -> None:
    ids = np.tile(np.arange(100_000, dtype=np.int64), 10)
    epochs = np.repeat(np.arange(10, dtype=np.int64), 100_000)
    assert len(np.unique(sample_hashes(epochs, ids))) == 1_000_000


# --- exactly once --------------------------------------------------------------------------------------------------


def spoilt_epochs(group: Group, spoil) -> list[bool]:  # type: ignore[no-untyped-def]
    """Whether [whole epochs, the epoch under way] hold once `spoil(step, records)` had its way with the records."""
    recipe, order, sizes = small_run(seed=1, samples=40, micros=1, micro_size=8)
    recorder = Recorder(Ledger.empty(order, 0))
    for step in range(12):  # two epochs of five steps and two steps of the third
        recorder.record(step, 0, spoil(step, records_of(recipe, order, sizes, step, 0)))
    return findings(order, recorder.merge(order, 12, group), 12)


def test_an_honest_run_used_every_sample_exactly_once(group: Group) -> None:
    assert spoilt_epochs(group, lambda _, records: records) == [True, True]


@pytest.mark.parametrize(("step", "verdict"), [(3, [False, True]), (9, [False, True]), (11, [True, False])])
def test_a_sample_used_twice_in_anothers_place_is_found_in_its_epoch(
    group: Group, step: int, verdict: list[bool]
) -> None:
    def twice(now: int, records: np.ndarray) -> np.ndarray:
        if now == step:
            records[5] = records[2]
        return records

    assert spoilt_epochs(group, twice) == verdict


def test_a_sample_left_out_or_added_or_of_another_epoch_is_found(group: Group) -> None:
    def without(now: int, records: np.ndarray) -> np.ndarray:
        return records[:-1] if now == 4 else records

    def more(now: int, records: np.ndarray) -> np.ndarray:
        return np.concatenate([records, records[:1]]) if now == 4 else records

    def late(now: int, records: np.ndarray) -> np.ndarray:
        records[0, 0] += now == 4
        return records

    def unknown(now: int, records: np.ndarray) -> np.ndarray:
        records[0, 1] += 1_000 * (now == 4)
        return records

    for spoil in (without, more, late, unknown):
        assert spoilt_epochs(group, spoil)[0] is False


def test_two_omissions_do_not_make_up_for_two_repetitions(group: Group) -> None:
    """Two ids that stand in for others and have the same sum: the sum is of hashes."""

    def even_out(now: int, records: np.ndarray) -> np.ndarray:
        if now == 0:
            records[0, 1] += 1
            records[1, 1] -= 1
        return records

    assert spoilt_epochs(group, even_out)[0] is False


# --- against what the recipe says ----------------------------------------------------------------------------------


def test_a_steps_digest_is_what_verify_computes_from_the_recipe_alone(group: Group, digits: Split) -> None:
    recipe = load_recipe("digits", ["input.flip=true", "seed=9"])
    order = Order(recipe.seed, len(digits), recipe.batch.size, recipe.batch.micro)
    steps = range(21, 24)  # over the border of two epochs
    assert order.epoch_of(steps[0]) < 1 < order.epoch_of(steps[-1] + 1)
    recorder = Recorder(Ledger.empty(order, 21))
    for step, micro in Work(21, 24, range(recipe.batch.num_micro)):
        recorder.record(step, micro, records_of(recipe, order, digits.sizes, step, micro))
    found = recorder.merge(order, 24, group).steps.numpy().view(np.uint64).tolist()
    assert found[21:] == [verify.step_digest(recipe, order, digits, step) for step in steps]
    other = load_recipe("digits", ["input.flip=true", "seed=10"])
    assert found[21] != verify.step_digest(other, order, digits, 21)  # other crops of the same samples


def test_what_came_through_the_pipeline_beside_the_pixels_verifies(group: Group, digits: Split) -> None:
    recipe = load_recipe("digits", ["batch={size: 100, micro: 25}"])
    order = Order(recipe.seed, len(digits), 100, 25)
    steps = 2 * len(digits) // 100
    work = Work(0, steps, range(4))
    recorder = Recorder(Ledger.empty(order, 0))
    for (step, micro), batch in zip(work, training_batches(digits, recipe.input, order, work, CPU, 1), strict=True):
        recorder.record(step, micro, batch.records)
    ledger = recorder.merge(order, steps, group)
    assert findings(order, ledger, steps) == [True, True]
    finding = verify._check_steps(recipe, order, digits, ledger, None)
    assert finding.holds and finding.figures == f"{steps} steps"
    ledger.steps[7] += 1
    finding = verify._check_steps(recipe, order, digits, ledger, None)
    assert not finding.holds and finding.figures == "1 steps differ, the first is 7"


@given(st.integers(1, 500), st.integers(1, 100), st.integers(0, 50))
def test_epochs_touched_are_those_of_which_the_stream_gave_a_sample(samples: int, size: int, steps: int) -> None:
    order = Order(0, samples, size, size)
    reached = np.arange(steps * size) // samples
    assert order.epochs_touched(steps) == len(np.unique(reached))
    empty = Ledger.empty(order, steps)
    assert empty.steps.shape == (steps,) and empty.epochs.shape == (order.epochs_touched(steps), 2)


def test_a_ledger_may_be_merged_before_the_first_step(group: Group) -> None:
    _, order, _ = small_run(seed=0, samples=10, micros=1)
    assert same(Recorder(Ledger.empty(order, 0)).merge(order, 0, group), Ledger.empty(order, 0))
