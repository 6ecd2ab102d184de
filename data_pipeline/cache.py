"""A bounded cache of shards on a local disk, shared by all processes of a machine.

A file is kept under its SHA-256, so one that is there is the right one, whatever data set asks for it. Who fetches one
writes `SHA256-BYTES.part`, locked while it does, and renames it when its bytes have been verified: a kill at any
instant leaves a whole file, or a part that is cleared away. The least recently used files make room for new ones. Locks
are flock(2)'s, which the kernel drops when their holder dies; the disk must be a local one.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from configs import LonghaulError
from data_pipeline.shards import Shard
from data_pipeline.storage import Store

T = TypeVar("T")

_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([kMGT]?)(i?)B?)\s*$", re.IGNORECASE)
_SHARE_OF_FREE = 0.8
_PAUSE_SECONDS = 0.05  # between looks whether another process is done, or has made room


def parse_bytes(text: str) -> int:
    """The number of bytes meant by ``200GB``, ``1.5TB``, ``64GiB`` or a plain number; raises LonghaulError."""
    match = _SIZE.match(text)
    if match is None or not float(match[1]):
        raise LonghaulError(f"--cache-bytes {text} is not a size: write it as 200GB, 1.5TB or 64GiB.")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


@dataclass
class Traffic:
    """What one process has done with the cache so far."""

    fetched_files: int = 0
    fetched_bytes: int = 0
    hits: int = 0
    evicted_bytes: int = 0


class Cache:
    """Files of remote data sets on this machine's disk.

    Attributes:
        directory: where they are.
        limit: the most bytes they take together, with those being fetched. A file that a process still maps keeps
            its room on the disk after it was evicted, until it is unmapped.
        traffic: of this process.
    """

    def __init__(self, directory: Path | None = None, limit: int | None = None) -> None:
        """By default in $LONGHAUL_CACHE or ~/.cache/longhaul, and up to 80 % of what is free or its own already."""
        self.directory = directory or Path(os.environ.get("LONGHAUL_CACHE", "~/.cache/longhaul")).expanduser()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / ".lock").touch()
        except OSError as error:
            raise LonghaulError(
                f"The cache {self.directory} cannot be written ({error.strerror}): give another --cache-dir."
            ) from None
        self.traffic = Traffic()
        self._counting = threading.Lock()
        with self._exclusively():
            taken = self._taken()
        self.limit = limit or int(_SHARE_OF_FREE * (shutil.disk_usage(self.directory).free + taken))

    def read(self, store: Store, shard: Shard, reader: Callable[[Path], T]) -> T:
        """What `reader` makes of a whole local copy of a file, see `hold`. Where it raises LonghaulError the copy has
        been damaged since it was fetched, and is fetched once more."""
        with self.hold(store, shard) as path, suppress(LonghaulError):
            return reader(path)
        self.forget(shard)
        with self.hold(store, shard) as path:
            return reader(path)

    @contextmanager
    def hold(self, store: Store, shard: Shard) -> Iterator[Path]:
        """A whole local copy of a file, fetched where it is not there; it is not evicted in the meantime.

        Raises LonghaulError where it cannot be fetched, does not have the bytes that its manifest promises, or does
        not fit.
        """
        path = self.directory / shard.sha256
        fetched = False
        while True:
            with _shared(path) as found:
                if found is not None and os.fstat(found.fileno()).st_size == shard.bytes:
                    now = time.time_ns()  # the kernel's own time stamps are milliseconds coarse
                    os.utime(path, ns=(now, now))
                    if not fetched:
                        self._count(hits=1)
                    yield path
                    return
            fetched |= self._fetch(store, shard, path)

    def forget(self, shard: Shard) -> None:
        """Drop a file whose bytes turned out to be damaged."""
        with self._exclusively():
            (self.directory / shard.sha256).unlink(missing_ok=True)

    def _fetch(self, store: Store, shard: Shard, path: Path) -> bool:
        """Fetch a file, or wait a moment for whoever is at it, or for room; returns whether it was fetched here."""
        part = self.directory / f"{shard.sha256}-{shard.bytes}.part"
        claim = self._claim(shard, path, part)
        if claim is None:
            with _shared(part):  # until the other one is done, or dead
                pass
            time.sleep(_PAUSE_SECONDS)
            return False
        with claim:
            try:
                self._download(store, shard, part)
                part.rename(path)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise LonghaulError(
                    f"The disk of the cache {self.directory} is full: give a smaller --cache-bytes than "
                    f"{readable(self.limit)}, or free some room."
                ) from None
            finally:
                part.unlink(missing_ok=True)
        self._count(fetched_files=1, fetched_bytes=shard.bytes)
        return True

    def _download(self, store: Store, shard: Shard, part: Path) -> None:
        for _ in range(2):  # a second time where the bytes are wrong: they may have been damaged on the way
            store.download(shard.file, part)
            with part.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256:
                    os.fsync(file.fileno())
                    return
        raise LonghaulError(
            f"{store.url}/{shard.file} does not have the bytes that its manifest promises: prepare or upload the "
            f"data set again."
        )

    def _claim(self, shard: Shard, path: Path, part: Path) -> IO[bytes] | None:
        """The locked part file, with room made for it; None where another process is at it, or holds the room."""
        if shard.bytes > self.limit:
            raise LonghaulError(
                f"{shard.file} has {readable(shard.bytes)}, more than the cache's limit: give --cache-bytes more than "
                f"{readable(self.limit)}."
            )
        with self._exclusively():
            taken = self._taken()
            if part.exists():
                return None
            if path.is_file():  # looked for after the part, which may become it at any moment
                if path.stat().st_size == shard.bytes:
                    return None
                path.unlink()  # damaged
            if not self._make_room(taken, shard.bytes):
                return None
            claim = part.open("xb")
            fcntl.flock(claim, fcntl.LOCK_EX)
            return claim

    def _make_room(self, taken: int, needed: int) -> bool:
        """Evict the least recently used files that nobody holds until `needed` bytes fit; returns whether they do."""
        if taken + needed <= self.limit:
            return True
        for path in sorted(self._whole(), key=lambda path: path.stat().st_mtime_ns):
            with path.open("rb") as file:
                if not _try_lock(file):
                    continue
                size = path.stat().st_size
                path.unlink()
            taken -= size
            self._count(evicted_bytes=size)
            if taken + needed <= self.limit:
                return True
        return False

    def _taken(self) -> int:
        """Bytes of whole files, and those promised to files under way. Parts whose writer died are removed."""
        taken = 0
        for part in self.directory.glob("*.part"):
            with suppress(FileNotFoundError), part.open("rb") as file:  # whole by now
                if _try_lock(file):
                    part.unlink(missing_ok=True)
                else:
                    taken += int(part.stem.rpartition("-")[2])
        return taken + sum(path.stat().st_size for path in self._whole())

    def _whole(self) -> list[Path]:
        return [path for path in self.directory.iterdir() if re.fullmatch("[0-9a-f]{64}", path.name)]

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Nobody else adds or removes files of the cache; taken for moments only."""
        with (self.directory / ".lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _count(self, **more: int) -> None:
        with self._counting:
            for name, value in more.items():
                setattr(self.traffic, name, getattr(self.traffic, name) + value)


@contextmanager
def _shared(path: Path) -> Iterator[IO[bytes] | None]:
    """A file, open and locked with those who read it; None where it is not there, or no longer."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        yield None
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_SH)
        try:
            same = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except FileNotFoundError:
            same = False
        yield file if same else None


def _try_lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def readable(size: int) -> str:
    """A number of bytes for people, such as 8.6 GB."""
    power = min(max(len(str(size)) - 1, 0) // 3, 4)
    return f"{size / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"
