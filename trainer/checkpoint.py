"""Sharded, asynchronous, hashed checkpoints, committed by a rename.

A checkpoint is a directory `step-XXXXXXXX` with the files of torch.distributed.checkpoint (DCP) and a `manifest.json`
that holds the size and SHA-256 of each. It is written under another name and renamed when it is whole, so that a kill
at any moment leaves either the old state or the new one. The newest whose hashes verify is the one to load.
"""

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from configs import LonghaulError
from trainer.group import Group

MANIFEST = "manifest.json"
FORMAT = 3
State = dict[str, Any]

# Reading a checkpoint in one process is meant, not an accident to be warned of.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk: the step (number of updates done), its directory, and its manifest."""

    step: int
    path: Path
    manifest: dict[str, Any]


def directory_name(step: int) -> str:
    return f"step-{step:08d}"


def check(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None when every file has the size and SHA-256 that its manifest says."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path / MANIFEST} is missing or unreadable"
    if manifest.get("format") != FORMAT:
        return f"{path / MANIFEST} has format {manifest.get('format')}, this version reads {FORMAT}"
    for name, expected in files.items():
        try:
            found = _fingerprint(path / name)
        except OSError:
            return f"{path / name} is missing or unreadable"
        if found != expected:
            return f"{path / name} does not have the bytes that were saved"
    return None


def find(directory: Path) -> list[Path]:
    """Committed checkpoints, oldest first; not verified."""
    return sorted(p for p in directory.glob("step-*") if p.is_dir())


def newest_valid(directory: Path, on_broken: Callable[[Path, str], None] = lambda *_: None) -> Saved | None:
    """The newest checkpoint that verifies; `on_broken(path, why)` is told of each newer one that does not."""
    for path in reversed(find(directory)):
        problem = check(path)
        if problem is None:
            return open_checkpoint(path)
        on_broken(path, problem)
    return None


def open_checkpoint(path: Path) -> Saved:
    """Read a checkpoint's manifest; raises LonghaulError where there is none."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        return Saved(int(manifest["step"]), path, manifest)
    except (OSError, ValueError, KeyError, TypeError):
        raise LonghaulError(f"{path} is not a checkpoint (no readable {MANIFEST}).") from None


def set_aside(path: Path, why: str = "broken") -> Path:
    """Move a checkpoint that is not to be used out of the way, for inspection, and return its new place."""
    target = path.with_name(f"{why}-{path.name}-{time.time_ns()}")
    path.rename(target)
    return target


def load(saved: Saved, state: State, group: Group | None = None) -> None:
    """Fill the tensors of `state` in place from a checkpoint written by any number of workers."""
    try:
        dcp.load(
            state,
            checkpoint_id=saved.path,
            process_group=None if group is None else group.control,
            no_dist=group is None or group.world_size == 1,
        )
    except dcp.api.CheckpointException as error:  # derives from BaseException
        first = next(iter(error.failures.values()), ("unknown",))[0]
        raise LonghaulError(f"The checkpoint {saved.path} does not fit this run: {first}.") from None


def like(state: State) -> State:
    """Empty CPU tensors of the same shapes and dtypes, to load into."""
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in state.items()}


class Checkpointer:
    """Saves in the background, one checkpoint at a time, and keeps the newest few."""

    def __init__(
        self,
        directory: Path,
        group: Group,
        attempt: int,
        keep_last: int,
        on_saved: Callable[[Path, float], None],
        on_failed: Callable[[int, str], None],
    ) -> None:
        """`on_saved(path, seconds)` and `on_failed(step, why)` are called on rank 0, from the saving thread."""
        self._directory, self._group, self._attempt, self._keep = directory, group, attempt, keep_last
        self._on_saved, self._on_failed = on_saved, on_failed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._staged: State = {}
        self.last_step = -1
        if group.rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            for stale in directory.glob(".tmp-*"):
                shutil.rmtree(stale, ignore_errors=True)

    def save(self, step: int, state: State, extra: dict[str, Any]) -> None:
        """Copy the state and return; the copy is written behind the next steps. Waits for a save still under way."""
        self.wait()
        for name, tensor in state.items():
            staged = self._staged.get(name)
            if staged is None or staged.shape != tensor.shape:
                # Contiguous whatever the memory format of the weights: the canonical form is logical NCHW.
                staged = self._staged[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            staged.copy_(tensor)
        self.last_step = step
        self._pending = self._thread.submit(self._write, step, dict(self._staged), extra)

    def wait(self) -> None:
        """Until the save under way, if any, is committed or has failed."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        self.wait()
        self._thread.shutdown()

    def _write(self, step: int, state: State, extra: dict[str, Any]) -> None:
        began = time.monotonic()
        temporary = self._directory / f".tmp-{directory_name(step)}-attempt{self._attempt}"
        problem, files = self._write_shards(temporary, state)
        outcomes: list[Any] = [None] * self._group.world_size
        dist.all_gather_object(outcomes, (problem, files), group=self._group.saving)
        if self._group.rank != 0:
            return
        problems = [p for p, _ in outcomes if p is not None]
        if not problems:
            hashed = {name: mark for _, own in outcomes for name, mark in own.items()}
            manifest = {
                "format": FORMAT,
                "step": step,
                "world_size": self._group.world_size,
                "files": hashed,
                **extra,
            }
            try:
                path = self._commit(temporary, step, manifest)
            except OSError as error:
                problems = [str(error)]
            else:
                self._on_saved(path, time.monotonic() - began)
                self._prune()
        if problems:
            shutil.rmtree(temporary, ignore_errors=True)
            self._on_failed(step, problems[0])

    def _write_shards(self, temporary: Path, state: State) -> tuple[str | None, dict[str, Any]]:
        """This rank's files and their fingerprints. Never raises: a full disk must not stop the training."""
        rank = self._group.rank
        try:
            if rank == 0:
                temporary.mkdir(exist_ok=True)
            dist.barrier(group=self._group.saving)
            writer = dcp.FileSystemWriter(temporary, sync_files=True)
            dcp.save(state, storage_writer=writer, process_group=self._group.saving)
            names = [p.name for p in temporary.glob(f"__{rank}_*.distcp")] + ([".metadata"] if rank == 0 else [])
            return None, {name: _fingerprint(temporary / name) for name in names}
        except dcp.api.CheckpointException as error:
            return _reason(str(next(iter(error.failures.values()))[0]), temporary, state), {}
        except OSError as error:
            return _reason(str(error), temporary, state), {}

    def _commit(self, temporary: Path, step: int, manifest: dict[str, Any]) -> Path:
        with (temporary / MANIFEST).open("w") as out:
            json.dump(manifest, out, indent=1)
            out.flush()
            os.fsync(out.fileno())
        _sync_directory(temporary)
        path = self._directory / directory_name(step)
        if path.exists():
            set_aside(path)
        temporary.rename(path)
        _sync_directory(self._directory)
        return path

    def _prune(self) -> None:
        for path in find(self._directory)[: -self._keep]:
            shutil.rmtree(path, ignore_errors=True)


def _reason(message: str, directory: Path, state: State) -> str:
    """Why a save failed. Of a full disk torch's writer often tells no more than an unexpected position."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    free = shutil.disk_usage(directory.parent).free
    if free < size:
        return f"No space left on device: {directory.parent} has {free:,} bytes, a checkpoint takes up to {size:,}"
    return message


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
