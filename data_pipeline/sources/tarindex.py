"""Where the members of a tar file lie, from its headers alone (POSIX.1-2008 pax, and GNU tar's long names)."""

import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from data_pipeline.sources.storage import ReadAt

BLOCK = 512
_ZEROS = bytes(BLOCK)
_REGULAR = frozenset(b"\x0007")
_WITHOUT_DATA = frozenset(b"123456")  # links, devices, folders, pipes


class Member(NamedTuple):
    """A regular file in a tar, or, where `link` is not "", another name of the earlier member `link`."""

    name: str
    offset: int
    size: int
    link: str = ""


def is_header(block: bytes) -> bool:
    """Whether a block of 512 bytes is the header of a member: its checksum holds."""
    if len(block) != BLOCK or block == _ZEROS:
        return False
    try:
        return sum(block) - sum(block[148:156]) + 8 * ord(" ") == _number(block[148:156])
    except ValueError:
        return False


def members(read: ReadAt, start: int, end: int, inner: bool = False) -> Iterator[Member]:
    """The regular files and hard links of the tar that lies from `start` to `end` of a file.

    An `inner` one, a member of another tar, may do without the block of zeros at its end: it cannot have been cut
    without the outer one showing it. Raises tarfile.ReadError, with the reason, where the tar is damaged or cut.
    """
    position = start
    extended: dict[str, str] = {}  # what pax and GNU headers say of the member that comes next
    while not (inner and position == end):
        header = read(position, min(BLOCK, end - position))
        if header == _ZEROS:
            return
        if len(header) < BLOCK:
            raise tarfile.ReadError("its end is missing")
        if not is_header(header):
            raise tarfile.ReadError(f"the header at byte {position:,} is damaged")
        kind, size = header[156], int(extended.pop("size", 0)) or _number(header[124:136])
        if kind in _WITHOUT_DATA:
            size = 0
        offset = position + BLOCK
        position = offset + -(-size // BLOCK) * BLOCK
        if offset + size > end:
            raise tarfile.ReadError("its end is missing")
        if kind in b"xLK":
            try:
                extended |= _extension(kind, read(offset, size))
            except ValueError:
                raise tarfile.ReadError(f"the header at byte {offset:,} is damaged") from None
            continue
        name = extended.pop("path", "") or _name(header)
        link = extended.pop("linkpath", "") or _text(header[157:257])
        if kind == ord("S") or any(key.startswith("GNU.sparse") for key in extended):
            raise tarfile.ReadError(f"{name} is stored as a sparse file")
        extended = {}
        if kind in _REGULAR and not name.endswith("/"):
            yield Member(name, offset, size)
        elif kind == ord("1"):
            yield Member(name, offset, 0, link)


def _extension(kind: int, data: bytes) -> dict[str, str]:
    if kind != ord("x"):
        return {"path" if kind == ord("L") else "linkpath": _text(data)}
    found = {}
    while data and data[0]:
        length, _, _ = data.partition(b" ")
        end = int(length)
        key, equals, value = data[len(length) + 1 : end - 1].partition(b"=")
        if not equals:
            raise ValueError("not a record of a pax header")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        data = data[end:]
    return found


def _name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU: base 256
        return int.from_bytes(field[1:], "big")
    return int(field.partition(b"\0")[0].strip() or b"0", 8)
