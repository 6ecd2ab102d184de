"""Arrow shards: the schema and the manifest of a data set.

A data set is a directory with `manifest.json` and, for each split, an index and shards: Arrow IPC files of one record
batch each, so that a sample is a slice of one mapped buffer. A sample id is the sample's row, counted over the shards
of its split. The index repeats the small columns of all of them, so that whoever draws crop boxes need not touch, or
even have, the shards.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from configs import LonghaulError

FORMAT = 2
SCHEMA = pa.schema(
    [
        pa.field("image", pa.binary(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("crc32", pa.uint32(), nullable=False),
    ]
)
INDEX_SCHEMA = pa.schema([SCHEMA.field(name) for name in ("label", "height", "width", "crc32")])


@dataclass(frozen=True)
class Shard:
    """One file: its name in the data set's directory, number of rows, size in bytes and SHA-256."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a data set holds.

    Attributes:
        splits: the shards of each split, in the order of sample ids.
        indexes: the index of each split.
        mean, std: per channel over the training pixels, images in [0, 1].
        encoding: what the column `image` holds: "jpeg", or "raw" for uint8 pixels [height, width, 3] (RGB).
        options: how it was prepared: `shard_bytes`, and the fields of `ingest.Options`.
        source_bytes: of the images that were read.
        quarantined: key, kind and reason of each image that was left out.
        shuffled: whether samples were put into shards at random; None where that is not known.
    """

    name: str
    classes: list[str]
    splits: dict[str, list[Shard]]
    indexes: dict[str, Shard]
    mean: list[float]
    std: list[float]
    source: str
    encoding: str = "jpeg"
    options: dict[str, Any] = field(default_factory=dict)
    source_bytes: int = 0
    quarantined: list[dict[str, str]] = field(default_factory=list)
    shuffled: bool | None = None
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
        return cls.parse(path.read_bytes(), str(path))

    @classmethod
    def parse(cls, text: bytes, name: str) -> "Manifest":
        """The manifest in the file `name`, which holds `text`."""
        try:
            values: dict[str, Any] = json.loads(text)
            if values["format"] != FORMAT:
                raise LonghaulError(
                    f"{name} has format {values['format']}, this version reads {FORMAT}: prepare the data set again."
                )
            splits = {name: [Shard(**shard) for shard in shards] for name, shards in values.pop("splits").items()}
            indexes = {name: Shard(**index) for name, index in values.pop("indexes").items()}
            return cls(splits=splits, indexes=indexes, **values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LonghaulError(
                f"{name} is not a manifest of Longhaul ({error}): prepare the data set again."
            ) from None


def write_batch(path: Path, batch: pa.RecordBatch) -> Shard:
    """Write one Arrow IPC file of one record batch; returns its entry for the manifest."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(path.name, batch.num_rows, path.stat().st_size, digest)


def map_batch(path: Path, schema: pa.Schema, rows: int) -> pa.RecordBatch:
    """Map the record batch of a file that `write_batch` wrote; raises LonghaulError where it is not that."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batch = reader.get_batch(0)
        if reader.schema != schema or reader.num_record_batches != 1 or batch.num_rows != rows:
            raise pa.ArrowInvalid("it does not hold the rows that the manifest promises")
        batch.validate(full=True)  # offsets and keys; the images' bytes are not read
    except (pa.ArrowException, OSError) as error:
        raise LonghaulError(
            f"The shard {path} cannot be read ({str(error).splitlines()[0].rstrip('.')}): prepare the data set again."
        ) from None
    return batch
