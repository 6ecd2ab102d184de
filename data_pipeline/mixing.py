"""Mixup (Zhang et al. 2017, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899), on the device.

What is mixed stays within a micro-batch, whoever computes it, and the draw is a function of (seed, step, micro-batch).
Each image meets the one before it, as in torchvision's transforms (`roll(1)`): the order of samples is random already.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import betaincinv
from torch.nn.functional import one_hot

from configs.augmentation import Mixing
from data_pipeline.philox import philox

_MIXING_PURPOSE = 0xFFFF_FFFD  # apart from the order's, the forward pass's and every purpose of a sample


@dataclass(frozen=True)
class Mix:
    """How a micro-batch is mixed.

    Attributes:
        share: of the image itself in the mixture; 1 - share of its partner. In CutMix that of the pixels.
        box: (y, x, height, width) that CutMix takes from the partner; None in mixup.
    """

    share: float
    box: tuple[int, int, int, int] | None


def draw_mix(config: Mixing, seed: int, step: int, micro: int, height: int, width: int) -> Mix | None:
    """The mix of one micro-batch of images of `height` x `width`; None where the recipe mixes nothing.

    Beta(alpha, alpha) comes through its inverse distribution function from one uniform number, so that no generator
    has a state. It is rounded to float32: what the last bit of a double is depends on the mathematics library.
    """
    if not (config.mixup or config.cutmix):
        return None
    words = philox(seed, (step & 0xFFFFFFFF, step >> 32, micro, _MIXING_PURPOSE))
    # In the middle of its cell: never 0 or 1, where the inverse is of no use.
    which, quantile, along_y, along_x = ((int(word) + 0.5) * 2.0**-32 for word in words)
    cut = which < 0.5 if config.mixup and config.cutmix else bool(config.cutmix)
    alpha = config.cutmix if cut else config.mixup
    share = float(np.float32(betaincinv(alpha, alpha, quantile)))
    if not cut:
        return Mix(share, None)
    half = 0.5 * math.sqrt(1.0 - share)
    top, bottom = _cut(int(along_y * height), int(half * height), height)
    left, right = _cut(int(along_x * width), int(half * width), width)
    box = (top, left, bottom - top, right - left)
    return Mix(1.0 - box[2] * box[3] / (height * width), box)


def _cut(centre: int, half: int, length: int) -> tuple[int, int]:
    return max(centre - half, 0), min(centre + half, length)


def mix(images: torch.Tensor, labels: torch.Tensor, num_classes: int, how: Mix) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each image with the one before it in the micro-batch, the first with the last.

    Args:
        images: float32 [n, 3, height, width], normalised.
        labels: int64 [n].

    Returns:
        the mixed images, and targets: float32 [n, num_classes], each row a distribution.
    """
    classes = one_hot(labels, num_classes).to(torch.float32)
    targets = classes.roll(1, 0).mul_(1.0 - how.share).add_(classes.mul(how.share))
    partners = images.roll(1, 0)
    if how.box is None:
        return partners.mul_(1.0 - how.share).add_(images.mul(how.share)), targets
    y, x, height, width = how.box
    mixed = images.clone()
    mixed[:, :, y : y + height, x : x + width] = partners[:, :, y : y + height, x : x + width]
    return mixed, targets
