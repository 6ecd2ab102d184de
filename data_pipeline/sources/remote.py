"""Folders at any URL that fsspec knows, read by range."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from configs import LonghaulError
from data_pipeline.sources.storage import LocalStore, ReadAhead, ReadAt, Span, Store, whole, windows

_WINDOW_FILES = 128  # fetched, and so held in memory, at once
_BLOCK_BYTES = 8 * 2**20  # neighbours in a file are fetched together up to this ...
_GAP_BYTES = 64 * 2**10  # ... also across gaps that cost less than another request
_LEAST_AHEAD_BYTES, _MOST_AHEAD_BYTES = 64 * 2**10, 8 * 2**20


class RemoteStore(Store):
    """A folder at a URL."""

    num_readers = 16

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def locate(self, name: str) -> str:
        return f"{self._url}/{name}".rstrip("/")

    def find(self) -> dict[str, int]:
        with _named(self._url):
            filesystem, root = filesystem_of(self._url)
            found = filesystem.find(root, detail=True)
        start = len(root.rstrip("/")) + 1
        # Object stores may hold an empty object "folder/" as a sign that there is one.
        return {p[start:]: i["size"] for p, i in found.items() if i["type"] == "file" and not p.endswith("/")}

    def open(self, name: str) -> io.BufferedIOBase:
        with _named(self.locate(name)):
            filesystem, path = filesystem_of(self.locate(name))
            return _Guarded(filesystem.open(path, "rb"), self.locate(name))

    def read_files(self, names: Sequence[str]) -> Iterator[bytes | OSError]:
        filesystem, root = filesystem_of(self._url)
        for start in range(0, len(names), _WINDOW_FILES):
            window = [f"{root.rstrip('/')}/{name}" for name in names[start : start + _WINDOW_FILES]]
            with _named(self._url):
                read = filesystem.cat_ranges(window, [None] * len(window), [None] * len(window), on_error="return")
            for data in read:
                # One that is gone is its own matter; no network, or no permission, is everybody's.
                if isinstance(data, Exception) and not isinstance(data, FileNotFoundError):
                    raise unreadable(self._url, data) from None
                yield data if isinstance(data, OSError) else bytes(data)

    def read_spans(self, spans: Sequence[Span]) -> Iterator[bytes | OSError]:
        filesystem, root = filesystem_of(self._url)
        for window in windows(spans):
            blocks = _merge(sorted({span for span in window if span.size}))
            names = [f"{root.rstrip('/')}/{block[0].name}" for block in blocks]
            starts, ends = [b[0].offset for b in blocks], [max(s.offset + s.size for s in b) for b in blocks]
            with _named(self._url):
                fetched = filesystem.cat_ranges(names, starts, ends, on_error="return")
            read: dict[Span, bytes | OSError] = {}
            for block, data, start, end in zip(blocks, fetched, starts, ends, strict=True):
                if isinstance(data, Exception):
                    raise unreadable(self.locate(block[0].name), data) from None
                data = _in_range(self.locate(block[0].name), data, end - start)
                for span in block:
                    first = span.offset - start
                    read[span] = whole(data[first : first + span.size], span)
            yield from (read.get(span, b"") for span in window)

    @contextmanager
    def scanner(self, name: str) -> Iterator[tuple[ReadAt, int]]:
        url = self.locate(name)
        with _named(url):
            filesystem, path = filesystem_of(url)
            size = filesystem.size(path)

        def fetch(offset: int, count: int) -> bytes:
            end = min(offset + count, size)
            if offset >= end:
                return b""
            with _named(url):
                return _in_range(url, filesystem.cat_file(path, start=offset, end=end), end - offset)

        yield ReadAhead(fetch, _LEAST_AHEAD_BYTES, _MOST_AHEAD_BYTES), size


def open_store(source: str) -> tuple[Store, str]:
    """The folder that `source`, a path or URL, is, and ""; or the folder that the file `source` is in, and its name.

    Raises LonghaulError where there is neither.
    """
    if "://" not in source or source.startswith(("file://", "local://")):
        path = Path(source.partition("://")[2] if "://" in source else source)
        if path.is_dir():
            return LocalStore(path), ""
        if path.is_file():
            return LocalStore(path.parent), path.name
        raise LonghaulError(f"There is no {path}: give 'digits', or the path or URL of a data set.")
    with _named(source):
        filesystem, path_there = filesystem_of(source)
        filesystem.invalidate_cache()  # it may have listed the folder before
        is_folder = filesystem.info(path_there)["type"] == "directory"
    if is_folder:
        return RemoteStore(source), ""
    folder, _, name = source.rstrip("/").rpartition("/")
    return RemoteStore(folder), name


def filesystem_of(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """fsspec's file system of a URL, and the path there. Asked for anew each time: it is cached for a process only."""
    filesystem, path = fsspec.core.url_to_fs(url)
    return filesystem, str(path)


def unreadable(url: str, error: BaseException) -> LonghaulError:
    """What to say where a URL cannot be reached or read."""
    if isinstance(error, FileNotFoundError):
        return LonghaulError(f"There is no {url}: check the address.")
    if isinstance(error, ImportError | ValueError):
        return LonghaulError(f"{url} cannot be opened ({_first_line(error)}): check the part before '://'.")
    return LonghaulError(
        f"{url} cannot be read ({_first_line(error)}): check the network, the credentials (AWS_ACCESS_KEY_ID, "
        f"AWS_SECRET_ACCESS_KEY or AWS_PROFILE for s3://) and AWS_ENDPOINT_URL, then run the same command again."
    )


class _Guarded(io.BufferedIOBase):
    """A file whose errors are those of the store: whoever reads an archive would take them for damage in it."""

    def __init__(self, file: Any, url: str) -> None:
        self._file, self._url = file, url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def read(self, size: int | None = -1) -> bytes:
        with _named(self._url):
            return bytes(self._file.read(-1 if size is None else size))

    def close(self) -> None:
        self._file.close()
        super().close()


def _in_range(url: str, data: bytes, size: int) -> bytes:
    """What was fetched, if the server did not send more than it was asked for, as one that knows no ranges does."""
    if len(data) > size:
        raise LonghaulError(f"The server of {url} does not send parts of files: copy the file here, and give that.")
    return bytes(data)


@contextmanager
def _named(url: str) -> Iterator[None]:
    """Turns what file systems raise, which may be anything, into a LonghaulError that names the URL."""
    try:
        yield
    except LonghaulError:
        raise
    except Exception as error:
        raise unreadable(url, error) from None


def _merge(spans: list[Span]) -> list[list[Span]]:
    """Groups of sorted spans that are fetched by one request each."""
    blocks: list[list[Span]] = []
    for span in spans:
        first, last = (blocks[-1][0], blocks[-1][-1]) if blocks else (None, None)
        if (
            first is not None
            and last is not None
            and span.name == first.name
            and span.offset - (last.offset + last.size) <= _GAP_BYTES
            and span.offset + span.size - first.offset <= _BLOCK_BYTES
        ):
            blocks[-1].append(span)
        else:
            blocks.append([span])
    return blocks


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".") or type(error).__name__
