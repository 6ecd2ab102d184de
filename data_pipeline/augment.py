"""How a sample is cropped, flipped and coloured: pure functions of (seed, epoch, sample id), vectorised over samples.

Nothing here touches a pixel; DALI is told the result. So a sample looks the same whatever the batch it stands in, the
number of workers, and however often the run was interrupted.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.schema import Input, PadCrop, ResizedCrop, ScaleCrop
from data_pipeline.philox import uniforms

# Purposes: one for each independent draw. The numbers are part of what a run is; never reuse or renumber one.
_FLIP, _CROP, _COLOUR = 1, 2, 3
_RESIZED_TRY = 16  # ... to 25: the ten tries of a resized crop
_TRIES = 10

# AlexNet's PCA of ImageNet pixels in [0, 1]: facebookarchive/fb.resnet.torch, datasets/imagenet.lua.
_PCA_VALUES = np.array([0.2175, 0.0188, 0.0045])
_PCA_VECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


def central(config: Input, sizes: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """How images are seen in evaluation: (height, width) to resize each to, and (y, x) of the central crop in that.

    Rounded as torchvision's Resize and CenterCrop do, so that its published weights score here what they score there.
    """
    targets = resized(config.eval_resize or config.size, sizes)
    return targets, np.rint((targets - config.size) / 2).astype(np.int32)


def resized(shorter: int, sizes: NDArray[np.int32]) -> NDArray[np.int32]:
    """(height, width) of images resized to a shorter side, int32 [n, 2]; fractions are cut off."""
    wide = sizes.astype(np.int64)
    return (shorter * wide // wide.min(axis=1, keepdims=True)).astype(np.int32)


@dataclass(frozen=True)
class Augmented:
    """Augmentation of n samples.

    Attributes:
        boxes: int32 [n, 4], (y, x, height, width) in source pixels; y and x are negative where padding is read.
        flips: int32 [n], 1 where the image is mirrored.
        shifts: float32 [n, 3], added to the image in [0, 1] (RGB).
    """

    boxes: NDArray[np.int32]
    flips: NDArray[np.int32]
    shifts: NDArray[np.float32]


def augment(
    config: Input, seed: int, epochs: NDArray[np.int64], ids: NDArray[np.int64], sizes: NDArray[np.int32]
) -> Augmented:
    """Draw the augmentation of samples; `sizes` is int32 [n, 2], the (height, width) of each source image."""
    unsigned_epochs, unsigned_ids = epochs.astype(np.uint64), ids.astype(np.uint64)

    def draw(purpose: int) -> NDArray[np.float64]:
        return uniforms(seed, unsigned_epochs, unsigned_ids, purpose)

    if isinstance(config.crop, ResizedCrop):
        boxes = _resized_crop(config.crop, seed, unsigned_epochs, unsigned_ids, sizes)
    elif isinstance(config.crop, ScaleCrop):
        boxes = _scale_crop(config.crop, config.training_size, draw(_CROP), sizes)
    else:
        boxes = _pad_crop(config.crop, config.size, draw(_CROP), sizes)
    flips = (draw(_FLIP)[:, 0] < 0.5).astype(np.int32) if config.flip else np.zeros(len(ids), np.int32)
    if config.pca_colour:
        shifts = _pca_shift(config.pca_colour, draw(_COLOUR), draw(_COLOUR + 1))
    else:
        shifts = np.zeros((len(ids), 3), np.float32)
    return Augmented(boxes, flips, shifts)


def _resized_crop(
    crop: ResizedCrop,
    seed: int,
    epochs: NDArray[np.uint64],
    ids: NDArray[np.uint64],
    sizes: NDArray[np.int32],
) -> NDArray[np.int32]:
    """torchvision's RandomResizedCrop: up to ten tries, then the largest central box of an allowed ratio."""
    boxes = _central_box(crop.ratio, sizes)
    left = np.arange(len(ids))
    log_low, log_high = math.log(crop.ratio[0]), math.log(crop.ratio[1])
    for attempt in range(_TRIES):
        u = uniforms(seed, epochs[left], ids[left], _RESIZED_TRY + attempt)
        heights, widths = sizes[left, 0].astype(np.float64), sizes[left, 1].astype(np.float64)
        area = heights * widths * (crop.area[0] + u[:, 0] * (crop.area[1] - crop.area[0]))
        ratio = np.exp(log_low + u[:, 1] * (log_high - log_low))
        w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (w > 0) & (w <= widths) & (h > 0) & (h <= heights)
        y, x = np.floor(u[:, 2] * (heights - h + 1)), np.floor(u[:, 3] * (widths - w + 1))
        boxes[left[fits]] = np.stack([y, x, h, w], axis=1)[fits]
        left = left[~fits]
        if not left.size:
            break
    return boxes


def _central_box(ratio: tuple[float, float], sizes: NDArray[np.int32]) -> NDArray[np.int32]:
    heights, widths = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    image_ratio = widths / heights
    # At least a pixel: an image of one or two may have no box of an allowed ratio.
    w = np.where(image_ratio > ratio[1], np.maximum(np.rint(heights * ratio[1]), 1), widths)
    h = np.where(image_ratio < ratio[0], np.maximum(np.rint(widths / ratio[0]), 1), heights)
    return np.stack([(heights - h) // 2, (widths - w) // 2, h, w], axis=1).astype(np.int32)


def _scale_crop(crop: ScaleCrop, size: int, u: NDArray[np.float64], sizes: NDArray[np.int32]) -> NDArray[np.int32]:
    """He et al. 2015, 3.4: resize the shorter side to s, crop `size`: a box of size * shorter / s source pixels."""
    shorter = sizes.min(axis=1).astype(np.float64)
    low, high = crop.shorter
    target = low + np.floor(u[:, 0] * (high - low + 1))
    side = np.clip(np.rint(size * shorter / target), 1, shorter)
    y = np.floor(u[:, 1] * (sizes[:, 0] - side + 1))
    x = np.floor(u[:, 2] * (sizes[:, 1] - side + 1))
    return np.stack([y, x, side, side], axis=1).astype(np.int32)


def _pad_crop(crop: PadCrop, size: int, u: NDArray[np.float64], sizes: NDArray[np.int32]) -> NDArray[np.int32]:
    room = sizes + 2 * crop.padding - size + 1
    y, x = np.floor(u[:, 0] * room[:, 0]) - crop.padding, np.floor(u[:, 1] * room[:, 1]) - crop.padding
    full = np.full(len(sizes), size)
    return np.stack([y, x, full, full], axis=1).astype(np.int32)


def _pca_shift(sigma: float, u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float32]:
    """Krizhevsky et al. 2012, 4.1: a Gaussian along each principal component (Box-Muller from the uniforms)."""
    radius = np.sqrt(-2 * np.log1p(-u[:, :3]))
    alpha = sigma * radius * np.cos(2 * np.pi * v[:, :3])
    return ((alpha * _PCA_VALUES) @ _PCA_VECTORS.T).astype(np.float32)
