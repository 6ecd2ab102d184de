"""Zero-copy reading of one split by sample id."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from isal import isal_zlib
from numpy.typing import NDArray

from configs import LonghaulError
from data_pipeline.shards import INDEX_SCHEMA, SCHEMA, Manifest, Shard, map_batch


class Split:
    """Memory-mapped samples of one split. What grows with the number of samples is mapped, not in memory.

    Attributes:
        directory: of the data set.
        manifest: of the whole data set.
        labels: int32 [num_samples].
        sizes: int32 [num_samples, 2], (height, width) of each image.
        crcs: uint32 [num_samples], CRC-32 of each image's bytes.
        shard_ends: int64 [num_shards], the number of samples in the shards up to and including each.
    """

    def __init__(self, directory: Path, name: str) -> None:
        """Map the index of split `name`; raises LonghaulError naming the first file that is missing or not whole."""
        self.manifest = Manifest.read(directory)
        self.directory = directory
        self._shards = self.manifest.splits.get(name, [])
        if not self._shards:
            raise LonghaulError(
                f"{directory} has no split '{name}'; it has {', '.join(self.manifest.splits) or 'none'}."
            )
        index = _open_index(directory, self.manifest.indexes[name])
        self.labels: NDArray[np.int32] = index.column("label").to_numpy()
        self.sizes: NDArray[np.int32] = np.stack([index.column(c).to_numpy() for c in ("height", "width")], axis=1)
        self.crcs: NDArray[np.uint32] = index.column("crc32").to_numpy()
        self.shard_ends = np.cumsum([shard.rows for shard in self._shards])
        firsts = (self.shard_ends - [shard.rows for shard in self._shards]).tolist()
        self._mapped = [
            _Mapped(directory / s.file, s.rows, first) for s, first in zip(self._shards, firsts, strict=True)
        ]

    def __len__(self) -> int:
        return int(self.shard_ends[-1])

    def images(self, ids: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Views of the mapped bytes of samples: nothing is copied or read until the decoder touches it.

        Each is uint8: [bytes] of a JPEG, or pixels [height, width, 3] where the data set holds those.
        """
        shards = np.searchsorted(self.shard_ends, ids, side="right")
        views = [self._mapped[shard].image(sample) for sample, shard in zip(ids.tolist(), shards.tolist(), strict=True)]
        if self.manifest.encoding == "raw":
            return [view.reshape(*size, 3) for view, size in zip(views, self.sizes[ids].tolist(), strict=True)]
        return views

    def key(self, sample: int) -> str:
        """The name under which a sample was ingested."""
        return self._mapped[self.shard_of(sample)].key(sample)

    def shard_of(self, sample: int) -> int:
        """The number of the shard that holds a sample."""
        return int(np.searchsorted(self.shard_ends, sample, side="right"))

    def where(self, sample: int) -> str:
        """The shard, the row and the key of a sample, for people."""
        shard = self.shard_of(sample)
        row = sample - int(self.shard_ends[shard]) + self._shards[shard].rows
        return f"{self.directory / self._shards[shard].file}, row {row} ({self.key(sample)})"

    def unlike_index(self) -> list[int]:
        """The samples of which a shard says something else than the index."""
        unlike: list[int] = []
        for mapped in self._mapped:
            ids = mapped.ids()
            said = [mapped.column(name) for name in INDEX_SCHEMA.names]
            expected = [self.labels[ids], self.sizes[ids, 0], self.sizes[ids, 1], self.crcs[ids]]
            unlike += ids[np.any([a != b for a, b in zip(said, expected, strict=True)], axis=0)].tolist()
        return unlike

    def damaged(self, ids: NDArray[np.int64], views: list[NDArray[np.uint8]]) -> list[int]:
        """The places in `ids` of the samples whose bytes, `views`, are not those that were ingested."""
        crcs = self.crcs[ids]
        return [i for i, view in enumerate(views) if isal_zlib.crc32(view) != crcs[i]]


class _Mapped:
    """One mapped shard, whose first row is sample `first`."""

    def __init__(self, path: Path, rows: int, first: int) -> None:
        self._batch, self._first = map_batch(path, SCHEMA, rows), first
        buffers = self._batch.column("image").buffers()
        self._offsets = np.frombuffer(buffers[1], np.int32)
        self._values = np.frombuffer(buffers[2], np.uint8)

    def image(self, sample: int) -> NDArray[np.uint8]:
        row = sample - self._first
        return self._values[self._offsets[row] : self._offsets[row + 1]]

    def ids(self) -> NDArray[np.int64]:
        return np.arange(self._first, self._first + self._batch.num_rows)

    def column(self, name: str) -> NDArray[Any]:
        return self._batch.column(name).to_numpy()

    def key(self, sample: int) -> str:
        return str(self._batch.column("key")[sample - self._first].as_py())


def _open_index(directory: Path, index: Shard) -> pa.RecordBatch:
    """The index decides which samples there are and how they are cropped, so its checksum is verified."""
    path = directory / index.file
    batch = map_batch(path, INDEX_SCHEMA, index.rows)
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != index.sha256:
            raise LonghaulError(f"{path} does not have the bytes that were written: prepare the data set again.")
    return batch
