"""Resizing on the CPU: torch's antialiased uint8 kernel, run by a few threads as an operator of the DALI pipeline.

DALI's own CPU resize costs more than its region decoding. torch's kernel for channels-last uint8 (a port of
Pillow-SIMD's, vectorised for AVX2) is several times faster and gives the pixels of PIL's antialiased bilinear
resize to within one level, which is what torchvision's training and evaluation transforms give.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

_antialiased_bilinear = torch.ops.aten._upsample_bilinear2d_aa  # what torch.nn.functional.interpolate calls


class Resizer:
    """Resizes and mirrors images of a batch with `threads` threads."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = _single_threaded_workers(threads)

    def __call__(
        self,
        images: list[NDArray[np.uint8]],
        sizes: list[NDArray[np.int32]],
        flips: list[NDArray[np.int32]] | None = None,
    ) -> list[NDArray[np.uint8]]:
        """Resize each image, uint8 [height, width, 3], to its size (height, width); mirror it where its flip is 1.

        Gives uint8 [height, 3 * width]: DALI copies what it is given a last dimension at a time, and pixels are short.
        """
        resized: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)] * len(images)

        def share(first: int) -> None:
            for i in range(first, len(images), self._threads):
                resized[i] = _resize(images[i], sizes[i].tolist(), flips is not None and bool(flips[i]))

        list(self._pool.map(share, range(self._threads)))
        return resized


def _resize(image: NDArray[np.uint8], size: list[int], flip: bool) -> NDArray[np.uint8]:
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]  # channels-last strides, which is what the kernel is for
    if list(image.shape[:2]) != size:
        planes = _antialiased_bilinear(planes, size, False)
    if flip:
        planes = planes.flip(3)
    return planes[0].permute(1, 2, 0).reshape(size[0], 3 * size[1]).numpy()


def _single_threaded_workers(number: int) -> ThreadPoolExecutor:
    """Threads whose torch operators use no further threads; the other threads of the process keep what they have."""
    before = torch.get_num_threads()
    all_started = threading.Barrier(number + 1)
    pool = ThreadPoolExecutor(number, "resize", initializer=torch.set_num_threads, initargs=(1,))
    for _ in range(number):
        pool.submit(all_started.wait)
    all_started.wait()
    torch.set_num_threads(before)  # of later threads too: the number is inherited from whoever set it last
    return pool
