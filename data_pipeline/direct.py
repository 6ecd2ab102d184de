"""Training batches of raw pixels on the CPU: nothing to decode, so without DALI.

Each image is cropped, resized, mirrored and normalised by one thread while it is in that core's cache; with nothing to
decode, passing it on between operators would cost as much as the rest.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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

Prepare = Callable[[int], tuple[Sound, tuple[Any, ...]]]
Shifts = Callable[[NDArray[np.int64]], NDArray[np.float32] | None]


def is_direct(config: Input, encoding: str) -> bool:
    """Whether there is nothing to do that needs DALI, on the CPU."""
    return encoding == "raw" and not isinstance(config.crop, PadCrop) and not num_inputs(config)


def direct_batches(
    prepare: Prepare, count: int, config: Input, threads: Threads, shifts: Shifts
) -> Iterator[tuple[torch.Tensor, NDArray[np.int64]]]:
    """(images float32 [n, 3, size, size], normalised, channels-last; records) of `count` batches, one made ahead by a
    thread that prepares it and then has it resized: more threads would contend for the interpreter."""
    buffers = Buffers()

    def make(index: int) -> tuple[torch.Tensor, NDArray[np.int64]]:
        samples, (anchors, shapes, flips, records, sizes) = prepare(index)
        images = samples.images
        height, width = sizes[0].tolist()
        scales, offsets = coefficients(config, len(images), width, shifts(records))
        rows = buffers.take((len(images), height, 3 * width))
        tops_lefts, heights_widths, flipped = anchors.tolist(), shapes.tolist(), flips.tolist()

        def one(i: int) -> None:
            (y, x), (h, w) = tops_lefts[i], heights_widths[i]
            pixels = resize(images[i][y : y + h, x : x + w], [height, width], bool(flipped[i]))
            normalise(pixels, scales, offsets[i], rows[i])

        threads.each(len(images), one)
        return rows.view(len(images), height, width, 3).permute(0, 3, 1, 2), records

    with ThreadPoolExecutor(1, "direct") as ahead:
        coming: deque[Future[tuple[torch.Tensor, NDArray[np.int64]]]] = deque()
        try:
            for index in range(count):
                coming.append(ahead.submit(make, index))
                if len(coming) > 1:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            ahead.shutdown(cancel_futures=True)
