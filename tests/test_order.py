"""Which sample is seen when, and who computes it: pure functions, so that millions of cases can be tried."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order import Order, WindowedOrder, permute
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
    """Global and windowed orders, these over shards of any sizes."""
    micro, count = draw(st.integers(1, 17)), draw(st.integers(1, 6))
    if draw(st.booleans()):
        return Order(draw(SEEDS), draw(st.integers(1, most)), micro * count, micro)
    return draw(windowed_orders(most, micro * count, micro))


@st.composite
def windowed_orders(draw: st.DrawFn, most: int = 400, size: int = 12, micro: int = 4) -> WindowedOrder:
    rows = tuple(draw(st.lists(st.integers(1, max(most // 20, 1)), min_size=1, max_size=20)))
    return WindowedOrder(draw(SEEDS), sum(rows), size, micro, rows, draw(st.integers(1, len(rows) + 2)))


def order_of(seed: int, size: int, batch: int, micro: int, windowed: bool) -> Order:
    """A global order, or one of windows of 64 shards of 1,183 samples (the last has fewer)."""
    if not windowed:
        return Order(seed, size, batch, micro)
    rows = (1_183,) * (size // 1_183) + ((size % 1_183,) if size % 1_183 else ())
    return WindowedOrder(seed, size, batch, micro, rows, 64)


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
            other = stream(replace(order, micro_size=micro), 3)
            assert np.array_equal(other, expected)


@given(orders(), st.integers(0, 10**6))
def test_seeking_does_not_depend_on_what_was_read_before(order: Order, step: int) -> None:
    order.micro_batch(step + 1, 0)
    epochs, ids = order.micro_batch(step, 0)
    again = replace(order)  # with nothing remembered
    assert np.array_equal(again.micro_batch(step, 0), (epochs, ids))
    assert np.array_equal(epochs, (step * order.batch_size + np.arange(order.micro_size)) // order.num_samples)
    assert order.epoch_of(step) == pytest.approx(step * order.batch_size / order.num_samples)


@settings(max_examples=10)
@given(SEEDS, st.integers(1, 8), st.integers(50_000, 14_200_000), st.booleans(), st.integers(1, 4_096), st.data())
def test_the_micro_batches_of_any_number_of_workers_are_the_stream(
    seed: int, micro: int, size: int, windowed: bool, world_size: int, data: st.DataObject
) -> None:
    order = order_of(seed, size, 4_096 * micro, micro, windowed)
    step = data.draw(st.integers(0, 10**6))
    epochs, ids = order.at(np.arange(step * order.batch_size, (step + 1) * order.batch_size))
    shares = [deal(4_096, world_size, rank) for rank in range(world_size)]
    assert [number for share in shares for number in share] == list(range(4_096))
    for rank in {0, world_size - 1, data.draw(st.integers(0, world_size - 1))}:
        for number in {shares[rank][0], shares[rank][-1]}:
            here = slice(number * micro, (number + 1) * micro)
            assert np.array_equal(order.micro_batch(step, number), (epochs[here], ids[here]))


IMAGENET_21K = 14_197_122


@pytest.mark.parametrize("windowed", [False, True])
def test_a_seek_in_fourteen_million_samples_makes_no_table_of_them(windowed: bool) -> None:
    """ImageNet-21k: a table of the epoch would take 108 MiB; a micro-batch takes some KiB, and a table of 12,000
    shards some hundred."""
    order = order_of(0, IMAGENET_21K, 4_096, 128, windowed)
    replace(order).micro_batch(0, 0)
    tracemalloc.start()
    try:
        drawn = [order.micro_batch(step, 31) for step in (0, 3_466, 5_000_000)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < (4 if windowed else 1) * 2**20
    assert drawn[1][0].tolist() == [1] * 128 and drawn[2][0][0] == 5_000_000 * 4_096 // IMAGENET_21K
    assert all(((ids >= 0) & (ids < order.num_samples)).all() and len(set(ids.tolist())) == 128 for _, ids in drawn)


def test_the_order_of_a_seed_is_what_it_was() -> None:
    """Checkpoints of old runs go on with it; a change of it ends every run under way."""
    epochs, ids = Order(1, 1_281_167, 256, 8).micro_batch(5_004, 19)
    assert epochs.tolist() == [1, 1, 1, 1, 1, 1, 1, 1]
    assert ids.tolist() == [713308, 247079, 924189, 129501, 1188041, 1145200, 228556, 1045841]
    assert whole(0, 0, 10).tolist() == [5, 1, 2, 9, 0, 4, 7, 8, 3, 6]


# --- windows -----------------------------------------------------------------------------------------------------


def samples_of(order: WindowedOrder, shards: tuple[int, ...]) -> np.ndarray:
    """The ids of all samples of some shards, sorted."""
    ends = np.cumsum(order.shard_rows)
    return np.sort(np.concatenate([np.arange(ends[s] - order.shard_rows[s], ends[s]) for s in shards]))


@settings(max_examples=60)
@given(windowed_orders(), st.integers(0, 30), st.integers(0, 30))
def test_windows_are_read_one_after_the_other_each_whole(order: WindowedOrder, first: int, steps: int) -> None:
    windows = list(order.windows(0, 60))
    ends = np.cumsum([len(samples_of(order, window)) for window in windows])
    _, ids = order.at(np.arange(ends[-1]))
    begin = 0
    for window, end in zip(windows, ends.tolist(), strict=True):
        assert len(window) <= order.shards_per_window
        assert np.array_equal(np.sort(ids[begin:end]), samples_of(order, window))
        begin = end
    low, high = first * order.batch_size, (first + steps) * order.batch_size
    begins = [0, *ends[:-1].tolist()]
    needed = [w for w, b, e in zip(windows, begins, ends.tolist(), strict=True) if steps and b < high and e > low]
    assert list(order.windows(first, first + steps)) == needed


@given(windowed_orders())
def test_an_epoch_has_as_few_windows_as_can_be_of_nearly_the_same_number_of_shards(order: WindowedOrder) -> None:
    epoch_steps = -(-order.num_samples // order.batch_size)
    sizes, shards = [], 0
    for window in order.windows(0, epoch_steps):
        if shards < len(order.shard_rows):
            sizes.append(len(window))
            shards += len(window)
    assert shards == len(order.shard_rows)
    assert len(sizes) == -(-shards // order.shards_per_window) and max(sizes) - min(sizes) <= 1


@given(windowed_orders())
def test_a_window_of_all_shards_is_another_shuffle_than_the_global_one(order: WindowedOrder) -> None:
    whole_window = replace(order, shards_per_window=len(order.shard_rows))
    ids = whole_window.at(np.arange(order.num_samples))[1]
    assert np.array_equal(np.sort(ids), np.arange(order.num_samples))
    if order.num_samples > 60:
        global_ids = Order(order.seed, order.num_samples, 4, 4).at(np.arange(order.num_samples))[1]
        assert (ids == global_ids).sum() < 20


def test_shards_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="7 samples in the shards, not 8"):
        WindowedOrder(0, 8, 4, 2, (3, 4), 1)


def test_the_windowed_order_of_a_seed_is_what_it_was() -> None:
    order = WindowedOrder(1, 1_281_167, 256, 8, (1_165,) * 1_099 + (832,), 64)
    epochs, ids = order.micro_batch(5_004, 19)
    assert epochs.tolist() == [1, 1, 1, 1, 1, 1, 1, 1]
    assert ids.tolist() == [1132468, 450625, 245275, 653776, 271196, 862627, 534323, 1169739]
    assert next(order.windows(5_004, 5_005))[:5] == (189, 282, 774, 127, 305)


# --- how random a windowed order is ------------------------------------------------------------------------------
# The formulas are derived in docs/data-remote.md.

SHARDS, ROWS, WINDOW, BATCH = 60, 50, 6, 30
EPOCHS = 60


def shuffled_epochs(window: int | None) -> np.ndarray:
    """Sample ids, [EPOCHS, batches, BATCH], of the windowed (None: the global) order; batches divide windows."""
    size = SHARDS * ROWS
    order = Order(9, size, BATCH, BATCH)
    if window is not None:
        order = WindowedOrder(9, size, BATCH, BATCH, (ROWS,) * SHARDS, window)
    return order.at(np.arange(EPOCHS * size))[1].reshape(EPOCHS, -1, BATCH)


@pytest.mark.parametrize("window", [None, WINDOW, 20, SHARDS])
def test_two_of_a_batch_come_from_one_shard_as_often_as_derived(window: int | None) -> None:
    shards = shuffled_epochs(window) // ROWS
    counts = np.apply_along_axis(np.bincount, 2, shards, minlength=SHARDS)
    pairs = (counts * (counts - 1) / 2).sum(axis=2) / (BATCH * (BATCH - 1) / 2)
    expected = (ROWS - 1) / ((window or SHARDS) * ROWS - 1)
    assert abs(pairs.mean() - expected) < 5 * pairs.std() / np.sqrt(pairs.size)


def test_any_two_shards_share_a_window_equally_often() -> None:
    together = np.zeros((SHARDS, SHARDS))
    order = WindowedOrder(4, SHARDS, 1, 1, (1,) * SHARDS, WINDOW)
    epochs = 2_000
    for window in order.windows(0, epochs * SHARDS):
        together[np.ix_(window, window)] += 1
    pairs = together[np.triu_indices(SHARDS, 1)]
    expected = epochs * (WINDOW - 1) / (SHARDS - 1)
    assert pairs.mean() == pytest.approx(expected)
    # Each count is binomial, so its variance is a little below its mean.
    assert chi_square_excess(pairs) < 5


def test_a_sample_comes_up_anywhere_in_an_epoch_but_near_its_shards_others() -> None:
    places = np.argsort(shuffled_epochs(WINDOW).reshape(EPOCHS, -1), axis=1)  # [epoch, sample] -> place
    counts, _ = np.histogram(places[:, ::7], bins=20, range=(0, SHARDS * ROWS))
    # Whole shards move together, so there are 60 * 60 independent places, each counted several times.
    assert chi_square_excess(counts / (counts.sum() / (EPOCHS * SHARDS))) < 5
    mates = places.reshape(EPOCHS, SHARDS, ROWS)
    distances = np.abs(mates[:, :, 0] - mates[:, :, 1])
    assert distances.max() < WINDOW * ROWS
    assert np.ptp(mates, axis=2).max() > 0.95 * WINDOW * ROWS
    # Of two random places among w, the mean distance is (w + 1) / 3.
    assert abs(distances.mean() - (WINDOW * ROWS + 1) / 3) < 5 * distances.std() / np.sqrt(distances.size)


def label_statistic(batches: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """The chi-square statistic of each batch's labels against equal shares."""
    counts = np.apply_along_axis(np.bincount, 2, labels[batches], minlength=classes)
    expected = BATCH / classes
    return ((counts - expected) ** 2 / expected).sum(axis=2)


@pytest.mark.parametrize("window", [None, WINDOW, 20])
def test_labels_shuffled_at_ingest_fall_into_batches_as_under_the_global_order(window: int | None) -> None:
    classes, size = 20, SHARDS * ROWS
    labels = np.random.default_rng(1).permutation(np.arange(size) % classes)
    statistic = label_statistic(shuffled_epochs(window), labels, classes)
    expected = (classes - 1) * (size - BATCH) / (size - 1)
    assert statistic.mean() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("window", [None, WINDOW, 20])
def test_sorted_labels_are_as_uneven_as_derived(window: int | None) -> None:
    classes, size = 20, SHARDS * ROWS
    labels = np.arange(size) * classes // size
    statistic = label_statistic(shuffled_epochs(window), labels, classes)
    w, own = window or SHARDS, SHARDS // classes
    squares = (1 + (w - 1) * (own - 1) / (SHARDS - 1)) / w  # of the classes' shares in a window
    spread = classes * (1 - squares) * (w * ROWS - BATCH) / (w * ROWS - 1)
    assert statistic.mean() == pytest.approx(spread + BATCH * (classes * squares - 1), rel=0.02)


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
