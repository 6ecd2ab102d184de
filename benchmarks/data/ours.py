"""Longhaul's own arms: Arrow shards, exact crop boxes and flips, every image's checksum verified; float32 on the CPU.

The images are those the peers read: the originals, the 500-pixel q90 JPEGs of FFCV's own resizer, or raw pixels of at
most 256. What the loader does is what it does in training; nothing is left out.
"""

import gc
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.data.peers.common import AREA, MEAN, RATIO, SIZE, STD, arguments, measure
from configs.schema import Input, ResizedCrop
from data_pipeline.loader import training_batches
from data_pipeline.order import Order
from data_pipeline.split import Split
from trainer.dealing import Work
from trainer.memory import keep_freed_memory

VARIANTS = {
    "original": ("folder", ()),
    "500-q90": ("folder-500-q90", ()),
    "raw-256": ("folder", ("--raw", "--max-side", "256")),
}


def data_set(prepared: Path, variant: str) -> Path:
    """The data set of a variant, ingested the first time it is asked for."""
    folder, options = VARIANTS[variant]
    out = prepared / f"longhaul-{variant}"
    if not out.exists():
        command = [sys.executable, "-m", "launch.cli", "prepare", str(prepared / folder), "--out", str(out), *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def main() -> None:
    args = arguments(variant=tuple(VARIANTS))
    keep_freed_memory()  # as every worker does
    torch.set_num_threads(args.threads)
    split = Split(data_set(args.prepared, args.variant), "train")
    crop = ResizedCrop(area=AREA, ratio=RATIO)
    config = Input(size=SIZE, mean=MEAN, std=STD, crop=crop, eval_resize=256)
    order = Order(0, len(split), args.batch, args.batch)
    work = Work(0, 10**6, range(1))
    batches = training_batches(split, config, order, work, torch.device("cpu"), args.threads)
    gc.freeze()
    packages = ("nvidia-dali-cuda130", "torch", "pyarrow")
    measure(f"Longhaul, {args.variant}", args, batches, packages, lambda batch: batch.images)


if __name__ == "__main__":
    main()
