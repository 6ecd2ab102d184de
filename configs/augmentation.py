"""The sections of a recipe that change training images beyond crop and flip."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from configs.duration import Duration
from configs.section import Bounds, Section


class ColourJitter(Section):
    """torchvision's ColorJitter, in random order: factors from [1 - x, 1 + x] (at least 0), hue from [-x, x] turns."""

    brightness: NonNegativeFloat = 0.0
    contrast: NonNegativeFloat = 0.0
    saturation: NonNegativeFloat = 0.0
    hue: float = Field(default=0.0, ge=0.0, le=0.5)


class TrivialAugment(Section):
    """TrivialAugmentWide (Müller & Hutter 2021): one operation, its magnitude drawn from 31 (torchvision's space)."""

    kind: Literal["trivial_augment"] = "trivial_augment"
    interpolation: Literal["nearest", "bilinear"] = "nearest"


class RandAugment(Section):
    """RandAugment (Cubuk et al. 2019): `num_ops` operations at `magnitude` of 0 to 30 (torchvision's space)."""

    kind: Literal["rand_augment"] = "rand_augment"
    num_ops: int = Field(default=2, ge=1, le=16)
    magnitude: int = Field(default=9, ge=0, le=30)
    interpolation: Literal["nearest", "bilinear"] = "nearest"


class TimmRandAugment(Section):
    """RandAugment as timm has it, with operations that grow stronger with the magnitude: its `rand-m7-mstd0.5-inc1` is
    magnitude 7, magnitude_std 0.5.

    `num_ops` times an operation is drawn and applied with `probability`, at a magnitude of 0 to 10 to which Gaussian
    noise is added. The space is not that of RandAugment: it has Invert and SolarizeAdd, and other ranges.
    """

    kind: Literal["timm_rand_augment"] = "timm_rand_augment"
    num_ops: int = Field(default=2, ge=1, le=16)
    magnitude: float = Field(default=10.0, ge=0.0, le=10.0)
    magnitude_std: NonNegativeFloat = 0.0
    probability: float = Field(default=0.5, ge=0.0, le=1.0)
    interpolation: Literal["nearest", "bilinear"] = "bilinear"


AutoAugment = Annotated[TrivialAugment | RandAugment | TimmRandAugment, Field(discriminator="kind")]


class Erasing(Section):
    """Random erasing (Zhong et al. 2017, torchvision's RandomErasing): with probability `p` a box of a share `scale`
    of the area and of aspect `ratio` becomes the mean colour, or black."""

    p: float = Field(default=0.5, ge=0.0, le=1.0)
    scale: Bounds = (0.02, 0.33)
    ratio: Bounds = (0.3, 3.3)
    value: Literal["mean", "black"] = "mean"


class Progressive(Section):
    """Progressive resizing: training images grow from `start_size` at `start` to `end_size` at `end`, linearly, in
    multiples of `multiple` (FFCV's schedule, by step). Without `end_size` they grow to `input.train_size`, and
    without that to `input.size`, the size of evaluation."""

    start_size: PositiveInt
    end_size: PositiveInt | None = None
    start: Duration
    end: Duration
    multiple: PositiveInt = 32

    @model_validator(mode="after")
    def _start_is_before_the_end(self) -> "Progressive":
        if self.start.unit == self.end.unit and self.start.value > self.end.value:
            raise ValueError(f"input.progressive.start={self.start} is after input.progressive.end={self.end}")
        return self


class Mixing(Section):
    """The alpha of mixup (Zhang et al. 2017) and of CutMix (Yun et al. 2019); 0 is off. With both on, a micro-batch
    gets one of them, each with probability 1/2."""

    mixup: NonNegativeFloat = 0.0
    cutmix: NonNegativeFloat = 0.0
