"""What the arms of the benchmark share: arguments, the clock, and the line they print."""

import argparse
import importlib.metadata
import itertools
import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

WARMUP_BATCHES = 10
SIZE = 224
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def arguments(**choices: tuple[str, ...]) -> argparse.Namespace:
    """The arguments every arm takes, and one named option for each of `choices` (the first is the default)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("prepared", type=Path, help="the directory that benchmarks.data.prepare made")
    parser.add_argument("--images", type=int, default=4000, help="how many images to time, after the warm-up")
    parser.add_argument("--threads", type=int, default=2, help="threads, or worker processes where a peer has those")
    parser.add_argument("--batch", type=int, default=64)
    for name, values in choices.items():
        parser.add_argument(f"--{name}", choices=values, default=values[0])
    return parser.parse_args()


def jpeg_paths(folder: Path) -> list[Path]:
    """The JPEGs of a class-per-folder tree, in order."""
    return sorted(folder.glob("*/*.JPEG"))


def repeats(args: argparse.Namespace) -> int:
    """How often a peer goes through the folder's JPEGs, so that no worker runs dry before the clock stops."""
    wanted = args.images + (WARMUP_BATCHES + 8 * args.threads) * args.batch
    return -(-wanted // len(jpeg_paths(args.prepared / "folder")))


def endless(epoch: Iterable[Any]) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from epoch


def measure(
    peer: str,
    args: argparse.Namespace,
    batches: Iterable[Any],
    packages: Iterable[str],
    images_of: Callable[[Any], Any] = lambda batch: batch[0],
) -> None:
    """Time the batches that hold `args.images` images after a warm-up, and print the line.

    `images_of` gets the images out of a batch, as anything numpy can read. One warm-up batch is looked at: a peer that
    did not crop and normalise would show in its shape, mean and deviation.
    """
    iterator = iter(batches)
    first = np.asarray(images_of(next(iterator)))
    for _ in range(WARMUP_BATCHES - 1):
        next(iterator)
    num_batches = args.images // args.batch
    began = time.perf_counter()
    counted = sum(len(images_of(batch)) for batch in itertools.islice(iterator, num_batches))
    seconds = time.perf_counter() - began
    if counted != num_batches * args.batch:
        raise RuntimeError(f"{peer} gave {counted} images, not {num_batches} batches of {args.batch}")
    channels = first.shape.index(3)
    report(
        peer, args, counted, seconds, str(first.dtype), "NHWC" if first.strides[channels] == first.itemsize else "NCHW",
        shape=list(first.shape), mean=round(float(first.mean()), 2), std=round(float(first.std()), 2),
        versions={name: importlib.metadata.version(name) for name in packages},
    )  # fmt: skip


def report(
    peer: str, args: argparse.Namespace, images: int, seconds: float, dtype: str, layout: str, **more: Any
) -> None:
    """Print the line by which `benchmarks.data.run` knows an arm."""
    line = {
        "peer": peer, "images": images, "seconds": seconds, "images_per_second": round(images / seconds, 1),
        "threads": args.threads, "batch": args.batch, "dtype": dtype, "layout": layout,
        "python": platform.python_version(), **more,
    }  # fmt: skip
    print(json.dumps(line), flush=True)
