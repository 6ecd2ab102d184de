"""`longhaul prepare`: what it shows."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from configs import LonghaulError
from data_pipeline.ingest import Executor, Options, fingerprint, local_processes, prepare, quarantine_counts
from data_pipeline.shards import Manifest
from launch.view import interrupt, typed_command

_BAR_SECONDS, _LOG_SECONDS = 0.1, 30.0


def prepare_data(
    console: Console,
    source: str,
    out: Path,
    holdout: float = 0.0,
    options: Options | None = None,
    shard_mib: int = 128,
    shuffle: bool | None = None,
    jobs: int = 0,
    workers: int = 0,
    restart: bool = False,
) -> None:
    """`longhaul prepare`; `workers` above 0 are on Ray."""
    from data_pipeline.sources import open_source

    if jobs and workers:
        raise LonghaulError("--jobs is for this machine alone and --workers for a Ray cluster: give one of them.")
    opened = open_source(source, holdout)
    executor = _ray_executor(console, workers) if workers else local_processes(jobs)
    with _Progress(console) as progress, _sigterm_as_interrupt():
        try:
            manifest = prepare(
                opened,
                out,
                shard_mib * 2**20,
                progress.show,
                options,
                shuffle=shuffle,
                identity={**fingerprint(source, out), "holdout": holdout},
                restart=restart,
                executor=executor,
                say=console.print,
            )
        except KeyboardInterrupt:
            progress.close()
            console.print(
                f"Stopped; finished shards are kept. Go on with the same command: {typed_command()}", highlight=False
            )
            raise typer.Exit(130) from None
    _summarise(console, out, manifest, progress)


def _ray_executor(console: Console, workers: int) -> Executor:
    with console.status("Starting Ray ..."):
        from cluster.ingest import on_ray
        from cluster.runner import connect

        connect(bool(os.environ.get("LONGHAUL_DEBUG")))
    return on_ray(workers)


def _summarise(console: Console, out: Path, manifest: Manifest, progress: "_Progress") -> None:
    counts = ", ".join(f"{manifest.num_samples(split):,} {split}" for split in manifest.splits)
    console.print(f"{out}: {counts}; {len(manifest.classes):,} classes; mean {manifest.mean}, std {manifest.std}")
    shards = [shard for split in manifest.splits.values() for shard in split]
    written = sum(shard.bytes for shard in [*shards, *manifest.indexes.values()])
    console.print(
        f"{decimal(manifest.source_bytes)} of images became {decimal(written)} in {len(shards):,} "
        f"{'shard' if len(shards) == 1 else 'shards'}; {progress.rate():,.0f} images/s",
        highlight=False,
    )
    if "val" not in manifest.splits:
        console.print("[yellow]Nothing is held out, so runs on it will not be evaluated; --holdout 0.1 keeps a tenth.")
    if manifest.quarantined:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in quarantine_counts(manifest).items())
        console.print(
            f"[yellow]{len(manifest.quarantined):,} images could not be used and were left out ({kinds}); "
            f"{out / 'quarantine.tsv'} names each with the reason."
        )


class _Progress:
    """Images done: a bar on a terminal, else a line every 30 s."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(self), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("listing", total=None)
        self._first: tuple[float, int] | None = None
        self._shown = self._told = time.monotonic()
        self._done = 0

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._bar.stop()

    def show(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
        self._done = done
        if now - self._shown < _BAR_SECONDS and done < total:
            return
        self._shown = now
        self._bar.update(self._task, description="images", completed=done, total=total)
        if not self._console.is_terminal and now - self._told >= _LOG_SECONDS:
            self._told = now
            left = (total - done) / self.rate() if self.rate() else 0
            self._console.print(
                f"{done:,} of {total:,} images, {self.rate():,.0f} images/s, about {left / 60:,.0f} min left",
                highlight=False,
            )

    def rate(self) -> float:
        """Images a second since the first were reported, without those of an earlier command."""
        if self._first is None:
            return 0.0
        began, before = self._first
        return (self._done - before) / max(time.monotonic() - began, 1e-9)


class _Rate(ProgressColumn):
    def __init__(self, progress: _Progress) -> None:
        super().__init__()
        self._progress = progress

    def render(self, task: Task) -> Text:
        del task
        return Text(f"{self._progress.rate():,.0f} images/s")


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Batch systems end jobs with SIGTERM: let it do what Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
