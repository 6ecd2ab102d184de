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
    """One flag, agreed on by all ranks while a step computes: asked before it, known after it, at no cost in time."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: Any = None

    def ask(self, here: bool) -> None:
        self._flag[0] = int(here)
        self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group.control, async_op=True)

    def answer(self) -> bool:
        """Whether any rank said yes."""
        self._work.wait()
        return bool(self._flag[0])
