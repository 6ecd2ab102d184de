"""Where a data set is: a directory, or a URL that fsspec can read (s3://, gs://, https://, ...)."""

import errno
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from configs import LonghaulError

Location = Path | str  # a directory, or a URL
T = TypeVar("T")

# Seconds before each further attempt, about a minute in all: a store that restarts, or throttles, comes back in that.
DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)

# One connection for each shard, as several are fetched at a time: more, and s3fs keeps all of a shard in memory. Trying
# again is our part.
_S3_OPTIONS = {"max_concurrency": 1, "config_kwargs": {"retries": {"total_max_attempts": 1}}}


def parse_location(text: str) -> Location:
    """What was typed, as an absolute directory or as a URL without a slash at its end."""
    if "://" in text and not text.startswith("file://"):
        return text.rstrip("/")
    return Path(text.removeprefix("file://")).absolute()


class Store:
    """The files under a URL, read with retries.

    Attributes:
        url: without a slash at its end.
        retries: how often something had to be tried again so far.
    """

    def __init__(self, url: str, delays: tuple[float, ...] = DELAYS) -> None:
        """Raises LonghaulError for a protocol that fsspec does not know, or that needs a package which is not here."""
        from fsspec.core import url_to_fs  # a tenth of a second that local data does without

        self.url, self._delays = url, delays
        self.retries = 0
        self._closed = threading.Event()
        try:
            options = _S3_OPTIONS if url.startswith(("s3://", "s3a://")) else {}
            self._files, self._root = url_to_fs(url, **options)
        except (ValueError, ImportError) as error:
            raise LonghaulError(f"--data {url}: {str(error).rstrip('.')}.") from None

    def read(self, file: str) -> bytes:
        """The bytes of a small file."""
        return self._persist(file, lambda: self._files.cat_file(f"{self._root}/{file}"))

    def download(self, file: str, target: Path) -> None:
        """Write a file to `target`, in place where that exists."""
        self._persist(file, lambda: self._files.get_file(f"{self._root}/{file}", str(target)))

    def close(self) -> None:
        """Give up what is being tried again."""
        self._closed.set()

    def _persist(self, file: str, act: Callable[[], T]) -> T:
        """Raises LonghaulError that names the URL, at once where trying again is no use."""
        url = f"{self.url}/{file}"
        for delay in (*self._delays, None):
            try:
                return act()
            except FileNotFoundError:
                raise LonghaulError(f"There is no {url}: give --data the URL of a whole data set.") from None
            except PermissionError as error:
                raise LonghaulError(
                    f"Reading {url} is not allowed ({_words(error)}): give this machine credentials for it."
                ) from None
            except Exception as error:  # every protocol has its own
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                if type(error).__name__ == "NoCredentialsError":  # of botocore, for S3
                    raise LonghaulError(f"Reading {url} needs credentials, and this machine has none.") from None
                if delay is None or self._closed.is_set():
                    raise LonghaulError(
                        f"{url} cannot be read, after {len(self._delays) + 1} attempts ({_words(error)}): check the "
                        f"network and the store; the same command goes on."
                    ) from None
            self.retries += 1
            self._closed.wait(delay * random.uniform(0.5, 1.0))  # apart from the other workers' attempts
        raise AssertionError("the last attempt returns or raises")


def _words(error: Exception) -> str:
    return (" ".join(str(error).split())[:200] or type(error).__name__).rstrip(".")
