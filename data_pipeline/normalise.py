"""Normalising pixels on the device."""

import numpy as np
import torch
from numpy.typing import NDArray

from configs.schema import Input
from data_pipeline.buffers import Buffers
from data_pipeline.threads import Threads


def coefficients(
    config: Input, width: int, shifts: NDArray[np.float32] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a row of pixels in [0, 255] is multiplied by, float32 [3 * width], and what is then added, float32
    [1 or n, 3 * width], for the recipe's mean and standard deviation; `shifts`, float32 [n, 3], is added to images in
    [0, 1] before."""
    scale = 1 / (255 * torch.tensor(config.std))
    offset = (-255 * torch.tensor(config.mean) * scale)[None]
    if shifts is not None:
        offset = offset + 255 * torch.from_numpy(shifts) * scale
    return scale.repeat(width), offset.repeat(1, width)


class Normaliser:
    """Normalises batches where they are: with `threads` on the CPU, with none on a GPU."""

    def __init__(self, config: Input, threads: Threads | None) -> None:
        self._config, self._threads = config, threads
        self._buffers = Buffers()
        # By width: what is the same for every batch is not sent to a GPU with each, which would wait for it.
        self._unshifted: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, images: torch.Tensor, shifts: NDArray[np.float32] | None = None) -> torch.Tensor:
        """uint8 [n, height, width, 3] as normalised float32 [n, 3, height, width], channels-last."""
        n, height, width, _ = images.shape
        # A row at a time, as one vector: broadcasting over three channels would leave vector units idle.
        whole = images.reshape(n, height, 3 * width)
        scales, offsets = self._coefficients(width, images.device, shifts)
        offsets = offsets.expand(n, -1)
        if self._threads is None:
            rows = torch.addcmul(offsets[:, None], whole.to(torch.float32), scales)
        else:
            rows = self._buffers.take(tuple(whole.shape))
            self._threads.each(n, lambda i: normalise(whole[i], scales, offsets[i], rows[i]))
        return rows.view(n, height, width, 3).permute(0, 3, 1, 2)

    def _coefficients(
        self, width: int, device: torch.device, shifts: NDArray[np.float32] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if shifts is None and width in self._unshifted:
            return self._unshifted[width]
        scales, offsets = coefficients(self._config, width, shifts)
        found = scales.to(device), offsets.to(device)
        if shifts is None:
            self._unshifted[width] = found
        return found


def normalise(pixels: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor) -> None:
    """One image: uint8 [height, 3 * width] into float32 of the same shape."""
    torch.addcmul(offsets, out.copy_(pixels), scales, out=out)
