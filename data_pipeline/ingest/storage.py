"""Files that are there whole or not at all, even after a power cut."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs import LonghaulError
from data_pipeline.durable import synchronise

_MENDS = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "raise the quota or make room",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or give a smaller --shard-mib",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
}


@contextmanager
def whole_file(directory: Path, name: str) -> Iterator[Path]:
    """Within it write to the path it gives; then the file `directory / name` is there, and its bytes on the disk.

    The path is in `directory / "tmp"`, and no other process on any machine is given the same.
    """
    written = directory / "tmp" / f"{socket.gethostname()}-{os.getpid()}-{Path(name).name}"
    try:
        yield written
        synchronise(written)
        written.rename(directory / name)
        synchronise((directory / name).parent)
    finally:
        written.unlink(missing_ok=True)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Errors of the disk as one sentence, with the mend."""
    try:
        yield
    except OSError as error:
        mend = _MENDS.get(error.errno or 0, "mend that")
        what = os.strerror(error.errno) if error.errno else str(error)
        raise LonghaulError(
            f"{place} cannot be written ({what}): {mend}; what is finished is kept, and the same command goes on."
        ) from error
