"""Training batches on the CPU: DALI decodes, and threads bring the regions straight into the batch.

Each region is resized, mirrored and normalised by one thread while it is in that core's cache; passing it on between
operators would cost as much again. What a recipe has done to pixels in between (`distort`) needs the operators.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from configs.schema import Input, PadCrop
from data_pipeline.buffers import Buffers
from data_pipeline.distort import num_inputs
from data_pipeline.feed import Sound
from data_pipeline.normalise import coefficients, normalise
from data_pipeline.resize import resize
from data_pipeline.threads import Threads

Shifts = Callable[[NDArray[np.int64]], NDArray[np.float32] | None]


@dataclass(frozen=True)
class Regions:
    """What lies in the crop boxes of a micro-batch, and what is to become of it.

    Attributes:
        images: uint8 [height, width, 3] each.
        flips: int32 [n].
        records: int64 [n, 8].
        sizes: int32 [n, 2], the (height, width) to resize to, the same for all.
    """

    images: list[NDArray[np.uint8]]
    flips: NDArray[np.int32]
    records: NDArray[np.int64]
    sizes: NDArray[np.int32]


def is_direct(config: Input) -> bool:
    """Whether regions are resized and nothing else is done to their pixels before they are normalised."""
    return not isinstance(config.crop, PadCrop) and not num_inputs(config)


def raw_regions(count: int, prepare: Callable[[int], tuple[Sound, tuple[Any, ...]]]) -> Generator[Regions, None, None]:
    """The regions of `count` batches of raw pixels: nothing to decode."""
    for index in range(count):
        samples, (anchors, shapes, flips, records, sizes) = prepare(index)
        boxes = zip(samples.images, anchors.tolist(), shapes.tolist(), strict=True)
        yield Regions([image[y : y + h, x : x + w] for image, (y, x), (h, w) in boxes], flips, records, sizes)


def direct_batches(
    regions: Generator[Regions, None, None], config: Input, threads: Threads, shifts: Shifts
) -> Iterator[tuple[torch.Tensor, NDArray[np.int64]]]:
    """(images float32 [n, 3, size, size], normalised, channels-last; records) of each batch, one made ahead."""
    buffers = Buffers()

    def make() -> tuple[torch.Tensor, NDArray[np.int64]] | None:
        batch = next(regions, None)
        if batch is None:
            return None
        images, flips, size = batch.images, batch.flips.tolist(), batch.sizes[0].tolist()
        scales, offsets = coefficients(config, size[1], shifts(batch.records))
        offsets = offsets.expand(len(images), -1)
        rows = buffers.take((len(images), size[0], 3 * size[1]))
        threads.each(
            len(images), lambda i: normalise(resize(images[i], size, bool(flips[i])), scales, offsets[i], rows[i])
        )
        return rows.view(len(images), *size, 3).permute(0, 3, 1, 2), batch.records

    with closing(regions), ThreadPoolExecutor(1, "direct") as ahead:
        coming: deque[Future[tuple[torch.Tensor, NDArray[np.int64]] | None]] = deque([ahead.submit(make)])
        try:
            while made := coming.popleft().result():
                coming.append(ahead.submit(make))
                yield made
        finally:
            ahead.shutdown(cancel_futures=True)
