"""Which sample is seen when, and who computes it: pure functions, so that millions of cases can be tried."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order import Order, permute
from data_pipeline.philox import mix64, philox, uniforms
from trainer.dealing import Work, deal

SEEDS = st.integers(0, 2**63 - 1)

# --- Philox ------------------------------------------------------------------------------------------------------

# Random123, tests/kat_vectors, "philox4x32 10".
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def key_of(text: str) -> int:
    """The two 32-bit key words of Random123 as one 64-bit key, low word first."""
    low, high = words(text)
    return low | high << 32


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_random123s_known_answers(counter: str, key: str, answer: str) -> None:
    c0, c1, c2, c3 = words(counter)
    assert [int(word) for word in philox(key_of(key), (c0, c1, c2, c3))] == words(answer)


@pytest.mark.parametrize("key", [key_of(key) for _, key, _ in KNOWN_ANSWERS])
def test_philox_of_many_counters_is_philox_of_each(key: int) -> None:
    counters = np.array([words(counter) for counter, _, _ in KNOWN_ANSWERS], np.uint64)
    together = np.stack(philox(key, tuple(counters.T)), axis=1)  # type: ignore[arg-type]
    alone = [[int(word) for word in philox(key, tuple(map(int, row)))] for row in counters]  # type: ignore[arg-type]
    assert together.tolist() == alone


@given(SEEDS, st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1), st.integers(0, 2**48 - 9))
def test_uniforms_stay_in_the_half_open_interval_and_belong_to_one_sample(
    key: int, epoch: int, purpose: int, first: int
) -> None:
    ids = np.arange(first, first + 8, dtype=np.uint64)
    drawn = uniforms(key, epoch, ids, purpose)
    assert drawn.shape == (8, 4) and drawn.dtype == np.float64
    assert (drawn >= 0).all() and (drawn < 1).all()
    assert np.array_equal(uniforms(key, epoch, ids[5:6], purpose), drawn[5:6])
    assert np.array_equal(uniforms(key, np.full(8, epoch, np.uint64), ids, purpose), drawn)
    for other in ((key ^ 1, epoch, purpose), (key, epoch + 1, purpose), (key, epoch, purpose + 1)):
        assert not np.array_equal(uniforms(other[0], other[1], ids, other[2]), drawn)


def test_uniforms_have_the_moments_of_uniforms_and_do_not_hang_together() -> None:
    drawn = uniforms(1, 0, np.arange(200_000, dtype=np.uint64), 1)
    standard_error = np.sqrt(1 / 12 / len(drawn))
    assert np.abs(drawn.mean(axis=0) - 0.5).max() < 5 * standard_error
    assert np.abs(drawn.var(axis=0) - 1 / 12).max() < 5 * np.sqrt(1 / 180 / len(drawn))
    assert np.abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 5 / np.sqrt(len(drawn))
    # Neighbouring ids, the same ids in the next epoch, under the next purpose and with the next key:
    ids = np.arange(200_000, dtype=np.uint64)
    for other in (uniforms(1, 0, ids + np.uint64(1), 1), uniforms(1, 1, ids, 1), uniforms(1, 0, ids, 2)):
        assert abs(np.corrcoef(drawn[:, 0], other[:, 0])[0, 1]) < 5 / np.sqrt(len(drawn))
    counts, _ = np.histogram(drawn, bins=256, range=(0, 1))
    assert chi_square_excess(counts) < 5


def test_mix64_is_one_to_one_on_a_million_neighbours_and_moves_half_the_bits() -> None:
    values = mix64(np.arange(1_000_000, dtype=np.uint64))
    assert len(np.unique(values)) == 1_000_000
    flipped = np.bitwise_count(values[::2] ^ values[1::2])
    assert abs(flipped.mean() - 32) < 0.1


def chi_square_excess(counts: np.ndarray) -> float:
    """How many standard deviations the chi-square statistic of cells that should be equal lies above its mean."""
    expected = counts.sum() / counts.size
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.size - 1
    return float((statistic - freedom) / np.sqrt(2 * freedom))


# --- the permutation ---------------------------------------------------------------------------------------------


def whole(seed: int, epoch: int, size: int) -> np.ndarray:
    return permute(seed, epoch, np.arange(size, dtype=np.int64), size)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_permute_is_a_bijection_for_every_small_size(seed: int) -> None:
    for size in range(1, 301):
        assert np.array_equal(np.sort(whole(seed, 3, size)), np.arange(size)), size


@settings(max_examples=40)
@given(SEEDS, st.integers(0, 2**16 - 1), st.integers(1, 200_000))
def test_permute_is_a_bijection(seed: int, epoch: int, size: int) -> None:
    assert np.array_equal(np.bincount(whole(seed, epoch, size), minlength=size), np.ones(size, int))


@given(SEEDS, st.integers(0, 2**16 - 1), st.integers(100, 5_000))
def test_epochs_and_seeds_have_orders_of_their_own(seed: int, epoch: int, size: int) -> None:
    here = whole(seed, epoch, size)
    for other in (whole(seed, epoch + 1, size), whole(seed ^ 1, epoch, size), whole(seed ^ 2**62, epoch, size)):
        # Two random permutations agree in one place on average; in 20 or more about once in 10**18.
        assert (here == other).sum() < 20


@given(SEEDS, st.integers(1, 10**12), st.data())
def test_a_place_is_found_alone_as_it_is_among_others(seed: int, size: int, data: st.DataObject) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)), np.int64)
    together = permute(seed, 0, index, size)
    assert ((together >= 0) & (together < size)).all()
    assert [int(permute(seed, 0, index[i : i + 1], size)[0]) for i in range(len(index))] == together.tolist()


def test_permute_leaves_its_argument_alone_and_keeps_its_shape() -> None:
    index = np.arange(12, dtype=np.int64).reshape(3, 4)
    result = permute(0, 0, index, 12)
    assert np.array_equal(index, np.arange(12).reshape(3, 4)) and result.shape == (3, 4)


@pytest.mark.parametrize("size", [2, 3, 5, 10, 17])
def test_over_many_epochs_every_sample_stands_in_every_place_equally_often(size: int) -> None:
    epochs = 1_500
    counts = np.zeros((size, size), int)
    for epoch in range(epochs):
        counts[np.arange(size), whole(11, epoch, size)] += 1
    expected = epochs / size
    statistic = ((counts - expected) ** 2 / expected).sum() * (size - 1) / size
    freedom = (size - 1) ** 2
    assert (statistic - freedom) / np.sqrt(2 * freedom) < 5


@pytest.mark.parametrize("size", [3, 4])
def test_over_many_epochs_every_order_of_a_few_samples_comes_up(size: int) -> None:
    orders = np.array([whole(5, epoch, size) for epoch in range(2_400)])
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == {3: 6, 4: 24}[size]
    assert chi_square_excess(counts) < 6


@pytest.mark.parametrize("size", [1_797, 50_000, 250_001])
def test_neighbours_in_an_epoch_are_strangers_in_the_data(size: int) -> None:
    order = whole(0, 0, size).astype(float)
    bound = 5 / np.sqrt(size)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < bound
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < bound
    assert abs(np.corrcoef(order, whole(0, 1, size))[0, 1]) < bound


# --- the stream --------------------------------------------------------------------------------------------------


@st.composite
def orders(draw: st.DrawFn, most: int = 400) -> Order:
    micro, count = draw(st.integers(1, 17)), draw(st.integers(1, 6))
    return Order(draw(SEEDS), draw(st.integers(1, most)), micro * count, micro)


def stream(order: Order, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `steps` steps as training reads them: micro-batch by micro-batch."""
    micros = order.batch_size // order.micro_size
    parts = [order.micro_batch(step, micro) for step in range(steps) for micro in range(micros)]
    return np.concatenate([epochs for epochs, _ in parts]), np.concatenate([ids for _, ids in parts])


@settings(max_examples=50)
@given(orders(most=200))
def test_every_epoch_uses_every_sample_exactly_once_whatever_the_batch(order: Order) -> None:
    steps = -(-3 * order.num_samples // order.batch_size)
    epochs, ids = stream(order, steps)
    assert (np.diff(epochs) >= 0).all()
    for epoch in range(3):
        assert np.array_equal(np.sort(ids[epochs == epoch]), np.arange(order.num_samples))


@settings(max_examples=40)
@given(orders())
def test_a_batch_is_the_same_however_it_is_cut_into_micro_batches(order: Order) -> None:
    expected = stream(order, 3)
    for micro in range(1, order.batch_size + 1):
        if order.batch_size % micro == 0:
            other = stream(Order(order.seed, order.num_samples, order.batch_size, micro), 3)
            assert np.array_equal(other, expected)


@given(orders(), st.integers(0, 10**6))
def test_seeking_does_not_depend_on_what_was_read_before(order: Order, step: int) -> None:
    order.micro_batch(step + 1, 0)
    epochs, ids = order.micro_batch(step, 0)
    again = Order(order.seed, order.num_samples, order.batch_size, order.micro_size)
    assert np.array_equal(again.micro_batch(step, 0), (epochs, ids))
    assert np.array_equal(epochs, (step * order.batch_size + np.arange(order.micro_size)) // order.num_samples)
    assert order.epoch_of(step) == pytest.approx(step * order.batch_size / order.num_samples)


def test_a_seek_in_fourteen_million_samples_makes_no_table() -> None:
    """ImageNet-21k: 14,197,122 images. A table of the epoch would take 108 MiB; a micro-batch takes some KiB."""
    order = Order(0, 14_197_122, 4_096, 128)
    order.micro_batch(0, 0)
    tracemalloc.start()
    try:
        drawn = [order.micro_batch(step, 31) for step in (0, 3_466, 5_000_000)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20
    assert drawn[1][0].tolist() == [1] * 128 and drawn[2][0][0] == 5_000_000 * 4_096 // 14_197_122
    assert all(((ids >= 0) & (ids < order.num_samples)).all() and len(set(ids.tolist())) == 128 for _, ids in drawn)


def test_the_order_of_a_seed_is_what_it_was() -> None:
    """Checkpoints of old runs go on with it; a change of it ends every run under way."""
    epochs, ids = Order(1, 1_281_167, 256, 8).micro_batch(5_004, 19)
    assert epochs.tolist() == [1, 1, 1, 1, 1, 1, 1, 1]
    assert ids.tolist() == [713308, 247079, 924189, 129501, 1188041, 1145200, 228556, 1045841]
    assert whole(0, 0, 10).tolist() == [5, 1, 2, 9, 0, 4, 7, 8, 3, 6]


# --- who computes what -------------------------------------------------------------------------------------------


@given(st.integers(1, 4_096), st.data())
def test_dealing_gives_every_micro_batch_to_one_rank_in_order(world_size: int, data: st.DataObject) -> None:
    num_micro = data.draw(st.integers(world_size, 3 * 4_096))
    shares = [deal(num_micro, world_size, rank) for rank in range(world_size)]
    assert [micro for share in shares for micro in share] == list(range(num_micro))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1 and lengths == sorted(lengths, reverse=True)
    assert shares[0][0] == 0


@pytest.mark.parametrize(("num_micro", "world_size", "rank"), [(4, 5, 0), (4, 4, 4), (4, 2, -1), (0, 0, 0), (0, 1, 0)])
def test_what_cannot_be_dealt_is_refused(num_micro: int, world_size: int, rank: int) -> None:
    with pytest.raises(ValueError, match="cannot deal"):
        deal(num_micro, world_size, rank)


@given(st.integers(0, 10**6), st.integers(0, 20), st.integers(1, 12), st.data())
def test_the_work_of_a_rank_is_its_micro_batches_step_by_step(
    first: int, steps: int, num_micro: int, data: st.DataObject
) -> None:
    world_size = data.draw(st.integers(1, num_micro))
    micros = deal(num_micro, world_size, data.draw(st.integers(0, world_size - 1)))
    work = Work(first, first + steps, micros)
    expected = [(step, micro) for step in range(first, first + steps) for micro in micros]
    assert len(work) == len(expected)
    assert list(work) == expected and [work[i] for i in range(len(work))] == expected
    for outside in (len(work), -1):
        with pytest.raises(IndexError):
            work[outside]


def test_work_that_is_already_done_is_empty_and_long_work_takes_no_room() -> None:
    assert list(Work(5, 5, range(2))) == list(Work(7, 5, range(2))) == []
    work = Work(0, 600_000, range(8))
    assert (len(work), work[4_799_999]) == (4_800_000, (599_999, 7))
