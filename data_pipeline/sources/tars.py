"""The files in tar files."""

import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from configs import LonghaulError
from data_pipeline.sources.files import Entry, Located
from data_pipeline.sources.spool import compression, unpack
from data_pipeline.sources.storage import Span, Store
from data_pipeline.sources.tarindex import BLOCK, Member, is_header, members


class TarFiles:
    """The files in tar files, read where they lie. A tar that holds tars is taken for what is in them: member x.jpg
    of member a.tar is the file a/x.jpg."""

    def __init__(self, store: Store, tars: Sequence[str]) -> None:
        self._title = store.locate(tars[0] if len(tars) == 1 else "")
        self._store, self._tars = store, list(tars)
        if len(tars) == 1 and compression(store, tars[0]):
            spool = unpack(store, tars[0])
            self._store, self._tars = spool, [spool.name]

    def locate(self, name: str) -> str:
        return f"{self._title}: {name}" if name else self._title

    def entries(self) -> dict[str, Entry]:
        if len(self._tars) == 1:
            return self._entries_of(0, "")
        with ThreadPoolExecutor(self._store.num_readers) as pool:
            prefixes = [f"{tar.removesuffix('.tar')}/" for tar in self._tars]
            found = pool.map(self._entries_of, range(len(self._tars)), prefixes)
            return {name: entry for entries in found for name, entry in entries.items()}

    def read(self, wanted: Sequence[Located]) -> Iterator[bytes | OSError]:
        spans = []
        for one in wanted:
            tar, offset = one.path.split(":")
            spans.append(Span(self._tars[int(tar)], int(offset), one.size))
        return self._store.read_spans(spans)

    def _entries_of(self, tar: int, prefix: str) -> dict[str, Entry]:
        whole = self._members(tar, 0, None)
        if not whole or not all(member.name.endswith(".tar") for member in whole):
            return _resolved(whole, tar, prefix)
        with ThreadPoolExecutor(self._store.num_readers) as pool:
            inner = pool.map(lambda outer: self._members(tar, outer.offset, outer), whole)
            return {
                name: entry
                for outer, found in zip(whole, inner, strict=True)
                for name, entry in _resolved(found, tar, f"{prefix}{outer.name.removesuffix('.tar')}/").items()
            }

    def _members(self, tar: int, start: int, outer: Member | None) -> list[Member]:
        name = self._tars[tar]
        try:
            with self._store.scanner(name) as (read, size):
                end = outer.offset + outer.size if outer else size
                return list(members(read, start, end, inner=outer is not None))
        except tarfile.ReadError as error:
            title = self._title if len(self._tars) == 1 else self._store.locate(name)
            where = f"{outer.name} in {title}" if outer else title
            raise LonghaulError(f"{where} is not whole ({error}): fetch or make it again.") from None


def _resolved(found: list[Member], tar: int, prefix: str) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for member in found:
        if not member.link:
            entries[prefix + member.name] = Entry(f"{tar}:{member.offset}", member.size)
        elif prefix + member.link in entries:
            entries[prefix + member.name] = entries[prefix + member.link]
    return entries


def is_tar(store: Store, name: str) -> bool:
    """Whether a file is a tar, or compressed as a tar may be."""
    with store.open(name) as file:
        return is_header(file.read(BLOCK)) or compression(store, name)
