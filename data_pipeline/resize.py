"""Resizing on the CPU: torch's antialiased uint8 kernel, by a few threads; also as an operator of a DALI pipeline.

DALI's own CPU resize costs more than its region decoding. torch's kernel for channels-last uint8 (a port of
Pillow-SIMD's, vectorised for AVX2) is several times faster and gives the pixels of PIL's antialiased bilinear
resize to within one level, which is what torchvision's training and evaluation transforms give.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.threads import Threads

_antialiased_bilinear = torch.ops.aten._upsample_bilinear2d_aa  # what torch.nn.functional.interpolate calls


class Resizer:
    """Resizes and mirrors images of a batch."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads

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

        def act(i: int) -> None:
            resized[i] = resize(images[i], sizes[i].tolist(), flips is not None and bool(flips[i])).numpy()

        self._threads.each(len(images), act)
        return resized


def resize(image: NDArray[np.uint8], size: list[int], flip: bool) -> torch.Tensor:
    """An image, uint8 [height, width, 3], resized and mirrored; a row is one vector, uint8 [height, 3 * width]."""
    # In this order, or the batch dimension has a stride by which torch does not take it for channels-last.
    planes = torch.from_numpy(image).unsqueeze(0).permute(0, 3, 1, 2)
    if list(image.shape[:2]) != size:
        planes = _antialiased_bilinear(planes, size, False)
    if flip:
        planes = planes.flip(3)
    return planes[0].permute(1, 2, 0).reshape(size[0], 3 * size[1])
