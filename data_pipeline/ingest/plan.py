"""Which image goes into which shard, settled before any is read.

The plan is a function of the listing and the options, so the shards are the same whoever writes them, and when. It is
kept as an Arrow file, so that neither a worker nor a resumed `prepare` has to list the source again.
"""

import json
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from configs import LonghaulError
from data_pipeline.ingest.verify import Options
from data_pipeline.order import permute
from data_pipeline.sources import Item, Listing, Source

SHARD_BYTES = 128 * 2**20
_SHUFFLE_SEED = 0x4C6F6E676861756C  # its own, so that no run's order of samples is correlated with it
_RAW_EXPANSION = 5  # pixels of a photograph need about five times the bytes of its JPEG
_SCHEMA = pa.schema(
    [
        ("label", pa.int32()),
        ("key", pa.large_string()),
        ("path", pa.large_string()),
        ("size", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Task:
    """One shard to write: rows [start, stop) of the plan."""

    file: str
    split: str
    start: int
    stop: int

    @property
    def images(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Settings:
    """What a data set is made of and how; a resumed `prepare` must be given the same.

    Attributes:
        identity: what the source was opened with, by the names that people know; never written into the data set.
    """

    source: str
    options: Options
    shard_bytes: int
    shuffled: bool
    identity: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Flat, by the names that the manifest uses."""
        return {"name": self.source, **self.identity, "shuffled": self.shuffled, **self.recorded()}

    def recorded(self) -> dict[str, Any]:
        """What the manifest says of how the data set was made."""
        return {"shard_bytes": self.shard_bytes, **asdict(self.options)}


@dataclass(frozen=True)
class Plan:
    """The shards to write.

    Attributes:
        id: of this plan alone.
        settings: as `Settings.as_dict` gives them.
        rows: of `_SCHEMA`, in the order in which they will be stored; mapped from the file.
    """

    id: str
    classes: list[str]
    settings: dict[str, Any]
    tasks: list[Task]
    rows: pa.RecordBatch

    def items(self, task: Task) -> list[Item]:
        """The images of one shard."""
        columns = self.rows.slice(task.start, task.images).to_pydict()
        return [Item(task.split, *row) for row in zip(*(columns[name] for name in _SCHEMA.names), strict=True)]

    def write(self, path: Path) -> None:
        kept = {name: getattr(self, name) for name in ("id", "classes", "settings")}
        kept["tasks"] = [asdict(task) for task in self.tasks]
        schema = self.rows.schema.with_metadata({"longhaul": json.dumps(kept)})
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(self.rows)

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Map a plan; raises OSError where there is none."""
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        kept = json.loads(reader.schema.metadata[b"longhaul"])
        kept["tasks"] = [Task(**task) for task in kept["tasks"]]
        return cls(rows=reader.get_batch(0), **kept)


def make_plan(source: Source, settings: Settings) -> Plan:
    """List `source` and cut it into shards of about `shard_bytes` each, of equal sizes within a split."""
    listing = source.listing()
    tasks: list[Task] = []
    rows: list[Item] = []
    for split in ("train", "val"):
        items = [item for item in listing.items if item.split == split]
        if not items:
            continue
        if settings.shuffled and split == "train":
            places = permute(_SHUFFLE_SEED, 0, np.arange(len(items), dtype=np.int64), len(items))
            items = [items[place] for place in places.tolist()]
        sizes = np.array([_stored_bytes(item.size, settings.options) for item in items], np.int64)
        ends = (len(rows) + _cut(sizes, settings.shard_bytes)).tolist()
        starts = [len(rows), *ends[:-1]]
        tasks += [Task(f"{split}-{i:05d}.arrow", split, *row) for i, row in enumerate(zip(starts, ends, strict=True))]
        rows += items
    return Plan(uuid.uuid4().hex, listing.classes, settings.as_dict(), tasks, _columns(listing, rows))


def _columns(listing: Listing, rows: list[Item]) -> pa.RecordBatch:
    if not rows:
        raise LonghaulError(f"There are no images in the source; it lists {len(listing.classes)} classes.")
    columns = [pa.array([getattr(item, field.name) for item in rows], field.type) for field in _SCHEMA]
    return pa.record_batch(columns, schema=_SCHEMA)


def _stored_bytes(size: int, options: Options) -> int:
    """An estimate from the size in the source."""
    if not options.raw:
        return max(size, 1)
    pixels = max(size * _RAW_EXPANSION, 1)
    return pixels if options.max_side is None else min(pixels, 3 * options.max_side**2)


def _cut(sizes: NDArray[np.int64], shard_bytes: int) -> NDArray[np.int64]:
    """Where each shard ends, int64 [num_shards]: as few as hold `shard_bytes` each, then filled evenly."""
    total = int(sizes.sum())
    before = np.cumsum(sizes) - sizes
    shards = before * -(-total // shard_bytes) // total
    return np.append(np.flatnonzero(np.diff(shards)) + 1, len(sizes))


def differences(kept: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """What differs between the settings of a plan and those given now, for people."""
    names = [name for name in {**kept, **given} if kept.get(name) != given.get(name)]
    return [f"{name}: {kept.get(name)} -> {given.get(name)}" for name in names]


def fingerprint(source: str, out: Path) -> dict[str, Any]:
    """What can be told cheaply of a source, to notice when it changes: its place, and of a local file its size and
    time, of a local directory the newest time of its first two levels of folders (but not of the one around `out`)."""
    path = Path(source)
    if not path.exists():
        return {"source": source}
    place = str(path.resolve())
    if path.is_file():
        return {"source": place, "size of the source": path.stat().st_size, "source modified": _when(path)}
    folders = [entry for entry in path.iterdir() if entry.is_dir()]
    if len(folders) <= 10:  # train/ and val/; more are classes, and looking into them would be to list everything
        folders += [entry for folder in folders for entry in folder.iterdir() if entry.is_dir()]
    times = [_when(folder) for folder in (path, *folders) if folder.resolve() != out.resolve().parent]
    return {"source": place, "source modified": max(times, default="")}


def _when(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat()
