"""The memory tier: checkpoints in the memory of the cluster's machines, outside the workers, which a failure ends."""

import io
from typing import BinaryIO, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainer.checkpoints.store import MANIFEST, age

Bytes = NDArray[np.uint8]  # 1-D; an array, as Ray passes these on without copying them


class Keeper(Protocol):
    """The memory of one machine, which outlives the workers. All methods raise OSError where it does not answer."""

    def put(self, checkpoint: str, file: str, data: Bytes) -> None:
        """Keep a copy of a file."""
        ...

    def get(self, checkpoint: str, file: str) -> Bytes:
        """A file, to be read only; raises FileNotFoundError where it is not kept here."""
        ...

    def files(self) -> dict[str, list[str]]:
        """The names of the files that are kept here, by checkpoint."""
        ...

    def drop(self, checkpoint: str) -> None:
        """Forget a checkpoint's files, if there are any here."""
        ...


class Keepers(Protocol):
    """The keepers of a cluster. Picklable: every worker is given it."""

    def near_first(self) -> list[Keeper]:
        """Those that can be expected to answer now: this machine's, then the next machines' in a ring, the same for
        all, so that second copies are spread evenly."""
        ...


class HeapKeeper:
    """A keeper that is an object of some process."""

    def __init__(self) -> None:
        self._held: dict[str, dict[str, Bytes]] = {}

    def put(self, checkpoint: str, file: str, data: Bytes) -> None:
        self._held.setdefault(checkpoint, {})[file] = data.copy()

    def get(self, checkpoint: str, file: str) -> Bytes:
        try:
            return self._held[checkpoint][file]
        except KeyError:
            raise FileNotFoundError(f"{checkpoint}/{file} is not kept here") from None

    def files(self) -> dict[str, list[str]]:
        return {checkpoint: list(files) for checkpoint, files in self._held.items()}

    def drop(self, checkpoint: str) -> None:
        self._held.pop(checkpoint, None)


class KeeperStore:
    """Checkpoints in the memory of machines; see `Store`.

    A file goes to `copies` machines, its own first, and the manifest to all. A draft becomes a checkpoint by its
    manifest and keeps its name. Files that went with their machines are found missing when the checkpoint is verified.
    """

    def __init__(self, keepers: Keepers, copies: int) -> None:
        self._keepers, self._copies = keepers, copies

    def __str__(self) -> str:
        count = len(self._keepers.near_first())
        return f"memory of {count} machine{'s' * (count != 1)}"

    def names(self) -> list[str]:
        return sorted((name for name, files in self._files().items() if MANIFEST in files), key=age)

    def locate(self, name: str) -> str:
        return f"{self}, {name}"

    def open(self, name: str, file: str) -> BinaryIO:
        for keeper in self._keepers.near_first():
            try:
                return pa.BufferReader(pa.py_buffer(keeper.get(name, file)))
            except OSError:  # the next may have it
                continue
        raise FileNotFoundError(f"{name}/{file} is in no machine's memory")

    def done_reading(self) -> None:
        """Files are read from shared memory, or from the message that brought them."""

    def begin(self, draft: str) -> None:
        self._drop(draft)

    def create(self, draft: str, file: str) -> BinaryIO:
        return _Sent(self, draft, file)

    def send(self, draft: str, file: str, data: Bytes) -> None:
        """Put a file where it belongs; where fewer machines are left than copies are asked for, on all of these."""
        nearest = self._keepers.near_first()[: self._copies]
        if not nearest:
            raise OSError("no machine keeps checkpoints in its memory")
        for keeper in nearest:
            keeper.put(draft, file, data)

    def commit(self, draft: str, name: str, manifest: bytes) -> str:
        del name
        for keeper in self._keepers.near_first():
            keeper.put(draft, MANIFEST, np.frombuffer(manifest, np.uint8))
        return draft

    def discard(self, draft: str) -> None:
        self._drop(draft)

    def remove(self, name: str) -> None:
        self._drop(name)

    def set_aside(self, name: str, why: str) -> str:
        """Memory is too dear for what is broken or abandoned: it goes."""
        del why
        where = self.locate(name)
        self._drop(name)
        return where

    def sweep(self) -> None:
        for name, files in self._files().items():
            if MANIFEST not in files:
                self._drop(name)

    def _files(self) -> dict[str, set[str]]:
        """Every file that some machine has, by checkpoint or draft."""
        found: dict[str, set[str]] = {}
        for keeper in self._keepers.near_first():
            try:
                held = keeper.files()
            except OSError:  # what it has is not to be had
                continue
            for name, files in held.items():
                found.setdefault(name, set()).update(files)
        return found

    def _drop(self, name: str) -> None:
        for keeper in self._keepers.near_first():
            try:
                keeper.drop(name)
            except OSError:  # gone, or it will be asked again by the next sweep
                continue


class _Sent(io.BytesIO):
    """A file that is in machines' memory when it is closed."""

    def __init__(self, store: KeeperStore, draft: str, file: str) -> None:
        super().__init__()
        self._store, self._draft, self._file = store, draft, file

    def close(self) -> None:
        if not self.closed:
            contents = self.getvalue()
            super().close()
            self._store.send(self._draft, self._file, np.frombuffer(contents, np.uint8))
