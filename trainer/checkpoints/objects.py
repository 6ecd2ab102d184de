"""Checkpoints under a URL (s3://, gs://, ... through fsspec), where nothing can be renamed."""

import io
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from configs import LonghaulError
from data_pipeline.storage import Location
from trainer.checkpoints.store import MANIFEST, DirectoryStore, Store, age

_NAME = re.compile(r"step-\d+-attempt\d+")
_PART_BYTES = 16 * 2**20  # an S3 upload has 10,000 parts at most: files of up to 160 GB

_ATTEMPTS = 6  # with growing pauses, a quarter of a minute in all on average


def open_store(location: Location) -> Store:
    """The store in a directory or under a URL; raises LonghaulError for a URL that fsspec cannot serve."""
    return DirectoryStore(location) if isinstance(location, Path) else ObjectStore(location)


class ObjectStore:
    """Checkpoints as objects under a URL; committed by their manifest, which is written last. See `Store`.

    A draft is written where it stays. Its name carries the attempt, so that no object is ever written twice, and a
    worker of an earlier attempt that is still alive somewhere cannot mix its files into ours. `set_aside` takes the
    manifest's name away (`manifest.json` becomes `broken-manifest.json`); the other objects stay where they are, and
    `sweep` leaves them alone.

    Every file that is opened is fetched whole into a temporary file, which is kept until `done_reading`: what was
    fetched to be verified is what is loaded.
    """

    def __init__(self, url: str) -> None:
        """Raises LonghaulError for a protocol that fsspec does not know, or that needs a package which is not here."""
        from fsspec.core import url_to_fs  # a tenth of a second that local checkpoints do without

        self.url = url
        self._copies: dict[tuple[str, str], BinaryIO] = {}
        try:
            options = _s3_options() if url.startswith(("s3://", "s3a://")) else {}
            self._files, self._root = url_to_fs(url, **options)
        except (ValueError, ImportError) as error:
            raise LonghaulError(f"--checkpoints {url}: {str(error).rstrip('.')}.") from None

    def __str__(self) -> str:
        return self.url

    def names(self) -> list[str]:
        return sorted((name for name, files in self._listing().items() if MANIFEST in files), key=age)

    def locate(self, name: str) -> str:
        return f"{self.url}/{name}"

    def open(self, name: str, file: str) -> BinaryIO:
        if file == MANIFEST:
            with _os_errors(f"{self.url}/{name}/{file}"):
                return io.BytesIO(self._files.cat_file(self._path(name, file)))
        if (name, file) not in self._copies:
            self._copies[name, file] = self._fetch(name, file)
        copy = os.fdopen(os.dup(self._copies[name, file].fileno()), "rb")
        copy.seek(0)
        return copy

    def done_reading(self) -> None:
        for copy in self._copies.values():
            copy.close()
        self._copies.clear()

    def begin(self, draft: str) -> None:
        """An object store has no directories to make."""

    def create(self, draft: str, file: str) -> BinaryIO:
        url = f"{self.url}/{draft}/{file}"
        with _os_errors(url):
            stream = self._files.open(self._path(draft, file), "wb", block_size=_PART_BYTES)
        return cast(BinaryIO, _Upload(stream, url))

    def commit(self, draft: str, name: str, manifest: bytes) -> str:
        del name
        with _os_errors(f"{self.url}/{draft}/{MANIFEST}"):
            self._files.pipe_file(self._path(draft, MANIFEST), manifest)
        return draft

    def discard(self, draft: str) -> None:
        with suppress(OSError):
            self.remove(draft)

    def remove(self, name: str) -> None:
        files = self._listing(name)[name]
        with _os_errors(f"{self.url}/{name}"):
            for file in sorted(files, key=lambda file: file != MANIFEST):  # without it, it is no checkpoint
                self._files.rm_file(self._path(name, file))

    def set_aside(self, name: str, why: str) -> str:
        with _os_errors(f"{self.url}/{name}"):
            manifest = self._files.cat_file(self._path(name, MANIFEST))
            self._files.pipe_file(self._path(name, f"{why}-{MANIFEST}"), manifest)
            self._files.rm_file(self._path(name, MANIFEST))
        return self.locate(name)

    def sweep(self) -> None:
        for name, files in self._listing().items():
            if not any(file.endswith(MANIFEST) for file in files):
                self.remove(name)

    def _path(self, name: str, file: str) -> str:
        return f"{self._root}/{name}/{file}"

    def _listing(self, under: str = "") -> defaultdict[str, list[str]]:
        """The files of every checkpoint and draft, or of one, by its name."""
        self._files.invalidate_cache()
        found: defaultdict[str, list[str]] = defaultdict(list)
        with _os_errors(self.url):
            for path in self._files.find(f"{self._root}/{under}".rstrip("/")):
                name, _, file = path.removeprefix(f"{self._root}/").partition("/")
                if _NAME.fullmatch(name):
                    found[name].append(file)
        return found

    def _fetch(self, name: str, file: str) -> BinaryIO:
        with tempfile.NamedTemporaryFile(prefix="longhaul-") as named, _os_errors(f"{self.url}/{name}/{file}"):
            self._files.get_file(self._path(name, file), named.name)
            return Path(named.name).open("rb")  # stays readable when its name is gone


def _s3_options() -> dict[str, Any]:
    """The client tries again what fails in passing, as often as AWS_MAX_ATTEMPTS says. One connection for a download:
    with more, s3fs keeps the whole file in memory."""
    attempts = int(os.environ.get("AWS_MAX_ATTEMPTS", _ATTEMPTS))
    retries = {"mode": "standard", "total_max_attempts": attempts}
    return {"max_concurrency": 1, "config_kwargs": {"retries": retries, "connect_timeout": 20, "read_timeout": 60}}


class _Upload(io.RawIOBase):
    """A new object, sent in parts while it is written and there when it is closed; after an error, not at all."""

    def __init__(self, stream: Any, url: str) -> None:
        self._stream, self._url = stream, url

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        with _os_errors(self._url):
            for at in range(0, len(view), _PART_BYTES):
                self._stream.write(view[at : at + _PART_BYTES])
        return len(view)

    def close(self) -> None:
        if not self.closed:
            super().close()
            with _os_errors(self._url):
                try:
                    self._stream.close()
                except BaseException:
                    self._abandon()
                    raise

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            super().close()
            self._abandon()
        self.close()

    def _abandon(self) -> None:
        """Give up an upload, also the parts that were sent."""
        with suppress(Exception):  # its own error is what is told
            self._stream.discard()
        self._stream.closed = True  # else it would try to send the rest when it is garbage


@contextmanager
def _os_errors(url: str) -> Iterator[None]:
    """Turn what a protocol raises into OSError that names the URL."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {url}") from None
    except Exception as error:  # every protocol has its own, and their numbers do not say that a file is damaged
        words = " ".join(str(error).split())[:200] or type(error).__name__
        raise OSError(f"{url}: {words.rstrip('.')}") from None
