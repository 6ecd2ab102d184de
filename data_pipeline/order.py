"""Which sample is seen when: a pure function of (seed, position), O(1) to seek anywhere.

Training reads one endless stream of samples: epoch 0 in its shuffled order, then epoch 1 in another, and so on. Step s
takes positions [s * size, (s + 1) * size), micro-batch m of it the m-th equal part. Batches run over the border of two
epochs, so every epoch uses every sample exactly once although `size` need not divide their number.

With repeated augmentation (Hoffer et al. 2020, arXiv 1901.09335; Berman et al. 2019, arXiv 1902.05509; torchvision's
RASampler) R epochs, a round, are under way together: they share one shuffled order, and each sample of it stands R
times in a row in the stream, once for each epoch of the round. So copies differ in their augmentation, which is a
function of the epoch, and every epoch still uses every sample exactly once. The copies in a step go to different
micro-batches, as torchvision's go to different GPUs, so that batch norm does not see a sample twice.

Two orders: `Order` shuffles a whole epoch at once; `WindowedOrder` keeps to a few shards at a time, for data that has
to be fetched shard by shard.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from configs import Recipe
from configs.schema import WindowedShuffle
from data_pipeline.philox import mix64, philox

_ROUNDS = 8
_GLOBAL, _SHARDS, _WINDOW = 0xFFFF_FFFF, 0xFFFF_FFFD, 0xFFFF_FFFC  # apart from what anything else draws for


@dataclass(frozen=True)
class Order:
    """The order of a run: each epoch is one permutation of all samples.

    Attributes:
        seed: the recipe's seed.
        num_samples: size of the training split.
        batch_size: samples a step.
        micro_size: samples a micro-batch; divides `batch_size`.
        repeats: R, the epochs of a round; round k has the epochs k R to k R + R - 1.
    """

    seed: int
    num_samples: int
    batch_size: int
    micro_size: int
    repeats: int = field(default=1, kw_only=True)

    def micro_batch(self, step: int, micro: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The samples of one micro-batch: (epochs, sample ids), each int64 of shape [micro_size].

        Without repeats it is a run of consecutive positions; with them every M-th, M being the number of micro-batches
        in a step, so that neighbours in the stream are apart.
        """
        if self.repeats == 1:
            first, stride = step * self.batch_size + micro * self.micro_size, 1
        else:
            first, stride = step * self.batch_size + micro, self.batch_size // self.micro_size
        return self.at(first + stride * np.arange(self.micro_size, dtype=np.int64))

    def at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(epochs, sample ids) at positions of the endless stream, any shape."""
        places, repeats = positions // self.repeats, positions % self.repeats
        rounds, within = places // self.num_samples, places % self.num_samples
        ids = np.empty_like(positions)
        for number in np.unique(rounds):
            here = rounds == number
            ids[here] = self._shuffle(int(number), within[here])
        return rounds * self.repeats + repeats, ids

    def epoch_of(self, step: int) -> float:
        """How many epochs have been consumed before `step`: samples used, in units of the training split."""
        return step * self.batch_size / self.num_samples

    def epochs_touched(self, steps: int) -> int:
        """The number of epochs of which at least one sample has been used after `steps` steps: those before it."""
        rounds, rest = divmod(steps * self.batch_size, self.num_samples * self.repeats)
        return rounds * self.repeats + min(rest, self.repeats)

    def used(self, epoch: int, steps: int) -> int:
        """How many samples of an epoch have been used after `steps` steps: its first ones."""
        number, repeat = divmod(epoch, self.repeats)
        positions = steps * self.batch_size - number * self.num_samples * self.repeats
        return min(max(-(-(positions - repeat) // self.repeats), 0), self.num_samples)

    def first_of(self, epoch: int, count: int) -> NDArray[np.int64]:
        """The sample ids that an epoch uses first, int64 [count], in its order."""
        return self._shuffle(epoch // self.repeats, np.arange(count, dtype=np.int64))

    def _shuffle(self, number: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples at some places, int64 [n], of a round (without repeats, an epoch)."""
        return permute(self.seed, number, places, self.num_samples)


@dataclass(frozen=True)
class WindowedOrder(Order):
    """An order that reads a few shards at a time: each epoch (with repeats, each round) permutes the shards,
    consecutive groups of at most `shards_per_window` of them, as equal as can be, form windows, and inside a window all
    samples are permuted.

    How random that is, and which window to choose, stands in docs/data-remote.md. A table of the shards is made for
    each epoch; nothing grows with the number of samples.

    Attributes:
        shard_rows: the number of samples of each shard, `num_samples` in all.
        shards_per_window: W; with as many as there are shards, an epoch is one window.
    """

    shard_rows: tuple[int, ...]
    shards_per_window: int
    _table: "Callable[[int], _Round]" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if sum(self.shard_rows) != self.num_samples:
            raise ValueError(f"{sum(self.shard_rows)} samples in the shards, not {self.num_samples}")
        object.__setattr__(self, "_table", lru_cache(maxsize=4)(self._make_table))

    def windows(self, first_step: int, last_step: int) -> Iterator[tuple[int, ...]]:
        """The shards of each window that steps [first_step, last_step) read, in the order of reading."""
        place = first_step * self.batch_size // self.repeats
        end = -(-last_step * self.batch_size // self.repeats) if last_step > first_step else place
        while place < end:
            number, within = divmod(place, self.num_samples)
            table = self._table(number)
            window = int(np.searchsorted(table.window_ends, within, side="right"))
            yield tuple(table.shards[table.edges[window] : table.edges[window + 1]].tolist())
            place = number * self.num_samples + int(table.window_ends[window])

    def _make_table(self, number: int) -> "_Round":
        rows = np.array(self.shard_rows, dtype=np.int64)
        shards = permute(self.seed, number, np.arange(len(rows)), len(rows), _SHARDS)
        ends = np.cumsum(rows[shards])
        num_windows = -(-len(rows) // self.shards_per_window)
        edges = np.arange(num_windows + 1) * len(rows) // num_windows
        return _Round(shards, ends, np.cumsum(rows)[shards] - ends, edges, ends[edges[1:] - 1])

    def _shuffle(self, number: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        table = self._table(number)
        window_of = np.searchsorted(table.window_ends, places, side="right")
        ids = np.empty_like(places)
        for window in np.unique(window_of).tolist():
            here = window_of == window
            first = int(table.window_ends[window - 1]) if window else 0
            size = int(table.window_ends[window]) - first
            # Places in the round whose shards lie in their permuted order, unshuffled within.
            lined_up = first + permute(self.seed, number, places[here] - first, size, _WINDOW, window)
            shard = np.searchsorted(table.ends, lined_up, side="right")
            ids[here] = lined_up + table.shifts[shard]
        return ids


@dataclass(frozen=True)
class _Round:
    """The table of a round (without repeats, an epoch), all int64.

    Attributes:
        shards: [num_shards], their numbers in the round's order.
        ends: [num_shards], the place after the last sample of each.
        shifts: [num_shards], what leads from a place in each, unshuffled, to its sample id.
        edges: [num_windows + 1], the index in `shards` at which each window begins, and the end.
        window_ends: [num_windows], the place after the last sample of each.
    """

    shards: NDArray[np.int64]
    ends: NDArray[np.int64]
    shifts: NDArray[np.int64]
    edges: NDArray[np.int64]
    window_ends: NDArray[np.int64]


def build_order(recipe: Recipe, shard_rows: Sequence[int]) -> Order:
    """The order that a recipe asks for, of a training split whose shards have so many samples each."""
    sizes, repeats = (recipe.seed, sum(shard_rows), recipe.batch.size, recipe.batch.micro), recipe.order.repeats
    if isinstance(recipe.order, WindowedShuffle):
        return WindowedOrder(*sizes, tuple(shard_rows), recipe.order.shards, repeats=repeats)
    return Order(*sizes, repeats=repeats)


def permute(
    seed: int, epoch: int, index: NDArray[np.int64], size: int, purpose: int = _GLOBAL, part: int = 0
) -> NDArray[np.int64]:
    """The places of `index` in a pseudo-random permutation of range(size) that (seed, epoch, purpose, part) names.

    A generalised Feistel network over a square that just covers `size` (Black & Rogaway 2002, *Ciphers with arbitrary
    finite domains*): points that fall outside are walked on until they fall inside, which keeps it a bijection. No
    table is made, so that seeking costs nothing and memory does not grow with the data set.
    """
    side = math.isqrt(size - 1) + 1
    keys = philox(seed, (np.arange(_ROUNDS, dtype=np.uint64), epoch, part, purpose))
    round_keys = (keys[0] << np.uint64(32)) | keys[1]
    values = np.array(index, dtype=np.uint64)
    outside = np.arange(values.size)
    flat = values.reshape(-1)
    while outside.size:
        flat[outside] = _feistel(flat[outside], np.uint64(side), round_keys)
        outside = outside[flat[outside] >= size]
    return flat.reshape(values.shape).astype(np.int64)


def _feistel(values: NDArray[np.uint64], side: np.uint64, round_keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    left, right = values // side, values % side
    for key in round_keys:
        left, right = right, (left + mix64(right ^ key) % side) % side
    return left * side + right
