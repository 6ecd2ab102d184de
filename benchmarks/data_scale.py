"""What a large data set costs to open and to seek in: seconds and memory against the number of samples.

    python -m benchmarks.data_scale [--samples 12800,128000,1281167]

Data sets of tiny JPEGs with the rows of ImageNet are written to a scratch directory; each is measured by a process of
its own: opening the split, and the first micro-batch of a step in the middle of epoch 89, decoded; and the memory of
the process that is its own and not the mapped files'.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.common import machine, write
from data_pipeline.shards import INDEX_SCHEMA, SCHEMA, Manifest, write_batch
from data_pipeline.sources import open_source

_SHARD_ROWS = 1_160  # about 128 MiB of ImageNet
_EPOCH = 89


def make(out: Path, samples: int) -> None:
    """A data set of `samples` tiny JPEGs, in shards of as many rows as ImageNet's have."""
    out.mkdir()
    source = open_source("digits", 0.0)
    jpegs = [data for data in source.read(source.listing().items[:_SHARD_ROWS]) if isinstance(data, bytes)]
    shards, indexes = [], []
    for first in range(0, samples, _SHARD_ROWS):
        rows = min(_SHARD_ROWS, samples - first)
        keys = [f"train/n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(first, first + rows)]
        labels = [i % 1000 for i in range(first, first + rows)]
        columns = [jpegs[:rows], labels, [8] * rows, [8] * rows, keys, [zlib.crc32(jpeg) for jpeg in jpegs[:rows]]]
        batch = pa.record_batch(columns, schema=SCHEMA)
        shards.append(write_batch(out / f"train-{len(shards):05d}.arrow", batch))
        indexes.append(batch.select(INDEX_SCHEMA.names))
    whole = pa.Table.from_batches(indexes).combine_chunks().to_batches()[0]
    index = write_batch(out / "train.index.arrow", whole)
    Manifest(
        "scale", [str(i) for i in range(1000)], {"train": shards}, {"train": index}, [0.5] * 3, [0.5] * 3, ""
    ).write(out)


def measure(data: Path) -> dict[str, float]:
    """Seconds and memory, in this process; everything that does not depend on the data is imported before."""
    import torch

    from configs.schema import Input, PadCrop
    from data_pipeline.loader import training_batches
    from data_pipeline.order import Order
    from data_pipeline.split import Split
    from trainer.dealing import Work

    config = Input(size=8, mean=(0.5,) * 3, std=(0.5,) * 3, crop=PadCrop(padding=1))
    before = _anonymous_mib()
    began = time.perf_counter()
    split = Split(data, "train")
    opened = time.perf_counter()
    order = Order(0, len(split), 256, 32)
    step = (_EPOCH * len(split) + len(split) // 2) // 256
    batch = next(training_batches(split, config, order, Work(step, step + 100, range(8)), torch.device("cpu"), 1))
    done = time.perf_counter()
    assert int(batch.records[0, 0]) == _EPOCH
    began_draw = time.perf_counter()
    for later in range(200):
        order.micro_batch(step + later, 0)
    drawn = (time.perf_counter() - began_draw) / 200
    return {
        "samples": len(split),
        "open_seconds": round(opened - began, 4),
        "first_batch_seconds": round(done - opened, 4),
        "order_of_32_samples_seconds": round(drawn, 6),
        "memory_mib": round(_anonymous_mib() - before, 1),
    }


def _anonymous_mib() -> float:
    """Memory of this process that belongs to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", default="12800,128000,1281167")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", type=Path)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    where = machine()
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for samples in map(int, arguments.samples.split(",")):
            data = Path(scratch) / str(samples)
            make(data, samples)
            for _ in range(arguments.rounds):
                command = [sys.executable, "-m", "benchmarks.data_scale", "--measure", str(data)]
                told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                results.append(json.loads(told.splitlines()[-1]))
                print(results[-1], flush=True)
    medians = [
        {key: float(np.median([r[key] for r in results if r["samples"] == n])) for key in results[0]}
        for n in sorted({r["samples"] for r in results})
    ]
    print(write("data-scale", {"medians": medians, "rounds": results}, where))


if __name__ == "__main__":
    main()
