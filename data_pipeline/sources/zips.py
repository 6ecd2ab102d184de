"""The files in a zip."""

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise

from configs import LonghaulError
from data_pipeline.sources.files import Entry, Located
from data_pipeline.sources.storage import Span, Store


class ZipFiles:
    """The files in a zip, read where they lie: its directory, which names them all, is read only to list them."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name

    def locate(self, name: str) -> str:
        title = self._store.locate(self._name)
        return f"{title}: {name}" if name else title

    def entries(self) -> dict[str, Entry]:
        try:
            with self._store.open(self._name) as file, zipfile.ZipFile(file) as archive:
                infos, end = archive.infolist(), archive.start_dir
        except (OSError, zipfile.BadZipFile) as error:
            raise LonghaulError(f"{self.locate('')} is not whole ({error}): fetch or make it again.") from None
        starts = [*sorted({info.header_offset for info in infos}), end]
        ends = dict(pairwise(starts))
        return {
            info.filename: Entry(
                f"{info.header_offset}:{ends[info.header_offset] - info.header_offset}:{info.compress_size}:{info.CRC}",
                info.file_size,
            )
            for info in infos
            if not info.is_dir()
        }

    def read(self, wanted: Sequence[Located]) -> Iterator[bytes | OSError]:
        places = [[int(number) for number in one.path.split(":")] for one in wanted]
        spans = [Span(self._name, offset, length) for offset, length, _, _ in places]
        for data, (_, _, size, crc) in zip(self._store.read_spans(spans), places, strict=True):
            try:
                yield data if isinstance(data, OSError) else _unzip(data, size, crc)
            except (OSError, zlib.error) as error:
                yield OSError(f"damaged in the zip: {error}")


def _unzip(record: bytes, size: int, crc: int) -> bytes:
    """The contents of a local file record (APPNOTE.TXT 4.3.7) whose sizes the directory gives."""
    if record[:4] != b"PK\3\4":
        raise OSError("its header is damaged")
    flags, method = int.from_bytes(record[6:8], "little"), int.from_bytes(record[8:10], "little")
    start = 30 + int.from_bytes(record[26:28], "little") + int.from_bytes(record[28:30], "little")
    if flags & 1:
        raise OSError("it is encrypted; unpack the zip")
    if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise OSError(f"compression method {method} is not known here; unpack the zip")
    data = record[start : start + size]
    if method == zipfile.ZIP_DEFLATED:
        data = zlib.decompress(data, -zlib.MAX_WBITS)
    if zlib.crc32(data) != crc:
        raise OSError("its CRC-32 is wrong")
    return data
