"""Stopping early and all together: Ctrl-C, SIGTERM or the run's stop file on any worker end all at the same step."""

import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from trainer.group import Group

_POLL_SECONDS = 0.5


class StopRequests:
    """Notices requests on this worker: SIGINT and SIGTERM (where this is the main thread), and the stop file."""

    def __init__(self, stop_file: Path) -> None:
        self._file = stop_file
        self._requested = False
        self._polled = 0.0
        self._old_handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old_handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = True

    def here(self) -> bool:
        """Whether this worker was asked to stop; looks at the file twice a second at most."""
        now = time.monotonic()
        if not self._requested and now - self._polled > _POLL_SECONDS:
            self._polled = now
            self._requested = self._file.exists()
        return self._requested


class Agreement:
    """Flags, agreed on by all ranks while a step computes: asked before it, known after it, at no cost in time."""

    def __init__(self, group: Group, num_flags: int) -> None:
        self._group = group
        self._flags = torch.zeros(num_flags, dtype=torch.int32)
        self._work: Any = None

    def ask(self, *here: bool) -> None:
        """What this rank says to each flag."""
        self._flags.copy_(torch.tensor(here))
        self._work = dist.all_reduce(self._flags, op=dist.ReduceOp.MAX, group=self._group.control, async_op=True)

    def answer(self) -> list[bool]:
        """For each flag, whether any rank said yes."""
        self._work.wait()
        return [bool(flag) for flag in self._flags.tolist()]
