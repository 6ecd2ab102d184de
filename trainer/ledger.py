"""The exactly-once ledger: evidence, carried in every checkpoint, of which samples were used and how.

Two things are kept, both sums modulo 2**64, so that neither the number of workers nor who did what can be seen in them:

* for each epoch, how many samples were used and the sum of a hash of each: equal to that of the whole training split
  exactly when every sample was used once (but for a chance of about 2**-64). It is checked without knowing the order.
* for each step, a digest of its records (epoch, sample, crop box, flip, sample shown) at their places in the batch: two
  runs with equal digests saw the same crops of the same samples in the same micro-batches.

A damaged sample for which another was shown counts as used, and stands in a list of its own.

What is recorded has come out of the input pipeline beside the pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from data_pipeline.order import Order
from data_pipeline.philox import U64, mix64
from data_pipeline.records import EPOCH, SAMPLE, substitutes
from trainer.group import Group

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def sample_hashes(epochs: NDArray[np.int64], ids: NDArray[np.int64]) -> U64:
    """A 64-bit hash of each (epoch, sample id)."""
    return mix64(mix64(ids.astype(np.uint64) + _GOLDEN) ^ (epochs.astype(np.uint64) * _GOLDEN))


def micro_digest(micro: int, records: NDArray[np.int64]) -> int:
    """The digest of one micro-batch's records, int64 [n, columns]; a step's digest is the sum of its micro-batches'."""
    place = np.arange(len(records), dtype=np.uint64) + np.uint64(micro << 32)
    rows = mix64(place + _GOLDEN)
    for column in records.T:
        rows = mix64(rows ^ (column.astype(np.uint64) + _GOLDEN))
    return int(rows.sum(dtype=np.uint64))


@dataclass
class Ledger:
    """The ledger of a run up to some step.

    Attributes:
        steps: int64 [num_steps], the digest of each step.
        epochs: int64 [epochs touched, 2], number of samples used and the sum of their hashes.
        substitutes: int64 [number, 3], (epoch, sample, sample shown in its place), in ascending order.
    """

    steps: torch.Tensor
    epochs: torch.Tensor
    substitutes: torch.Tensor

    @classmethod
    def empty(cls, order: Order, steps: int, num_substitutes: int = 0) -> "Ledger":
        """Zeros, of the shape that a checkpoint at `steps` has."""
        shapes = (steps,), (order.epochs_touched(steps), 2), (num_substitutes, 3)
        return cls(*(torch.zeros(shape, dtype=torch.int64) for shape in shapes))

    def state(self) -> dict[str, torch.Tensor]:
        """The ledger's part of a checkpoint."""
        return {
            "ledger.steps": self.steps,
            "ledger.epochs": self.epochs,
            "ledger.substitutes": self.substitutes,
        }


class Recorder:
    """Collects what this rank has used, until a checkpoint merges it with the other ranks'."""

    def __init__(self, ledger: Ledger) -> None:
        self._merged = ledger
        self._first = len(ledger.steps)
        self._digests: list[int] = []
        self._epochs: dict[int, tuple[int, int]] = {}
        self._substitutes: list[list[int]] = []

    def record(self, step: int, micro: int, records: NDArray[np.int64]) -> None:
        """Note one micro-batch; `records` is int64 [n, 8] (`data_pipeline.records`)."""
        place = step - self._first
        self._digests.extend([0] * (place + 1 - len(self._digests)))
        self._digests[place] = (self._digests[place] + micro_digest(micro, records)) % 2**64
        epochs = records[:, EPOCH]
        hashes = sample_hashes(epochs, records[:, SAMPLE])
        self._substitutes += substitutes(records).tolist()
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            count, total = self._epochs.get(epoch, (0, 0))
            self._epochs[epoch] = (
                count + int(here.sum()),
                (total + int(hashes[here].sum(dtype=np.uint64))) % 2**64,
            )

    def merge(self, order: Order, step: int, group: Group) -> Ledger:
        """The ledger after `step` steps, the same on every rank; called by all ranks together."""
        own = Ledger.empty(order, step)
        old = self._merged
        new = [row for rows in group.gather(self._substitutes) for row in rows]
        own.substitutes = torch.tensor(sorted(old.substitutes.tolist() + new), dtype=torch.int64).reshape(-1, 3)
        own.steps[self._first :] = _signed(self._digests)
        for epoch, (count, total) in self._epochs.items():
            own.epochs[epoch] = _signed([count, total])
        for tensor in (own.steps[self._first :], own.epochs):  # of the steps only what is new: there may be 600,000
            dist.all_reduce(tensor, group=group.control)
        own.steps[: self._first] = old.steps
        own.epochs[: len(old.epochs)] += old.epochs
        self._merged, self._first, self._digests, self._epochs, self._substitutes = own, step, [], {}, []
        return own


def _signed(values: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.uint64).view(np.int64))
