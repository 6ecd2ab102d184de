"""Which distortions a sample gets: pure functions of (seed, epoch, sample id), as `augment` has them for crops.

Two families: colour jitter and the automatic augmentations (TrivialAugment, RandAugment). Definitions and ranges are
those of torchvision 0.28 (`transforms.v2.ColorJitter`, `transforms/autoaugment.py`), but for `timm_rand_augment`, whose
are timm 1.0's (`data/auto_augment.py`). `photometric` executes them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.augmentation import ColourJitter, RandAugment, TimmRandAugment, TrivialAugment
from configs.schema import Input
from data_pipeline.philox import uniforms

Draw = Callable[[int], NDArray[np.float64]]

# Purposes, after those of `augment`. The numbers are part of what a run is; never reuse or renumber one.
_JITTER_FACTORS, _JITTER_ORDER = 32, 33
_AUTO_AUGMENT = 48  # ... to 63: the operations of an automatic augmentation

JITTERS = ("brightness", "contrast", "saturation", "hue")

# The augmentation space, in torchvision's order.
OPERATIONS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
    "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
_SIGNED = np.array([1 <= place <= 9 for place in range(len(OPERATIONS))])
BINS = 31

# timm's space of operations "increasing" in strength, by the same names; the last two are not torchvision's.
NAMES = (*OPERATIONS, "Invert", "SolarizeAdd")
TIMM_OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
)  # fmt: skip
_TIMM_PLACES = np.array([NAMES.index(name) for name in TIMM_OPERATIONS], np.int32)
TIMM_LEVELS = 10.0

# How `photometric` executes them: the five geometric operations are one warp, which differs in its matrix.
EXECUTIONS = (
    "identity", "warp", "brightness", "saturation", "contrast", "sharpness", "posterize", "solarize",
    "auto_contrast", "equalize", "invert", "solarize_add",
)  # fmt: skip
_EXECUTION = np.array([0, 1, 1, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], np.int32)


@dataclass(frozen=True)
class Jitter:
    """Colour jitter of n samples, as torchvision draws it.

    Attributes:
        factors: float32 [n, 4], in the order of `JITTERS`; hue is in turns.
        order: int32 [n, 4], the places in `JITTERS` in the order in which they are applied.
    """

    factors: NDArray[np.float32]
    order: NDArray[np.int32]


@dataclass(frozen=True)
class Operation:
    """One operation of an automatic augmentation, for each of n samples.

    Attributes:
        names: int32 [n], places in `NAMES`.
        magnitudes: float32 [n], signed, in torchvision's units (pixels, degrees, ...); of SolarizeAdd in levels.
    """

    names: NDArray[np.int32]
    magnitudes: NDArray[np.float32]


def distortion_inputs(
    config: Input, seed: int, epochs: NDArray[np.int64], ids: NDArray[np.int64], size: int
) -> tuple[NDArray[np.generic], ...]:
    """What the pipeline must be told about samples of `size` x `size` pixels: `num_inputs(config)` arrays, n rows each.

    With colour jitter what `jitter_stages` gives; then for each operation of an automatic
    augmentation the place in `EXECUTIONS` int32 [n], the parameter float32 [n] and the matrix float32 [n, 2, 3].
    """
    unsigned_epochs, unsigned_ids = epochs.astype(np.uint64), ids.astype(np.uint64)

    def draw(purpose: int) -> NDArray[np.float64]:
        return uniforms(seed, unsigned_epochs, unsigned_ids, purpose)

    inputs: list[NDArray[np.generic]] = []
    if config.colour_jitter is not None:
        inputs += jitter_stages(config.colour_jitter, draw_jitter(config.colour_jitter, draw))
    for operation in draw_operations(config, draw, size):
        inputs += execution(operation, size)
    return tuple(inputs)


def num_inputs(config: Input) -> int:
    """The number of arrays that `distortion_inputs` gives."""
    jitter = config.colour_jitter
    return (0 if jitter is None else 2 + bool(jitter.hue)) + 3 * num_operations(config)


def num_operations(config: Input) -> int:
    """How many operations of automatic augmentation a sample gets."""
    if config.auto_augment is None:
        return 0
    return 1 if isinstance(config.auto_augment, TrivialAugment) else config.auto_augment.num_ops


def draw_jitter(config: ColourJitter, draw: Draw) -> Jitter:
    """torchvision's ColorJitter.get_params: uniform factors, and a uniformly random order."""
    strength = np.array([getattr(config, name) for name in JITTERS])
    centre = np.array([1.0, 1.0, 1.0, 0.0])
    low = np.maximum(centre - strength, [0.0, 0.0, 0.0, -0.5])
    factors = low + draw(_JITTER_FACTORS) * (centre + strength - low)
    return Jitter(factors.astype(np.float32), np.argsort(draw(_JITTER_ORDER), axis=1, kind="stable").astype(np.int32))


def jitter_stages(config: ColourJitter, jitter: Jitter) -> list[NDArray[np.generic]]:
    """How to execute colour jitter: stages int32 [n, s], factors float32 [n, s], and with hue turns float32 [n].

    A stage is a place in `JITTERS` (not hue) plus 1, or 0 for nothing. Without hue there are three, in the order drawn.
    With it there are three before the hue and three after, so that the pipeline shifts hues at one place only.
    """
    asked = np.array([bool(getattr(config, name)) for name in JITTERS])
    order, at = jitter.order, np.arange(4)
    hue = JITTERS.index("hue")
    place_of_hue = np.argmax(order == hue, axis=1)[:, None]
    stages = np.where(asked[order] & (order != hue), order + 1, 0)
    if not config.hue:
        stages = stages[at != place_of_hue].reshape(-1, 3)
    else:
        before, after = np.where(at < place_of_hue, stages, 0), np.where(at > place_of_hue, stages, 0)
        stages = np.concatenate([before[:, :3], after[:, 1:]], axis=1)
    factors = np.take_along_axis(jitter.factors, np.maximum(stages - 1, 0), axis=1)
    return [stages.astype(np.int32), factors, *([jitter.factors[:, hue].copy()] if config.hue else [])]


def draw_operations(config: Input, draw: Draw, size: int) -> list[Operation]:
    """The operations that each sample gets, one after another; operation, magnitude and sign drawn independently."""
    operations = []
    policy = config.auto_augment
    for number in range(num_operations(config)):
        u = draw(_AUTO_AUGMENT + number)
        if isinstance(policy, TimmRandAugment):
            operations.append(_timm_operation(policy, u, size))
            continue
        names = np.floor(u[:, 0] * len(OPERATIONS)).astype(np.int32)
        if isinstance(policy, RandAugment):
            bins = np.full(len(u), policy.magnitude)
        else:
            bins = np.floor(u[:, 1] * BINS).astype(np.int64)
        table = magnitudes(isinstance(policy, TrivialAugment), size)
        signs = np.where(_SIGNED[names] & (u[:, 2] < 0.5), -1, 1)
        operations.append(Operation(names, (signs * table[names, bins]).astype(np.float32)))
    return operations


def _timm_operation(policy: TimmRandAugment, u: NDArray[np.float64], size: int) -> Operation:
    """One layer of timm's RandAugment, from four uniforms [n, 4]: which operation, and whether it is applied; its sign;
    and Gaussian noise of the level (Box-Muller), which stays in 0 to 10."""
    applied = u[:, 0] < policy.probability
    chosen = np.floor(u[:, 0] / (policy.probability or 1.0) * len(_TIMM_PLACES)).astype(np.int64)
    names = np.where(applied, _TIMM_PLACES[np.minimum(chosen, len(_TIMM_PLACES) - 1)], 0).astype(np.int32)
    noise = np.sqrt(-2 * np.log1p(-u[:, 2])) * np.cos(2 * np.pi * u[:, 3])
    levels = np.clip(policy.magnitude + policy.magnitude_std * noise, 0.0, TIMM_LEVELS)
    signs = np.where(_SIGNED[np.minimum(names, len(OPERATIONS) - 1)] & (u[:, 1] < 0.5), -1, 1)
    strengths = timm_magnitudes(levels, size)[np.arange(len(names)), names]
    return Operation(names, (signs * strengths).astype(np.float32))


def timm_magnitudes(levels: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """timm's `LEVEL_TO_ARG` for the increasing space: float64 [n, names] for levels of 0 to 10, without signs, for
    images of `size` x `size`; of the enhancements what is added to a factor of 1."""
    ramp = levels / TIMM_LEVELS
    none = np.zeros_like(ramp)
    pixels = 0.45 * size * ramp
    bits, threshold = 4 - np.floor(4 * ramp), 256 - np.floor(256 * ramp)
    return np.stack(
        [none, *[0.3 * ramp] * 2, *[pixels] * 2, 30.0 * ramp, *[0.9 * ramp] * 4, bits, threshold, none, none, none,
         np.floor(110 * ramp)], axis=1
    )  # fmt: skip


def magnitudes(wide: bool, size: int) -> NDArray[np.float64]:
    """torchvision's `_augmentation_space`: float64 [operations, BINS], without signs; 0 where there is no magnitude.

    `wide` is that of TrivialAugmentWide, otherwise it is that of RandAugment for images of `size` x `size`.
    """
    ramp = np.linspace(0.0, 1.0, BINS)
    shear, degrees, blend = (0.99, 135.0, 0.99) if wide else (0.3, 30.0, 0.9)
    pixels = 32.0 if wide else 150.0 / 331.0 * size
    bits = 8 - np.round(np.arange(BINS) / ((BINS - 1) / (6 if wide else 4)))
    none = np.zeros(BINS)
    return np.stack(
        [none, *[shear * ramp] * 2, *[pixels * ramp] * 2, degrees * ramp, *[blend * ramp] * 4, bits,
         255.0 * (1 - ramp), none, none]
    )  # fmt: skip


def execution(operation: Operation, size: int) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
    """How to execute an operation: places in `EXECUTIONS`, parameters and matrices as in `distortion_inputs`."""
    names, given = operation.names, operation.magnitudes
    parameters = given.copy()
    blends = (names >= OPERATIONS.index("Brightness")) & (names <= OPERATIONS.index("Sharpness"))
    parameters[blends] += 1  # a factor: 1 leaves the image as it is
    posterize = names == OPERATIONS.index("Posterize")
    parameters[posterize] = 256 - 2 ** (8 - given[posterize])  # the mask of the bits that stay
    solarize = names == OPERATIONS.index("Solarize")
    parameters[solarize] = np.ceil(given[solarize])  # pixels are integers: the same ones are inverted
    # A threshold above the largest level inverts nothing, and is none that a pixel can be compared with.
    executions = np.where(solarize & (parameters > 255), 0, _EXECUTION[names]).astype(np.int32)
    return executions, parameters, matrices(operation, size)


def matrices(operation: Operation, size: int) -> NDArray[np.float32]:
    """float32 [n, 2, 3]: where in the source (x, y) a pixel of the output comes from, centres at +0.5.

    Shear is about the corner, rotation about the centre, translation in whole pixels, as in torchvision's `_apply_op`.
    """
    names, given = operation.names, operation.magnitudes.astype(np.float64)
    result = np.tile(np.eye(2, 3), (len(names), 1, 1))
    shear_x, shear_y, translate_x, translate_y, rotate = (names == place for place in range(1, 6))
    result[shear_x, 0, 1] = given[shear_x]
    result[shear_y, 1, 0] = given[shear_y]
    result[translate_x, 0, 2] = -np.trunc(given[translate_x])
    result[translate_y, 1, 2] = -np.trunc(given[translate_y])
    angles = given[rotate] * math.pi / 180
    cosine, sine, centre = np.cos(angles), np.sin(angles), size / 2
    result[rotate] = np.stack(
        [cosine, -sine, centre * (1 - cosine + sine), sine, cosine, centre * (1 - cosine - sine)], axis=1
    ).reshape(-1, 2, 3)
    return result.astype(np.float32)
