"""Folders of files, and how the ranges of a file are read; the folder on this machine."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from io import BufferedIOBase, BufferedReader
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from configs import LonghaulError

ReadAt = Callable[[int, int], bytes]  # (offset, size) -> bytes, fewer at the end of the file

_WINDOW_BYTES = 64 * 2**20  # read out of order, and so held in memory, at once
_PAGE_BYTES = 4 * 2**10


class Span(NamedTuple):
    """`size` bytes of the file `name`, from `offset` on."""

    name: str
    offset: int
    size: int


class Store(ABC):
    """A folder with files. It can be pickled and forked: nothing is held open between calls."""

    num_readers: int  # how many files are worth scanning at once

    @abstractmethod
    def locate(self, name: str) -> str:
        """The path or URL of a file, for people; of the folder itself for ""."""

    @abstractmethod
    def find(self) -> dict[str, int]:
        """The size in bytes of every file in the folder and below, by its path from the folder, with slashes."""

    @abstractmethod
    def open(self, name: str) -> BufferedIOBase:
        """A file to be read at random; raises LonghaulError where it cannot be opened."""

    @abstractmethod
    def read_files(self, names: Sequence[str]) -> Iterator[bytes | OSError]:
        """Whole files, in order; an error in the place of one that cannot be read."""

    @abstractmethod
    def read_spans(self, spans: Sequence[Span]) -> Iterator[bytes | OSError]:
        """Spans of files, in order, read in the order in which they lie there.

        Raises LonghaulError where a file is gone, since all that is in it is then lost.
        """

    @abstractmethod
    def scanner(self, name: str) -> AbstractContextManager[tuple[ReadAt, int]]:
        """What reads a file from front to back with gaps, and the file's size in bytes."""


class LocalStore(Store):
    """A folder on this machine."""

    num_readers = 4

    def __init__(self, root: Path) -> None:
        self._root = root

    def locate(self, name: str) -> str:
        return str(self._root / name)

    def find(self) -> dict[str, int]:
        found: dict[str, int] = {}
        folders = [("", str(self._root))]
        while folders:
            prefix, folder = folders.pop()
            try:
                entries = list(os.scandir(folder))
            except OSError as error:
                raise LonghaulError(f"{folder} cannot be listed ({error.strerror}): make it readable.") from None
            for entry in entries:
                name = prefix + entry.name
                # Links to folders are followed: subsets of ImageNet are often made of them. Not those that go back up.
                if entry.is_dir():
                    if not (entry.is_symlink() and _leads_up(entry.path)):
                        folders.append((name + "/", entry.path))
                elif entry.is_file():
                    found[name] = entry.stat().st_size
                elif entry.is_symlink():
                    found[name] = 0  # it leads nowhere; reading it says so
        return found

    def open(self, name: str) -> BufferedReader:
        try:
            return (self._root / name).open("rb")
        except OSError as error:
            raise LonghaulError(
                f"{self.locate(name)} cannot be read ({error.strerror}): see that it is there and readable."
            ) from None

    def read_files(self, names: Sequence[str]) -> Iterator[bytes | OSError]:
        for name in names:
            try:
                yield (self._root / name).read_bytes()
            except OSError as error:
                yield error

    def read_spans(self, spans: Sequence[Span]) -> Iterator[bytes | OSError]:
        with ExitStack() as stack:
            files: dict[str, int] = {}
            for window in windows(spans):
                read: dict[Span, bytes | OSError] = {}
                for span in sorted(set(window)):
                    if span.name not in files:
                        files[span.name] = stack.enter_context(self.open(span.name)).fileno()
                    try:
                        read[span] = whole(os.pread(files[span.name], span.size, span.offset), span)
                    except OSError as error:
                        read[span] = error
                yield from (read[span] for span in window)

    @contextmanager
    def scanner(self, name: str) -> Iterator[tuple[ReadAt, int]]:
        with self.open(name) as file:
            number = file.fileno()
            yield (
                ReadAhead(lambda offset, size: os.pread(number, size, offset), _PAGE_BYTES, _PAGE_BYTES),
                os.fstat(number).st_size,
            )


class ReadAhead:
    """Reads from front to back: what was fetched beyond one request serves the next. How much that is grows from
    `least` to `most` bytes while requests follow each other closely, and falls back where they leap."""

    def __init__(self, fetch: ReadAt, least: int, most: int) -> None:
        self._fetch, self._least, self._most = fetch, least, most
        self._ahead, self._start, self._data = least, 0, b""

    def __call__(self, offset: int, size: int) -> bytes:
        start = offset - self._start
        if start < 0 or start + size > len(self._data):
            is_near = 0 <= start <= len(self._data) + self._most
            self._ahead = min(2 * self._ahead, self._most) if is_near else self._least
            self._data, self._start, start = self._fetch(offset, max(size, self._ahead)), offset, 0
        return self._data[start : start + size]


def windows(spans: Sequence[Span]) -> Iterator[Sequence[Span]]:
    start = held = 0
    for end, span in enumerate(spans):
        if held and held + span.size > _WINDOW_BYTES:
            yield spans[start:end]
            start, held = end, 0
        held += span.size
    if start < len(spans):
        yield spans[start:]


def whole(data: bytes, span: Span) -> bytes | OSError:
    """The bytes of a span, or an error where there are too few."""
    if len(data) == span.size:
        return data
    return OSError(f"{PurePosixPath(span.name).name} ends after {len(data)} of its {span.size} bytes")


def _leads_up(link: str) -> bool:
    target = os.path.realpath(link)
    return os.path.commonpath([target, os.path.realpath(Path(link).parent)]) == target
