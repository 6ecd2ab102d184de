"""One shard, mapped; or one that cannot be."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards import SCHEMA, map_batch


class Mapped:
    """A shard whose first row is sample `first`. Views of its images keep the mapping alive."""

    def __init__(self, path: Path, rows: int, first: int) -> None:
        self._batch, self._first = map_batch(path, SCHEMA, rows), first
        buffers = self._batch.column("image").buffers()
        self._offsets = np.frombuffer(buffers[1], np.int32)
        self._values = np.frombuffer(buffers[2], np.uint8)

    def image(self, sample: int) -> NDArray[np.uint8]:
        row = sample - self._first
        return self._values[self._offsets[row] : self._offsets[row + 1]]

    def ids(self) -> NDArray[np.int64]:
        """The ids of its samples."""
        return np.arange(self._first, self._first + self._batch.num_rows)

    def column(self, name: str) -> NDArray[Any]:
        """A column of numbers."""
        return self._batch.column(name).to_numpy()

    def key(self, sample: int) -> str:
        return str(self._batch.column("key")[sample - self._first].as_py())


class Unreadable:
    """Stands for a shard that cannot be mapped: none of its images has its bytes."""

    def image(self, sample: int) -> NDArray[np.uint8]:
        del sample
        return np.empty(0, np.uint8)

    def key(self, sample: int) -> str:
        del sample
        return "the shard cannot be read"
