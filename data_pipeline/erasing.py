"""Random erasing (Zhong et al. 2017, arXiv 1708.04896), as torchvision's RandomErasing draws and applies it.

It comes after normalising, so the device does it. Boxes are pure functions of (seed, epoch, sample id).
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from configs.augmentation import Erasing
from configs.schema import Input
from data_pipeline.philox import uniforms

# Purposes, after those of `distort`. The numbers are part of what a run is; never reuse or renumber one.
_CHANCE = 64
_TRY = 65  # ... to 74: the ten tries
_TRIES = 10


def erase(config: Input, seed: int, images: torch.Tensor, epochs: NDArray[np.int64], ids: NDArray[np.int64]) -> None:
    """Erase a box of each of the normalised images, float32 [n, 3, height, width], in place, as the recipe has it."""
    if config.erasing is None:
        return
    height, width = images.shape[2:]
    boxes = erased_boxes(config.erasing, seed, epochs, ids, height, width)
    y, x, tall, wide = torch.from_numpy(boxes).to(images.device).T[:, :, None, None, None]
    rows = torch.arange(height, device=images.device)[:, None]
    columns = torch.arange(width, device=images.device)
    within = (rows >= y) & (rows < y + tall) & (columns >= x) & (columns < x + wide)
    if config.erasing.value == "mean":
        images.masked_fill_(within, 0.0)
    else:
        black = -torch.tensor(config.mean, device=images.device) / torch.tensor(config.std, device=images.device)
        torch.where(within, black[:, None, None], images, out=images)


def erased_boxes(
    config: Erasing, seed: int, epochs: NDArray[np.int64], ids: NDArray[np.int64], height: int, width: int
) -> NDArray[np.int64]:
    """The box (y, x, height, width) that each sample loses, int64 [n, 4]; all 0 where none.

    As torchvision: with probability p, up to ten tries of an area and a log-uniform aspect (height / width); a box must
    be smaller than the image in both directions.
    """
    unsigned_epochs, unsigned_ids = epochs.astype(np.uint64), ids.astype(np.uint64)
    boxes = np.zeros((len(ids), 4), np.int64)
    left = np.flatnonzero(uniforms(seed, unsigned_epochs, unsigned_ids, _CHANCE)[:, 0] < config.p)
    log_low, log_high = math.log(config.ratio[0]), math.log(config.ratio[1])
    for attempt in range(_TRIES):
        u = uniforms(seed, unsigned_epochs[left], unsigned_ids[left], _TRY + attempt)
        area = height * width * (config.scale[0] + u[:, 0] * (config.scale[1] - config.scale[0]))
        aspect = np.exp(log_low + u[:, 1] * (log_high - log_low))
        tall, wide = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (tall < height) & (wide < width)
        y, x = np.floor(u[:, 2] * (height - tall + 1)), np.floor(u[:, 3] * (width - wide + 1))
        boxes[left[fits]] = np.stack([y, x, tall, wide], axis=1)[fits]
        left = left[~fits]
        if not left.size:
            break
    return boxes
