"""Zero-copy reading of one split by sample id."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from isal import isal_zlib
from numpy.typing import NDArray

from configs import LonghaulError
from data_pipeline.cache import Cache
from data_pipeline.mapped import Mapped, Unreadable
from data_pipeline.remote import RemoteShards
from data_pipeline.shards import INDEX_SCHEMA, Manifest, Shard, map_batch
from data_pipeline.storage import Location, Store


class Split:
    """Memory-mapped samples of one split. What grows with the number of samples is mapped, not in memory.

    Of a data set at a URL, the index is fetched at once, and the shards when they are wanted: see `remote`.

    Attributes:
        location: of the data set, a directory or a URL.
        manifest: of the whole data set.
        fingerprint: SHA-256 of the manifest, which names that of every shard, and so stands for the whole data set.
        labels: int32 [num_samples].
        sizes: int32 [num_samples, 2], (height, width) of each image.
        crcs: uint32 [num_samples], CRC-32 of each image's bytes.
        shards: as the manifest has them.
        shard_ends: int64 [num_shards], the number of samples in the shards up to and including each.
        remote: how shards are fetched, None where the data set is a directory.
        unreadable: for each shard that could not be mapped, why.
    """

    def __init__(
        self,
        location: Location,
        name: str,
        cache: Cache | None = None,
        damaged: Literal["fail", "substitute"] = "fail",
    ) -> None:
        """Map the index and the shards of split `name`.

        Args:
            location: of the data set.
            name: "train" or "val".
            cache: where the files of a URL are kept, by default the machine's; a directory is used as it is.
            damaged: "fail" raises LonghaulError naming the first shard of a directory that is missing or not whole;
                with "substitute" all its samples count as damaged. An index must be whole in any case.
        """
        self.location = location
        self.manifest, self.fingerprint = read_manifest(location)
        self.shards = self.manifest.splits.get(name, [])
        if not self.shards:
            raise LonghaulError(
                f"{location} has no split '{name}'; it has {', '.join(self.manifest.splits) or 'none'}."
            )
        rows = [shard.rows for shard in self.shards]
        self.shard_ends = np.cumsum(rows)
        self.remote: RemoteShards | None = None
        self.unreadable: list[str] = []
        entry = self.manifest.indexes[name]
        if isinstance(location, Path):
            index = _open_index(location / entry.file, entry)
            firsts = (self.shard_ends - rows).tolist()
            self._mapped = [
                self._map(location / shard.file, shard.rows, first, damaged)
                for shard, first in zip(self.shards, firsts, strict=True)
            ]
        else:
            store, cache = Store(location), cache or Cache()
            index = cache.read(store, entry, lambda path: _open_index(path, entry))
            self.remote = RemoteShards(store, self.shards, cache)
        self.labels: NDArray[np.int32] = index.column("label").to_numpy()
        self.sizes: NDArray[np.int32] = np.stack([index.column(c).to_numpy() for c in ("height", "width")], axis=1)
        self.crcs: NDArray[np.uint32] = index.column("crc32").to_numpy()

    def __len__(self) -> int:
        return int(self.shard_ends[-1])

    def images(self, ids: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Views of the mapped bytes of samples: nothing is copied or read until the decoder touches it. Waits for
        shards that are not here yet.

        Each is uint8: [bytes] of a JPEG, or pixels [height, width, 3] where the data set holds those.
        """
        shards = np.searchsorted(self.shard_ends, ids, side="right").tolist()
        mapped = self._open(shards)
        views = [mapped[shard].image(sample) for sample, shard in zip(ids.tolist(), shards, strict=True)]
        if self.manifest.encoding == "raw":
            return [_as_pixels(view, *size) for view, size in zip(views, self.sizes[ids].tolist(), strict=True)]
        return views

    def key(self, sample: int) -> str:
        """The name under which a sample was ingested."""
        shard = self.shard_of(sample)
        return self._open([shard])[shard].key(sample)

    def shard_of(self, sample: int) -> int:
        """The number of the shard that holds a sample."""
        return int(np.searchsorted(self.shard_ends, sample, side="right"))

    def where(self, sample: int) -> str:
        """The shard, the row and the key of a sample, for people."""
        shard = self.shard_of(sample)
        row = sample - int(self.shard_ends[shard]) + self.shards[shard].rows
        return f"{self.location}/{self.shards[shard].file}, row {row} ({self.key(sample)})"

    def unlike_index(self) -> list[int]:
        """The samples of which a shard says something else than the index."""
        unlike: list[int] = []
        for shard in range(len(self.shards)):
            mapped = self._open([shard])[shard]
            if isinstance(mapped, Unreadable):
                continue
            ids = mapped.ids()
            said = [mapped.column(name) for name in INDEX_SCHEMA.names]
            expected = [self.labels[ids], self.sizes[ids, 0], self.sizes[ids, 1], self.crcs[ids]]
            unlike += ids[np.any([a != b for a, b in zip(said, expected, strict=True)], axis=0)].tolist()
        return unlike

    def damaged(self, ids: NDArray[np.int64], views: list[NDArray[np.uint8]]) -> list[int]:
        """The places in `ids` of the samples whose bytes, `views`, are not those that were ingested. Cached copies
        of their shards are dropped, so that they will be fetched again."""
        crcs = self.crcs[ids]
        places = [i for i, view in enumerate(views) if isal_zlib.crc32(view) != crcs[i]]
        if self.remote is not None:
            self.remote.forget([self.shard_of(int(ids[place])) for place in places])
        return places

    def close(self) -> None:
        """Stop fetching; views that were given out stay valid."""
        if self.remote is not None:
            self.remote.close()

    def _map(self, path: Path, rows: int, first: int, damaged: Literal["fail", "substitute"]) -> Mapped | Unreadable:
        try:
            return Mapped(path, rows, first)
        except LonghaulError as error:
            if damaged == "fail":
                raise
            self.unreadable.append(str(error))
            return Unreadable()

    def _open(self, shards: list[int]) -> Mapping[int, Mapped] | Sequence[Mapped | Unreadable]:
        return self._mapped if self.remote is None else self.remote.batch(sorted(set(shards)))


def _as_pixels(view: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """As an image; left as it is where it cannot be one, for its checksum to tell."""
    return view.reshape(height, width, 3) if view.size == 3 * height * width else view


def read_manifest(location: Location) -> tuple[Manifest, str]:
    """The manifest of a data set, and its SHA-256; raises LonghaulError where there is none."""
    if isinstance(location, Path):
        manifest = Manifest.read(location)
        return manifest, hashlib.sha256((location / "manifest.json").read_bytes()).hexdigest()
    text = Store(location).read("manifest.json")
    return Manifest.parse(text, f"{location}/manifest.json"), hashlib.sha256(text).hexdigest()


def _open_index(path: Path, index: Shard) -> pa.RecordBatch:
    """The index decides which samples there are and how they are cropped, so its checksum is verified."""
    batch = map_batch(path, INDEX_SCHEMA, index.rows)
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != index.sha256:
            raise LonghaulError(f"{path} does not have the bytes that were written: prepare the data set again.")
    return batch
