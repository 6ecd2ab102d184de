"""Which sample is seen when: a pure function of (seed, position), O(1) to seek anywhere.

Training reads one endless stream of samples: epoch 0 in its shuffled order, then epoch 1 in another, and so on. Step s
takes positions [s * size, (s + 1) * size), micro-batch m of it the m-th equal part. Batches run over the border of two
epochs, so every epoch uses every sample exactly once although `size` need not divide their number.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.philox import mix64, philox

_ROUNDS = 8


@dataclass(frozen=True)
class Order:
    """The order of a run.

    Attributes:
        seed: the recipe's seed.
        num_samples: size of the training split.
        batch_size: samples a step.
        micro_size: samples a micro-batch; divides `batch_size`.
    """

    seed: int
    num_samples: int
    batch_size: int
    micro_size: int

    def micro_batch(self, step: int, micro: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The samples of one micro-batch: (epochs, sample ids), each int64 of shape [micro_size]."""
        first = step * self.batch_size + micro * self.micro_size
        positions = np.arange(first, first + self.micro_size, dtype=np.int64)
        return self.at(positions)

    def at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(epochs, sample ids) at positions of the endless stream, any shape."""
        epochs = positions // self.num_samples
        within = positions % self.num_samples
        ids = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = permute(self.seed, int(epoch), within[here], self.num_samples)
        return epochs, ids

    def epoch_of(self, step: int) -> float:
        """How many epochs have been consumed before `step`."""
        return step * self.batch_size / self.num_samples


def permute(seed: int, epoch: int, index: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """The places of `index` in a pseudo-random permutation of range(size) that (seed, epoch) names.

    A generalised Feistel network over a square that just covers `size` (Black & Rogaway 2002, *Ciphers with arbitrary
    finite domains*): points that fall outside are walked on until they fall inside, which keeps it a bijection. No
    table is made, so that seeking costs nothing and memory does not grow with the data set.
    """
    side = math.isqrt(size - 1) + 1
    keys = philox(seed, (np.arange(_ROUNDS, dtype=np.uint64), epoch, 0, _ORDER_PURPOSE))
    round_keys = (keys[0] << np.uint64(32)) | keys[1]
    values = np.array(index, dtype=np.uint64)
    outside = np.arange(values.size)
    flat = values.reshape(-1)
    while outside.size:
        flat[outside] = _feistel(flat[outside], np.uint64(side), round_keys)
        outside = outside[flat[outside] >= size]
    return flat.reshape(values.shape).astype(np.int64)


_ORDER_PURPOSE = 0xFFFF_FFFF  # apart from every purpose that `augment` draws for


def _feistel(values: NDArray[np.uint64], side: np.uint64, round_keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    left, right = values // side, values % side
    for key in round_keys:
        left, right = right, (left + mix64(right ^ key) % side) % side
    return left * side + right
