"""What rank 0 tells the world: events.jsonl and TensorBoard."""

import math
from contextlib import suppress
from typing import Any

from trainer.rundir import Events, RunDirectory


class Telemetry:
    """Writes on rank 0, does nothing elsewhere."""

    def __init__(self, run: RunDirectory, attempt: int, from_step: int, enabled: bool) -> None:
        self._attempt = attempt
        self.events = Events(run, enabled)
        self._board: Any = None
        if enabled:
            from torch.utils.tensorboard import (
                SummaryWriter,
            )  # a second of importing that other ranks do without

            # What an interrupted attempt wrote past the checkpoint is not shown twice.
            self._board = SummaryWriter(str(run.tensorboard), purge_step=from_step + 1 if from_step else None)

    def event(self, event: str, **fields: Any) -> None:
        """One line in events.jsonl."""
        self.events.write(event, attempt=self._attempt, **fields)

    def step(self, step: int, total: int, epoch: float, **figures: float) -> None:
        """Figures of the steps since the last call, `step` counted from 1."""
        # NaN is not JSON; what is not a number becomes null.
        rounded = {k: float(f"{value:.7g}") if math.isfinite(value) else None for k, value in figures.items()}
        self.event("step", step=step, total_steps=total, epoch=epoch, **rounded)
        self._plot({f"train/{name}": value for name, value in figures.items()}, step)

    def evaluation(self, step: int, epoch: float, seconds: float, figures: dict[str, float | int]) -> None:
        """An evaluation's shares and loss."""
        self.event("evaluation", step=step, epoch=epoch, seconds=round(seconds, 3), **figures)
        self._plot({f"evaluation/{name}": figures[name] for name in ("top1", "top5", "loss")}, step)

    def close(self) -> None:
        self.events.close()
        if self._board is not None:
            with suppress(OSError):
                self._board.close()

    def _plot(self, figures: dict[str, float | int], step: int) -> None:
        if self._board is None:
            return
        try:
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)
        except OSError as error:  # of its writing thread, which has ended: the disk is full
            self._board = None
            self.event("warning", message=f"TensorBoard gets no more figures of this attempt: {error.strerror}.")
