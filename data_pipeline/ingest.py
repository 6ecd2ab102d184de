"""`longhaul prepare`: every image verified by decoding, repaired where possible, and written into Arrow shards."""

import io
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from configs import LonghaulError
from data_pipeline.shards import INDEX_SCHEMA, SCHEMA, Manifest, Shard, map_batch, write_batch
from data_pipeline.sources import Item, Source

SHARD_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Row:
    """One verified image, ready for a shard."""

    image: bytes
    label: int
    height: int
    width: int
    key: str


class _Statistics:
    """Per-channel mean and standard deviation of pixels in [0, 1], from exact integer sums."""

    def __init__(self) -> None:
        self._count = 0
        self._sum = np.zeros(3, np.int64)
        self._squares = np.zeros(3, np.int64)

    def add(self, pixels: np.ndarray) -> None:
        flat = pixels.reshape(-1, 3)
        values = np.arange(256, dtype=np.int64)
        for channel in range(3):
            histogram = np.bincount(flat[:, channel], minlength=256)
            self._sum[channel] += histogram @ values
            self._squares[channel] += histogram @ (values * values)
        self._count += len(flat)

    def result(self) -> tuple[list[float], list[float]]:
        count = max(self._count, 1)
        mean = self._sum / count
        std = np.sqrt(np.maximum(self._squares / count - mean**2, 0))
        return [round(float(m) / 255, 6) for m in mean], [round(float(s) / 255, 6) for s in std]


def prepare(
    source: Source,
    out: Path,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Write `source` as a data set into the new directory `out`; the same source gives the same bytes.

    Images that cannot be decoded are left out and named, with the reason, in the manifest's `quarantined`. The
    directory appears only when it is whole. `progress(done, total)` is called after each image. Raises
    LonghaulError when `out` exists.
    """
    if out.exists():
        raise LonghaulError(f"{out} exists already: remove it, or give another --out.")
    listing = source.listing()
    items = listing.items
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    statistics = _Statistics()
    quarantined: list[dict[str, str]] = []
    splits: dict[str, list[Shard]] = {}
    done = 0

    def rows(split_items: list[Item]) -> Iterator[Row]:
        nonlocal done
        for item, data in zip(split_items, source.read(split_items), strict=True):
            try:
                if isinstance(data, OSError):
                    raise data
                row, pixels = _verify(item, data)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                quarantined.append({"key": item.key, "reason": str(error)})
            else:
                if item.split == "train":
                    statistics.add(pixels)
                yield row
            done += 1
            if progress is not None:
                progress(done, len(items))

    for split in ("train", "val"):
        split_items = [item for item in items if item.split == split]
        if split_items:
            splits[split] = _write_split(unfinished, split, rows(split_items), shard_bytes)
    if not splits.get("train"):
        raise LonghaulError(f"No image of '{source.name}' could be decoded; nothing was written.")
    mean, std = statistics.result()
    indexes = {split: _write_index(unfinished, split, shards) for split, shards in splits.items()}
    manifest = Manifest(source.name, listing.classes, splits, indexes, mean, std, source.name, quarantined=quarantined)
    manifest.write(unfinished)
    unfinished.rename(out)
    return manifest


def _verify(item: Item, data: bytes) -> tuple[Row, np.ndarray]:
    """Decode an image whole; re-encode what DALI would not take as it is (CMYK, PNG and others under a JPEG's name)."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        if image.mode[0] in "IF":  # converting would not scale, but clip
            raise ValueError(f"its pixels have more than 8 bits (mode {image.mode}); convert it to 8 bits")
        if image.format != "JPEG" or image.mode not in ("RGB", "L"):
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=95, subsampling=0)
            data = buffer.getvalue()
        width, height = image.size
        return Row(data, item.label, height, width, item.key), np.asarray(image.convert("RGB"))


def _write_split(directory: Path, split: str, rows: Iterator[Row], shard_bytes: int) -> list[Shard]:
    shards: list[Shard] = []
    pending: list[Row] = []
    size = 0
    for row in rows:
        pending.append(row)
        size += len(row.image)
        if size >= shard_bytes:
            shards.append(_write_shard(directory, f"{split}-{len(shards):05d}.arrow", pending))
            pending, size = [], 0
    if pending:
        shards.append(_write_shard(directory, f"{split}-{len(shards):05d}.arrow", pending))
    return shards


def _write_shard(directory: Path, file: str, rows: list[Row]) -> Shard:
    columns = [
        pa.array([r.image for r in rows], pa.binary()),
        pa.array([r.label for r in rows], pa.int32()),
        pa.array([r.height for r in rows], pa.int32()),
        pa.array([r.width for r in rows], pa.int32()),
        pa.array([r.key for r in rows], pa.string()),
        pa.array([zlib.crc32(r.image) for r in rows], pa.uint32()),
    ]
    return write_batch(directory / file, pa.record_batch(columns, schema=SCHEMA))


def _write_index(directory: Path, split: str, shards: list[Shard]) -> Shard:
    batches = [map_batch(directory / shard.file, SCHEMA, shard.rows).select(INDEX_SCHEMA.names) for shard in shards]
    whole = pa.Table.from_batches(batches, INDEX_SCHEMA).combine_chunks().to_batches()[0]
    return write_batch(directory / f"{split}.index.arrow", whole)
