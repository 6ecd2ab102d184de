"""Arrow shards: the schema, the manifest, and zero-copy reading by sample id.

A data set is a directory with `manifest.json` and, for each split, Arrow IPC files of one record batch each (so that a
sample is a slice of one mapped buffer). A sample id is the sample's row, counted over the shards of its split.
"""

import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from configs import LonghaulError

FORMAT = 1
SCHEMA = pa.schema(
    [
        pa.field("jpeg", pa.binary(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("crc32", pa.uint32(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Shard:
    """One file: its name in the data set's directory, number of rows, size in bytes and SHA-256."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a data set holds. `mean` and `std` are per channel over the training pixels, images in [0, 1]."""

    name: str
    classes: list[str]
    splits: dict[str, list[Shard]]
    mean: list[float]
    std: list[float]
    source: str
    quarantined: list[dict[str, str]] = field(default_factory=list)
    format: int = FORMAT

    def num_samples(self, split: str) -> int:
        return sum(shard.rows for shard in self.splits.get(split, []))

    def write(self, directory: Path) -> None:
        (directory / "manifest.json").write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        path = directory / "manifest.json"
        if not directory.is_dir():
            raise LonghaulError(
                f"There is no data set at {directory}: make one with `longhaul prepare SOURCE --out {directory}`."
            )
        if not path.is_file():
            raise LonghaulError(
                f"{directory} has no manifest.json, so it is not a data set: "
                f"make one with `longhaul prepare SOURCE --out DIR`."
            )
        try:
            values: dict[str, Any] = json.loads(path.read_text())
            if values["format"] != FORMAT:
                raise LonghaulError(
                    f"{path} has format {values['format']}, this version reads {FORMAT}: prepare the data set again."
                )
            splits = {name: [Shard(**shard) for shard in shards] for name, shards in values.pop("splits").items()}
            return cls(splits=splits, **values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LonghaulError(
                f"{path} is not a manifest of Longhaul ({error}): prepare the data set again."
            ) from None


class Split:
    """Memory-mapped samples of one split.

    Attributes:
        labels: int32 [num_samples].
        sizes: int32 [num_samples, 2], (height, width) of each image.
    """

    def __init__(self, directory: Path, name: str) -> None:
        """Map the shards of split `name`; raises LonghaulError naming the first shard that cannot be read."""
        self.manifest = Manifest.read(directory)
        shards = self.manifest.splits.get(name, [])
        if not shards:
            raise LonghaulError(
                f"{directory} has no split '{name}'; it has {', '.join(self.manifest.splits) or 'none'}."
            )
        self._paths = [directory / shard.file for shard in shards]
        batches = [_open(path, shard.rows) for path, shard in zip(self._paths, shards, strict=True)]
        self._offsets = [np.frombuffer(b.column(0).buffers()[1], np.int32)[: b.num_rows + 1] for b in batches]
        self._values = [np.frombuffer(b.column(0).buffers()[2], np.uint8) for b in batches]
        self._batches = batches
        self._ends = np.cumsum([shard.rows for shard in shards])
        self.labels: NDArray[np.int32] = np.concatenate([b.column(1).to_numpy() for b in batches])
        heights = np.concatenate([b.column(2).to_numpy() for b in batches])
        widths = np.concatenate([b.column(3).to_numpy() for b in batches])
        self.sizes: NDArray[np.int32] = np.stack([heights, widths], axis=1)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def jpegs(self, ids: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Views of the mapped JPEG bytes of samples: nothing is copied or read until the decoder touches it."""
        views = []
        for sample, shard in zip(ids.tolist(), np.searchsorted(self._ends, ids, side="right").tolist(), strict=True):
            offsets = self._offsets[shard]
            row = sample - (int(self._ends[shard]) - (len(offsets) - 1))
            views.append(self._values[shard][offsets[row] : offsets[row + 1]])
        return views

    def key(self, sample: int) -> str:
        """The name under which a sample was ingested."""
        shard, row = self._find(sample)
        return str(self._batches[shard].column(4)[row].as_py())

    def check_bytes(self, ids: NDArray[np.int64]) -> None:
        """Raise LonghaulError naming the first of these samples that has not the bytes it was ingested with."""
        for sample, view in zip(ids.tolist(), self.jpegs(ids), strict=True):
            shard, row = self._find(sample)
            if zlib.crc32(view.data) != self._batches[shard].column(5)[row].as_py():
                raise LonghaulError(
                    f"{self._paths[shard]}: the image {self.key(sample)} does not have the bytes that were written: "
                    f"prepare the data set again."
                )

    def _find(self, sample: int) -> tuple[int, int]:
        """The shard and the row in it of a sample."""
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        return shard, sample - (int(self._ends[shard]) - self._batches[shard].num_rows)


def _open(path: Path, rows: int) -> pa.RecordBatch:
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batch = reader.get_batch(0)
        if reader.schema != SCHEMA or reader.num_record_batches != 1 or batch.num_rows != rows:
            raise pa.ArrowInvalid("it does not hold the rows that the manifest promises")
        batch.validate(full=True)  # offsets and keys; the images' bytes are not read
    except (pa.ArrowException, OSError) as error:
        raise LonghaulError(
            f"The shard {path} cannot be read ({str(error).splitlines()[0].rstrip('.')}): prepare the data set again."
        ) from None
    return batch
