"""The unit of work: read the images of one shard, verify them, write the shard and a report of it."""

import itertools
import json
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from isal import isal_zlib

from configs import LonghaulError
from data_pipeline.ingest.plan import Plan, Task
from data_pipeline.ingest.storage import whole_file, writing
from data_pipeline.ingest.verify import Options, StoredImage, Unfit, strict_decoding, verify
from data_pipeline.shards import SCHEMA, Shard, write_batch
from data_pipeline.sources import Item, Source

T = TypeVar("T")
_READ_AHEAD = 16  # images a piece, two pieces ahead
_OFFSET_LIMIT = 2**31  # Arrow's binary type counts bytes in int32
_LEVELS = np.arange(256, dtype=np.int64)


@dataclass(frozen=True)
class PixelSums:
    """Exact sums over pixels, of each channel and of its square; they add up in any order to the same."""

    count: int = 0
    values: list[int] = field(default_factory=lambda: [0, 0, 0])
    squares: list[int] = field(default_factory=lambda: [0, 0, 0])

    @classmethod
    def of_histogram(cls, histogram: np.ndarray) -> "PixelSums":
        """From counts int64 [3, 256]."""
        values, squares = histogram @ _LEVELS, histogram @ _LEVELS**2
        return cls(int(histogram[0].sum()), values.tolist(), squares.tolist())

    def __add__(self, other: "PixelSums") -> "PixelSums":
        return PixelSums(
            self.count + other.count,
            [a + b for a, b in zip(self.values, other.values, strict=True)],
            [a + b for a, b in zip(self.squares, other.squares, strict=True)],
        )

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Of each channel, pixels in [0, 1]."""
        count = max(self.count, 1)
        means = [value / count for value in self.values]
        variances = [max(square / count - mean**2, 0) for square, mean in zip(self.squares, means, strict=True)]
        return [round(mean / 255, 6) for mean in means], [round(variance**0.5 / 255, 6) for variance in variances]


@dataclass(frozen=True)
class ShardReport:
    """What became of one task.

    Attributes:
        task: its file.
        shard: the entry for the manifest; None where no image could be used, and so no file was written.
        images: how many were planned.
        source_bytes: of the images that could be read.
        sums: over the pixels of training images.
        quarantined: key, kind and reason of each image that was left out.
    """

    task: str
    shard: Shard | None
    images: int
    source_bytes: int
    sums: PixelSums
    quarantined: list[dict[str, str]]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ShardReport":
        values: dict[str, Any] = json.loads(text)
        shard, sums = values.pop("shard"), values.pop("sums")
        return cls(shard=shard and Shard(**shard), sums=PixelSums(**sums), **values)


@dataclass(frozen=True)
class WriteShard:
    """Does one task of a plan. It can be pickled, and knows nothing of who calls it where.

    Attributes:
        directory: the unfinished data set, on storage that the caller's machine shares.
        plan_id: the id of the plan in it.
    """

    directory: Path
    plan_id: str
    source: Source
    options: Options

    def __call__(self, task: Task, progress: Callable[[int], None]) -> ShardReport:
        """Write the shard of `task`, whole or not at all; `progress(images)` is told how many of it are done.

        Raises LonghaulError where the directory cannot be seen, a disk is full, or the source cannot be read.
        """
        builder = _Builder(task)
        with strict_decoding():
            self._fill(builder, progress)
        with writing(self.directory):
            shard = self._write(task, builder.batch()) if builder.keys else None
            report = builder.report(shard)
            with whole_file(self.directory, f"done/{Path(task.file).stem}.json") as path:
                path.write_text(report.to_json())
        return report

    def _fill(self, builder: "_Builder", progress: Callable[[int], None]) -> None:
        task = builder.task
        items = self._plan.items(task)
        unread = 0
        for done, (item, data) in enumerate(zip(items, read_ahead(self.source.read(items)), strict=True), 1):
            try:
                if isinstance(data, OSError):
                    unread += 1
                    raise Unfit("unreadable", str(data))
                builder.add(item, len(data), verify(data, self.options, task.split == "train"))
            except Unfit as error:
                builder.leave_out(item, error)
            progress(done)
        if unread == len(items):  # it is not the images, then
            raise LonghaulError(
                f"None of the {unread} images of {task.file} could be read from '{self.source.name}' "
                f"({builder.quarantined[0]['reason']}): see that the source is there; the same command goes on."
            )

    @cached_property
    def _plan(self) -> Plan:
        try:
            plan = Plan.read(self.directory / "plan.arrow")
        except OSError:
            plan = None
        if plan is None or plan.id != self.plan_id:
            raise LonghaulError(
                f"The machine {socket.gethostname()} does not see what is in {self.directory}: "
                f"with several machines, --out must be on storage that all of them share."
            )
        return plan

    def _write(self, task: Task, batch: pa.RecordBatch) -> Shard:
        with whole_file(self.directory, f"data/{task.file}") as path:
            return replace(write_batch(path, batch), file=task.file)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_plan"}


# Runs tasks: yields their reports as they are done, in any order; told how many images of all of them are done.
Executor = Callable[[WriteShard, Sequence[Task], Callable[[int], None]], Iterator[ShardReport]]


class _Builder:
    """The columns of one shard. The images go into one growing buffer, which is what is written."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.keys: list[str] = []
        self.quarantined: list[dict[str, str]] = []
        self._images = bytearray()
        self._offsets = [0]
        self._numbers: list[tuple[int, int, int, int]] = []  # label, height, width, CRC-32
        self._histogram = np.zeros(768, np.int64)
        self._source_bytes = 0

    def add(self, item: Item, source_bytes: int, image: StoredImage) -> None:
        self._images += image.data
        if len(self._images) >= _OFFSET_LIMIT:
            raise LonghaulError(
                f"{self.task.file} would hold more than 2 GiB of images, more than a shard can: "
                f"begin anew (--restart) with a smaller --shard-mib, or a --max-side."
            )
        self._offsets.append(len(self._images))
        self._numbers.append((item.label, image.height, image.width, isal_zlib.crc32(image.data)))
        self.keys.append(item.key)
        self._source_bytes += source_bytes
        if image.histogram is not None:
            self._histogram += image.histogram

    def leave_out(self, item: Item, error: Unfit) -> None:
        self.quarantined.append({"key": item.key, "kind": error.kind, "reason": str(error)})

    def batch(self) -> pa.RecordBatch:
        label, height, width, crc = zip(*self._numbers, strict=True)
        offsets = pa.py_buffer(np.array(self._offsets, np.int32))
        columns = [
            pa.Array.from_buffers(pa.binary(), len(self.keys), [None, offsets, pa.py_buffer(self._images)]),
            *(pa.array(column, pa.int32()) for column in (label, height, width)),
            pa.array(self.keys, pa.string()),
            pa.array(crc, pa.uint32()),
        ]
        return pa.record_batch(columns, schema=SCHEMA)

    def report(self, shard: Shard | None) -> ShardReport:
        sums = PixelSums.of_histogram(self._histogram.reshape(3, 256))
        return ShardReport(self.task.file, shard, self.task.images, self._source_bytes, sums, self.quarantined)


def read_ahead(values: Iterator[T]) -> Iterator[T]:
    """`values`, read by a thread while the caller works: decoding lets other threads run."""
    with ThreadPoolExecutor(1) as pool:
        pieces = deque(pool.submit(_piece, values) for _ in range(2))
        while piece := pieces.popleft().result():
            pieces.append(pool.submit(_piece, values))
            yield from piece


def _piece(values: Iterator[T]) -> list[T]:
    return list(itertools.islice(values, _READ_AHEAD))
