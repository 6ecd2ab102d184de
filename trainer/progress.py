"""When things are due, and what the loop has measured since it last said so."""

import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from configs.duration import Duration
from trainer.group import Group


def is_due(every: Duration, step: int, batch_size: int, num_samples: int) -> bool:
    """Whether a multiple of `every` was reached by the `step`-th update (counted from 1). A pure function."""
    return multiples(every, step, batch_size, num_samples) > multiples(every, step - 1, batch_size, num_samples)


def multiples(every: Duration, step: int, batch_size: int, num_samples: int) -> int:
    """How many multiples of `every` the first `step` updates have reached. A pure function."""
    return int(step * batch_size / every.samples(batch_size, num_samples) + 1e-9)


@dataclass
class Window:
    """Sums since the last report; tensors stay on the device, so that no step waits for it."""

    group: Group
    num_micro: int
    batch_size: int
    steps: int = 0
    data_wait_seconds: float = 0.0
    num_substitutes: int = 0
    paused_seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)
    _sums: torch.Tensor | None = None

    def add(self, sums: torch.Tensor) -> None:
        """Add a micro-batch's float64 [2]: mean loss, number correct."""
        self._sums = sums if self._sums is None else self._sums + sums

    def report(self) -> dict[str, float]:
        """Means over the whole batch and all ranks since the last report, which starts a new window; called by all
        ranks together. `images_per_second` leaves out evaluation and waiting for checkpoints; `data_wait_seconds`
        is the slowest worker's, a step; `num_substitutes` counts images shown in the place of damaged ones."""
        assert self._sums is not None
        dist.all_reduce(self._sums, group=self.group.gradients)
        loss, correct = self._sums.tolist()
        waits, substitutes = zip(*self.group.gather((self.data_wait_seconds, self.num_substitutes)), strict=True)
        waited = max(waits)  # the slowest worker sets the pace of all
        seconds = time.monotonic() - self.began - self.paused_seconds
        figures = {
            "loss": loss / (self.num_micro * self.steps),
            "train_top1": correct / (self.batch_size * self.steps),
            "images_per_second": self.batch_size * self.steps / seconds,
            "step_seconds": seconds / self.steps,
            "data_wait_seconds": waited / self.steps,
            "num_substitutes": sum(substitutes),
        }
        self.num_substitutes = 0
        self.steps, self.data_wait_seconds, self.paused_seconds, self._sums = 0, 0.0, 0.0, None
        self.began = time.monotonic()
        return figures
