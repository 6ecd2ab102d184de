"""What people see while a run goes on: its events as a live progress bar on a terminal, as quiet lines in a log."""

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.report import interval_chosen
from trainer.rundir import RunDirectory

_LOG_SECONDS = 15.0
Event = dict[str, Any]


class View:
    """Shows the events of a run that are written after this object was made."""

    def __init__(self, run: RunDirectory, console: Console) -> None:
        self.console = console
        self._file = run.events_file
        self._offset = self._file.stat().st_size if self._file.is_file() else 0
        self._last_line = 0.0
        self._bar: Progress | None = None
        self._task: Any = None
        self.last: Event = {}
        self.errors: list[str] = []
        self._skipped = 0

    def follow(self, alive: Callable[[], bool]) -> None:
        """Show events until `alive()` is false; an interrupt (Ctrl-C) comes through to the caller."""
        with self._progress() as bar:
            self._bar = bar
            while True:
                running = alive()  # asked first, so that what was written before the end is still shown
                for event in self._new_events():
                    self._show(event)
                if not running:
                    return
                time.sleep(0.2)

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def _new_events(self) -> Iterator[Event]:
        if not self._file.is_file():
            return
        with self._file.open("rb") as lines:
            lines.seek(self._offset)
            for line in lines:
                if not line.endswith(b"\n"):  # still being written
                    return
                self._offset += len(line)
                try:
                    yield json.loads(line)
                except ValueError:  # cut short by a crash
                    continue

    def _show(self, event: Event) -> None:
        kind = event["event"]
        if kind == "step":
            self._show_step(event)
        elif kind == "error":
            self.errors.append(event["message"])
        elif kind in _LINES:
            self.console.print(_LINES[kind](event), highlight=False)
        if kind in ("finished", "stopped", "error"):
            self.last = event

    def _show_step(self, event: Event) -> None:
        skipped = int(event.get("num_skipped", 0))
        if skipped > self._skipped:
            scale = f" (the loss scale is {event['loss_scale']:g})" if "loss_scale" in event else ""
            count = f"{skipped} update{'s' * (skipped > 1)} so far"
            self.console.print(
                f"[yellow]Step {event['step']}: {count} skipped for gradients that are not finite{scale}"
            )
        self._skipped = skipped
        figures = (
            f"epoch {event['epoch']:.2f}  loss {_number(event['loss'])}  lr {event['lr']:.4g}  "
            f"{event['images_per_second']:,.0f} images/s"
        )
        if self._bar is not None and self.console.is_terminal:
            if self._task is None:
                self._task = self._bar.add_task("step", total=event["total_steps"], figures="")
            self._bar.update(self._task, completed=event["step"], figures=figures)
        elif event["time"] - self._last_line >= _LOG_SECONDS:
            self._last_line = event["time"]
            self.console.print(f"step {event['step']}/{event['total_steps']}  {figures}", highlight=False)


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.4f}"


def _started(event: Event) -> str:
    places: dict[str, int] = {}
    for worker in event["workers"]:
        places[worker["host"]] = places.get(worker["host"], 0) + 1
    where = ", ".join(f"{count} on {host}" for host, count in places.items())
    noun = "worker" if event["world_size"] == 1 else "workers"
    return f"Attempt {event['attempt']}: {event['world_size']} {noun} ({where}), {event['workers'][0]['device']}"


_LINES: dict[str, Callable[[Event], str]] = {
    "start": _started,
    "resume": lambda e: f"Resumed at step {e['step']} from {e['path']} (saved by {e['saved_by']} workers)",
    "evaluation": lambda e: (
        f"Evaluation at step {e['step']}: top-1 {e['top1']:.2%}, top-5 {e['top5']:.2%} of {e['num_images']:,} images"
    ),
    "checkpoint_interval": interval_chosen,
    "checkpoint_failed": lambda e: (
        f"[yellow]Checkpoint at step {e['step']} failed: {escape(e['reason'])}; training goes on"
    ),
    "memory_save_failed": lambda e: (
        f"[yellow]Saving step {e['step']} in memory failed: {escape(e['reason'])}; training goes on"
    ),
    "checkpoint_broken": lambda e: f"[yellow]Broken checkpoint set aside: {escape(e['reason'])}",
    "rollback": lambda e: (
        f"[yellow]Updates since step {e['failing_since']} had gradients that are not finite; going back to the "
        f"checkpoint of step {e['step']}"
    ),
    "worker_failure": lambda e: f"[yellow]Worker {e['rank']} was lost ({escape(e['error'])}); starting again",
    "warning": lambda e: f"[yellow]{escape(e['message'])}",
    "fetching": lambda e: f"Fetching the data set: {e['bytes'] / 1e9:,.1f} of {e['total_bytes'] / 1e9:,.1f} GB",
    "stopped": lambda e: f"Stopped at step {e['step']}; the checkpoint is saved.",
}


def shown_path(path: Path | str) -> str:
    """The path as a person would type it from here."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def typed_command() -> str:
    """The command as the user typed it; launch/train.py passes on what was typed on another machine."""
    return os.environ.get("LONGHAUL_COMMAND") or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def interrupt(number: int, frame: FrameType | None) -> None:
    """A signal handler that does what Ctrl-C does."""
    del number, frame
    raise KeyboardInterrupt
