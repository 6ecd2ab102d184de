"""Where checkpoints are kept. A checkpoint is a few files under a name; it appears whole, and goes whole.

A draft is written under a name of its own and becomes a checkpoint by `commit`, so that a kill at any moment leaves
either the old checkpoints or the old ones and the new one.
"""

import io
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from data_pipeline.durable import synchronise

MANIFEST = "manifest.json"
_BUFFER_BYTES = 2**20


def age(name: str) -> tuple[int, ...]:
    """What names of checkpoints are sorted by: the numbers in them, which are the step and the attempt."""
    return tuple(map(int, re.findall(r"\d+", name)))


class Store(Protocol):
    """Checkpoints by name. Names sort by step; of one step, by age. Every rank has a store of its own on the same
    place; `begin`, `commit`, `discard`, `remove`, `set_aside` and `sweep` are rank 0's. All methods raise OSError where
    the storage fails: FileNotFoundError, or one with an `errno` that says so, where a file is lost or damaged
    (see `manifest.problem_of`), any other where the storage itself cannot be used now."""

    def __str__(self) -> str:
        """Where it is, for messages: a directory or a URL."""
        ...

    def names(self) -> list[str]:
        """Committed checkpoints, oldest first; not verified."""
        ...

    def locate(self, name: str) -> str:
        """A checkpoint's directory or URL, for messages."""
        ...

    def open(self, name: str, file: str) -> BinaryIO:
        """A file of a checkpoint, to read; it can seek."""
        ...

    def done_reading(self) -> None:
        """Give back whatever `open` has taken up."""
        ...

    def begin(self, draft: str) -> None:
        """Start a draft, empty."""
        ...

    def create(self, draft: str, file: str) -> BinaryIO:
        """A new file of a draft; durable when it has been closed."""
        ...

    def commit(self, draft: str, name: str, manifest: bytes) -> str:
        """Write the manifest, and with it make the draft a checkpoint. Returns its name, which is `name` but where the
        storage cannot rename. A checkpoint that has the name already is set aside."""
        ...

    def discard(self, draft: str) -> None:
        """Remove a draft; never raises."""
        ...

    def remove(self, name: str) -> None:
        """Remove a checkpoint; a kill leaves it whole, or no checkpoint."""
        ...

    def set_aside(self, name: str, why: str) -> str:
        """Keep a checkpoint for inspection, but no longer among `names`; returns where it is now."""
        ...

    def sweep(self) -> None:
        """Remove what the interrupted saves of earlier attempts have left behind; before the first save of this one."""
        ...


class DirectoryStore:
    """Checkpoints as directories on a local disk or NFS; committed by a rename. See `Store`.

    A worker of an earlier attempt that is still alive somewhere can do no harm: it writes into its own attempt's draft,
    which `sweep` takes away from it whole, by a rename, so that of its commit and the sweep only one succeeds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> list[str]:
        return sorted((p.name for p in self.path.glob("step-*") if p.is_dir()), key=age)

    def locate(self, name: str) -> str:
        return str(self.path / name)

    def open(self, name: str, file: str) -> BinaryIO:
        return (self.path / name / file).open("rb")

    def done_reading(self) -> None:
        """Files are read where they are."""

    def begin(self, draft: str) -> None:
        self._draft(draft).mkdir(parents=True)

    def create(self, draft: str, file: str) -> BinaryIO:
        return io.BufferedWriter(_Durable(self._draft(draft) / file, "xb"), _BUFFER_BYTES)

    def commit(self, draft: str, name: str, manifest: bytes) -> str:
        with self.create(draft, MANIFEST) as out:
            out.write(manifest)
        synchronise(self._draft(draft))
        if (self.path / name).exists():
            self.set_aside(name, "replaced")
        self._draft(draft).rename(self.path / name)
        synchronise(self.path)
        return name

    def discard(self, draft: str) -> None:
        with suppress(OSError):
            self._delete(self._draft(draft))

    def remove(self, name: str) -> None:
        self._delete(self.path / name)

    def set_aside(self, name: str, why: str) -> str:
        return str((self.path / name).rename(self.path / f"{why}-{name}-{time.time_ns()}"))

    def sweep(self) -> None:
        for left in self.path.glob(".tmp-*"):
            with suppress(FileNotFoundError):  # a living worker of an earlier attempt has just committed it
                self._delete(left)

    def _draft(self, draft: str) -> Path:
        return self.path / f".tmp-{draft}"

    def _delete(self, path: Path) -> None:
        """Renamed first: what is half deleted is never seen under its name, nor committed by who still has it."""
        gone = path.rename(self.path / f".tmp-gone-{time.time_ns()}")
        shutil.rmtree(gone, ignore_errors=True)


class _Durable(io.FileIO):
    """A file that is on the disk when it is closed."""

    def close(self) -> None:
        try:
            if not self.closed:
                os.fsync(self.fileno())
        finally:
            super().close()
