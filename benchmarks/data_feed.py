"""What it costs to feed DALI without decoding: images/s and CPU time an image, against DALI's own file reader.

    python -m benchmarks.data_feed ../shared/data/imagenet-500.tar

Each arm gives every image to DALI, which reads its header (`peek_image_shape`), so that a GPU could decode it:
`feed` is the whole of ours (order, crop boxes, flips, checksums, zero-copy views); `feed-unchecked` leaves the
checksums out; `file-reader` is DALI's reader of a folder with its shuffle. From the CPU time an image follows how many
cores feed eight GPUs at 4,000 images/s each.
"""

import argparse
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from nvidia.dali import fn, pipeline_def

from benchmarks.common import machine, write
from configs import load_recipe
from data_pipeline.augment import augment
from data_pipeline.feed import Feed, Sound, sound
from data_pipeline.ingest import prepare
from data_pipeline.order import Order
from data_pipeline.records import training_records
from data_pipeline.shards import INDEX_SCHEMA, SCHEMA, Manifest, map_batch, write_batch
from data_pipeline.sources import open_source
from data_pipeline.split import Split

_BATCH = 256
_GPUS, _RATE = 8, 4_000


def repeated(source: Path, out: Path, times: int) -> Path:
    """The images of `source`, prepared, each written `times` times, so that they do not all fit into a cache."""
    once = out / "once"
    prepare(open_source(str(source), 0.0), once)
    manifest = Manifest.read(once)
    batches = [map_batch(once / shard.file, SCHEMA, shard.rows) for shard in manifest.splits["train"]]
    many = out / "many"
    many.mkdir()
    shards = [write_batch(many / f"train-{i:05d}.arrow", b) for i, b in enumerate(batches * times)]
    table = pa.Table.from_batches([batch.select(INDEX_SCHEMA.names) for batch in batches * times])
    index = write_batch(many / "train.index.arrow", table.combine_chunks().to_batches()[0])
    Manifest("x", manifest.classes, {"train": shards}, {"train": index}, manifest.mean, manifest.std, "").write(many)
    return many


def run_feed(data: Path, images: int, threads: int, checked: bool) -> dict[str, float]:
    """Our feed into DALI."""
    split = Split(data, "train")
    config = load_recipe("resnet50").input
    order = Order(0, len(split), _BATCH, _BATCH)

    def prepare_batch(index: int) -> tuple[Sound, tuple[Any, ...]]:
        epochs, ids = order.micro_batch(index, 0)
        show = sound(split, ids, "fail") if checked else Sound(ids, split.images(ids))
        drawn = augment(config, 0, epochs, show.ids, split.sizes[show.ids])
        records = training_records(epochs, ids, show.ids, drawn)
        return show, (drawn.boxes[:, :2].copy(), drawn.boxes[:, 2:].copy(), drawn.flips, records)

    feed = Feed(images // _BATCH, prepare_batch)

    @pipeline_def(batch_size=_BATCH, num_threads=threads, device_id=None, exec_dynamic=True, prefetch_queue_depth=2)
    def pipeline() -> Any:
        jpegs, *others = fn.external_source(source=feed, num_outputs=5, batch=True, no_copy=True)
        return fn.peek_image_shape(jpegs), *others

    try:
        return _timed(pipeline(), images)
    finally:
        feed.close()


def run_file_reader(folder: Path, images: int, threads: int) -> dict[str, float]:
    """DALI's own reader."""

    @pipeline_def(batch_size=_BATCH, num_threads=threads, device_id=None, exec_dynamic=True, prefetch_queue_depth=2)
    def pipeline() -> Any:
        jpegs, labels = fn.readers.file(file_root=str(folder), random_shuffle=True, initial_fill=1024)
        return fn.peek_image_shape(jpegs), labels

    return _timed(pipeline(), images)


def _timed(pipeline: Any, images: int) -> dict[str, float]:
    pipeline.build()
    batches = images // _BATCH
    for _ in range(4):
        pipeline.run()
    began, cpu = time.perf_counter(), time.process_time()
    for _ in range(batches - 4):
        pipeline.run()
    count = (batches - 4) * _BATCH
    return {
        "images_per_second": count / (time.perf_counter() - began),
        "cpu_microseconds_an_image": 1e6 * (time.process_time() - cpu) / count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="imagenet-500.tar, or another tar of a class-per-folder tree")
    parser.add_argument("--images", type=int, default=40_960)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    where = machine()
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        data = repeated(arguments.source, Path(scratch), 20)
        folder = Path(scratch) / "tree"
        with tarfile.open(arguments.source) as archive:
            archive.extractall(folder, filter="data")
        arms: dict[str, Callable[[], dict[str, float]]] = {
            "feed": lambda: run_feed(data, arguments.images, threads, checked=True),
            "feed-unchecked": lambda: run_feed(data, arguments.images, threads, checked=False),
            "file-reader": lambda: run_file_reader(folder, arguments.images, threads),
        }
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
        for number in range(arguments.rounds):
            for name in np.roll(list(arms), number).tolist():
                rounds[name].append(arms[name]())
                print(name, rounds[name][-1], flush=True)
    medians = {
        name: {key: round(statistics.median(r[key] for r in found), 1) for key in found[0]}
        for name, found in rounds.items()
    }
    cores = _GPUS * _RATE * medians["feed"]["cpu_microseconds_an_image"] / 1e6
    figures = {"medians": medians, "cores_to_feed_8_gpus_at_4000_images_a_second": round(cores, 2), "rounds": rounds}
    print(medians, f"{cores:.2f} cores feed {_GPUS} GPUs at {_RATE} images/s", write("data-feed", figures, where))


if __name__ == "__main__":
    main()
