"""Distortions of pixels as DALI operators, told by `distort` what to do with each sample; nothing is random here.

Images are uint8 [height, width, 3] (RGB) before and after every operation, as in torchvision, whose functional
operations these follow. torchvision cuts fractions off where DALI rounds, hence `_CUT`.
"""

from functools import partial
from typing import Any

import numpy as np
from nvidia.dali import fn
from nvidia.dali.auto_aug.core import select
from nvidia.dali.types import Constant, DALIDataType, DALIInterpType

from configs.augmentation import ColourJitter, TimmRandAugment
from configs.schema import Input
from data_pipeline.distort import EXECUTIONS, JITTERS, num_operations
from data_pipeline.hue import shift_hue

_CUT = -0.4999  # added before rounding; not a half, or whole numbers would fall on the next lower one
_GREY = np.array([0.2989, 0.587, 0.114], np.float32)  # torchvision's weights; PIL's to three digits


def distort(config: Input, images: Any, inputs: list[Any]) -> Any:
    """Colour jitter, then the automatic augmentation; `inputs` are the nodes that stand for `distortion_inputs`."""
    if not inputs:
        return images
    images = fn.reshape(images, layout="HWC")  # what was resized, or never was a JPEG, does not say so
    if config.colour_jitter is not None:
        images = _jitter(config.colour_jitter, images, inputs)
    if config.auto_augment is not None:
        operations = _automatic(config)
        for number in range(num_operations(config)):
            chosen, parameter, matrix = inputs[3 * number : 3 * number + 3]
            images = select(operations, chosen, images, parameter, matrix)
    return images


def _automatic(config: Input) -> Any:
    """The operations of the automatic augmentation, in the order of `EXECUTIONS`."""
    policy = config.auto_augment
    assert policy is not None
    timm = isinstance(policy, TimmRandAugment)
    # timm fills with the mean colour; DALI with one level for all channels: that of the mean's grey.
    fill = round(255 * sum(config.mean) / 3) if timm else 0
    warp = partial(_warp, interpolation=_INTERPOLATIONS[policy.interpolation], fill=fill)
    names = EXECUTIONS if timm else EXECUTIONS[: EXECUTIONS.index("invert")]
    return [warp if name == "warp" else _OPERATIONS[name] for name in names]


def _jitter(config: ColourJitter, images: Any, inputs: list[Any]) -> Any:
    """The stages that `distort.jitter_stages` gives, which it takes off `inputs`."""
    stages, factors = inputs.pop(0), inputs.pop(0)
    operations: Any = [_identity, *[_OPERATIONS[name] for name in JITTERS if name != "hue"]]
    for stage in range(3):
        images = select(operations, stages[stage], images, factors[stage])
    if config.hue:
        images = shift_hue(images, inputs.pop(0))
        for stage in range(3, 6):
            images = select(operations, stages[stage], images, factors[stage])
    return images


def _identity(images: Any, *_: Any) -> Any:
    return images


def _brightness(images: Any, factor: Any, *_: Any) -> Any:
    """factor * image."""
    return fn.brightness_contrast(images, brightness=factor, brightness_shift=_CUT / 255)


def _contrast(images: Any, factor: Any, *_: Any) -> Any:
    """factor * image + (1 - factor) * mean of the grey image, whose pixels torchvision cuts to whole numbers."""
    means = fn.reductions.mean(images, axes=(0, 1))
    centre = fn.reductions.sum(means * Constant(_GREY), axes=0) - 0.5
    return fn.brightness_contrast(
        images, contrast=factor, contrast_center=_argument(centre), brightness_shift=_CUT / 255
    )


def _saturation(images: Any, factor: Any, *_: Any) -> Any:
    """factor * image + (1 - factor) * grey (cut, so half a level lower): a matrix over the channels."""
    grey = Constant(np.tile(_GREY, (3, 1)))
    blend = factor * Constant(np.eye(3, dtype=np.float32)) + (1.0 - factor) * grey
    cut = Constant(np.full(3, _CUT, np.float32)) - (1.0 - factor) * 0.5
    return fn.coord_transform(images, M=blend, T=cut, dtype=DALIDataType.UINT8)


def _sharpness(images: Any, factor: Any, *_: Any) -> Any:
    """factor * image + (1 - factor) * smoothed; the outermost pixels stay, as in PIL."""
    smooth = np.ones((3, 3), np.float32)
    smooth[1, 1] = 5
    centre = np.zeros((3, 3), np.float32)
    centre[1, 1] = 1
    kernel = factor * Constant(centre) + (1.0 - factor) * Constant(smooth / 13)
    sharp = fn.filter(images, _like(kernel, images))
    inner = fn.cast(images.shape()[:2], dtype=DALIDataType.FLOAT) - 2.0
    frame = fn.erase(images, anchor=[1.0, 1.0], shape=inner, axes=(0, 1))
    within = fn.slice(sharp, [1.0, 1.0], inner, axes=(0, 1), normalized_anchor=False, normalized_shape=False)
    within = fn.slice(
        within, [-1.0, -1.0], inner + 2.0, axes=(0, 1), normalized_anchor=False, normalized_shape=False,
        out_of_bounds_policy="pad", fill_values=0,
    )  # fmt: skip
    return frame + within


def _posterize(images: Any, mask: Any, *_: Any) -> Any:
    return images & _like(fn.cast(mask, dtype=DALIDataType.UINT8), images)


def _solarize(images: Any, threshold: Any, *_: Any) -> Any:
    """Pixels from the threshold on are inverted."""
    above = images >= _like(fn.cast(threshold, dtype=DALIDataType.UINT8), images)
    return images ^ (above * Constant(np.uint8(255)))


def _auto_contrast(images: Any, *_: Any) -> Any:
    """Each channel stretched to [0, 255]; one of a single value stays."""
    low = fn.reductions.min(images, axes=(0, 1), keep_dims=True)
    high = fn.reductions.max(images, axes=(0, 1), keep_dims=True)
    flat = low == high
    return fn.normalize(
        images, axes=(0, 1), mean=_argument(fn.cast(low * (flat ^ True), dtype=DALIDataType.FLOAT)),
        stddev=_argument((high - low) * Constant(np.float32(1 / 255)) + flat), shift=_CUT, dtype=DALIDataType.UINT8,
    )  # fmt: skip


def _equalize(images: Any, *_: Any) -> Any:
    """DALI equalises as OpenCV does, by the share of pixels not above a value; PIL and torchvision by the share below
    it, which is the same of the inverted image."""
    white = Constant(np.uint8(255))
    return fn.equalize(images ^ white) ^ white


def _invert(images: Any, *_: Any) -> Any:
    return images ^ Constant(np.uint8(255))


def _solarize_add(images: Any, levels: Any, *_: Any) -> Any:
    """The darker half of the levels is raised, by at most 110: none passes 255."""
    dark = images < Constant(np.uint8(128))
    return images + dark * _like(fn.cast(levels, dtype=DALIDataType.UINT8), images)


def _warp(images: Any, _: Any, matrix: Any, interpolation: DALIInterpType, fill: int) -> Any:
    return fn.warp_affine(images, matrix=matrix, interp_type=interpolation, fill_value=fill)


def _argument(node: Any) -> Any:
    """Named arguments of operators must be in the memory of the CPU; what was computed from images on a GPU is not."""
    return node.cpu() if node.device == "gpu" else node


def _like(node: Any, images: Any) -> Any:
    """Positional inputs of operators must be where the images are."""
    return node.gpu() if images.device == "gpu" else node


_INTERPOLATIONS = {"nearest": DALIInterpType.INTERP_NN, "bilinear": DALIInterpType.INTERP_LINEAR}
_OPERATIONS = {
    "identity": _identity,
    "brightness": _brightness,
    "saturation": _saturation,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": _invert,
    "solarize_add": _solarize_add,
}
