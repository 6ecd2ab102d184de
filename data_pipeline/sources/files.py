"""Named files: where each lies, and its contents."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from data_pipeline.sources.storage import Store


class Entry(NamedTuple):
    """Where a file lies, in the words of whoever lists it, and its size in bytes."""

    path: str
    size: int


class Located(Protocol):
    """An entry, or an item made of one."""

    @property
    def path(self) -> str: ...
    @property
    def size(self) -> int: ...


class Files(Protocol):
    """Named files. Pickled, they are still able to read what they listed."""

    def locate(self, name: str) -> str:
        """A file's name for people; of all of them together for ""."""
        ...

    def entries(self) -> dict[str, Entry]:
        """Every file by name. Of two with a name the later counts, as it would after unpacking."""
        ...

    def read(self, wanted: Sequence[Located]) -> Iterator[bytes | OSError]:
        """The contents of files, in order; an error in the place of one that cannot be read."""
        ...


class FolderFiles:
    """The files in a folder and below."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def locate(self, name: str) -> str:
        return self.store.locate(name)

    def entries(self) -> dict[str, Entry]:
        return {name: Entry(name, size) for name, size in self.store.find().items()}

    def read(self, wanted: Sequence[Located]) -> Iterator[bytes | OSError]:
        return self.store.read_files([one.path for one in wanted])


class Peeked:
    """Files that were looked at before they are listed, which then need not be scanned again."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._entries: dict[str, Entry] | None = None

    def locate(self, name: str) -> str:
        return self._files.locate(name)

    def peek(self) -> dict[str, Entry]:
        """What `entries` will return; kept until then."""
        if self._entries is None:
            self._entries = self._files.entries()
        return self._entries

    def entries(self) -> dict[str, Entry]:
        found, self._entries = self.peek(), None
        return found

    def read(self, wanted: Sequence[Located]) -> Iterator[bytes | OSError]:
        return self._files.read(wanted)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_entries": None}
