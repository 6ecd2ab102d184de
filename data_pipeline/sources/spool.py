"""Compressed files, unpacked once."""

import bz2
import lzma
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from isal import igzip, igzip_lib

from configs import LonghaulError
from data_pipeline.sources.storage import LocalStore, Store

_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": igzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_ZSTD = b"\x28\xb5\x2f\xfd"


class Spool(LocalStore):
    """A file without a name, which is gone as soon as the process that made it is, however that ends. Until then other
    processes, which have this pickled, open it as well."""

    def __init__(self) -> None:
        self._file: BinaryIO | None = tempfile.TemporaryFile(prefix="longhaul-")  # noqa: SIM115
        super().__init__(Path(f"/proc/{os.getpid()}/fd"))
        self.name = str(self._file.fileno())

    def fill(self, stream: Any) -> None:
        assert self._file is not None
        shutil.copyfileobj(stream, self._file, 2**20)
        self._file.flush()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}


def compression(store: Store, name: str) -> bool:
    """Whether a file is compressed; raises LonghaulError where it is in a way that Python does not know."""
    with store.open(name) as file:
        start = file.read(6)
    if start.startswith(_ZSTD):
        raise LonghaulError(f"{store.locate(name)} is compressed with zstd: unpack it with `unzstd`, and give that.")
    return any(start.startswith(magic) for magic in _OPENERS)


def unpack(store: Store, name: str) -> Spool:
    """Unpack a compressed file: in it, nothing can be read without all that is before it."""
    spool = Spool()
    with store.open(name) as file:
        start = file.read(6)
        opener = next(opener for magic, opener in _OPENERS.items() if start.startswith(magic))
        file.seek(0)
        try:
            with opener(file) as stream:
                spool.fill(stream)
        except (OSError, EOFError, zlib.error, igzip_lib.IsalError, lzma.LZMAError) as error:  # type: ignore[misc]  # isal's stub
            if isinstance(error, OSError) and error.errno is not None:  # no room
                raise LonghaulError(
                    f"{store.locate(name)} cannot be unpacked into {tempfile.gettempdir()} ({error.strerror}): "
                    f"set TMPDIR to a folder with more room."
                ) from None
            raise LonghaulError(f"{store.locate(name)} is not whole ({error}): fetch or make it again.") from None
    return spool
