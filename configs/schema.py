"""The recipe schema: everything that decides the result of a run, and nothing about the cluster it runs on.

Each section belongs to the component it configures. Unknown keys are refused (`configs.load` adds the nearest name).
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from configs.augmentation import AutoAugment, ColourJitter, Erasing, Mixing, Progressive
from configs.duration import Duration, Interval, IntervalOrAuto, WallTime
from configs.optimisation import CrossEntropy, Ema, Gradients, Loss, LossScale, Optimizer, Schedule, Sgd
from configs.section import Bounds, PositiveDuration, Section, ascending, default_kind


class Model(Section):
    """The network: one of ours by name, or a classifier of a library, as `torchvision:vgg16` or `timm:resnet50d`.

    `stride`, `shortcut` (options A, B and C of He et al. 2015, 3.3) and `zero_init_gamma` (Goyal et al. 2017, 5.1) are
    of our residual networks alone; `drop_path` (stochastic depth, Huang et al. 2016, its probability growing linearly
    over the blocks) of these and of those of timm that have it. What would have no effect is refused, but for what
    recipes hand on from one network to another like it: a `shortcut` to plain networks, and a `stride` to networks
    without bottlenecks, of which both versions are the same. `num_classes` is taken from the data when it is left out.
    """

    name: str
    stride: Literal["v1", "v1.5"] = "v1.5"
    shortcut: Literal["A", "B", "C"] = "B"
    zero_init_gamma: bool = False
    drop_path: float = Field(default=0.0, ge=0.0, lt=1.0)
    num_classes: PositiveInt | None = None

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> "Model":
        if self.name.startswith("timm:"):
            idle = ["stride", "shortcut", "zero_init_gamma"]
        elif ":" in self.name:
            idle = ["stride", "shortcut", "zero_init_gamma", "drop_path"]
        elif self.name.startswith(("plain", "cifar-plain")):
            idle = ["zero_init_gamma", "drop_path"]
        else:
            idle = []
        given = {key: getattr(self, key) for key in idle}
        defaults = {key: type(self).model_fields[key].default for key in idle}
        wrong = [key for key in idle if given[key] != defaults[key]]
        if wrong:
            raise ValueError(
                f"{_assignments(given, wrong)} would have no effect on the network {self.name}: "
                f"leave it out, or give {_assignments(defaults, wrong)} where the recipe has it from another"
            )
        return self


def _assignments(values: dict[str, Any], keys: list[str]) -> str:
    return " ".join(f"model.{key}={str(values[key]).replace('True', 'true').replace('False', 'false')}" for key in keys)


class Batch(Section):
    """`size` samples make a step; batch norm sees `micro` of them at a time, whatever the number of workers."""

    size: PositiveInt
    micro: PositiveInt

    @model_validator(mode="after")
    def _divides(self) -> "Batch":
        if self.size % self.micro:
            near = [m for m in range(1, self.size + 1) if self.size % m == 0]
            best = min(near, key=lambda m: abs(m - self.micro))
            raise ValueError(f"batch.micro={self.micro} does not divide batch.size={self.size}: try batch.micro={best}")
        return self

    @property
    def num_micro(self) -> int:
        """M, the number of micro-batches in a step, and so the largest number of workers."""
        return self.size // self.micro


class GlobalShuffle(Section):
    """Every epoch is one random permutation of all samples.

    With `repeats` R, repeated augmentation: R epochs run together, each sample coming R times in a row, augmented anew,
    in different micro-batches of a step as far as there are R (torchvision's RASampler). An epoch is as long as ever:
    so many images as the training split has, of which a R-th are different ones.
    """

    kind: Literal["global"] = "global"
    repeats: PositiveInt = 1


class WindowedShuffle(Section):
    """Every epoch permutes the shards, and shuffles the samples of at most `shards` of them at a time: for data on
    remote storage, of which a machine then needs two windows at a time. See docs/data-remote.md on how random it is.
    `repeats` is that of a global shuffle."""

    kind: Literal["windowed"] = "windowed"
    shards: PositiveInt = 64
    repeats: PositiveInt = 1


Shuffle = Annotated[GlobalShuffle | WindowedShuffle, Field(discriminator="kind"), default_kind("global")]


class ResizedCrop(Section):
    """Inception-style crop: area and aspect ratio drawn, resized to `size` (torchvision's RandomResizedCrop)."""

    kind: Literal["resized_crop"] = "resized_crop"
    area: Bounds = (0.08, 1.0)
    ratio: Bounds = (3 / 4, 4 / 3)


class ScaleCrop(Section):
    """The paper's crop: shorter side drawn from `shorter`, then a random `size` x `size` crop."""

    kind: Literal["scale_crop"] = "scale_crop"
    shorter: Annotated[tuple[PositiveInt, PositiveInt], AfterValidator(ascending)] = (256, 480)


class PadCrop(Section):
    """The CIFAR crop: pad every side by `padding` pixels of the mean colour, then a random `size` x `size` crop."""

    kind: Literal["pad_crop"] = "pad_crop"
    padding: NonNegativeInt = 4


Crop = Annotated[ResizedCrop | ScaleCrop | PadCrop, Field(discriminator="kind")]


class Input(Section):
    """What the network sees. `mean` and `std` are per channel (RGB), for images in [0, 1].

    Training images are cropped, resized, flipped, jittered (`colour_jitter`), distorted (`auto_augment`), shifted in
    colour (`pca_colour`), normalised and erased (`erasing`), in this order. Evaluation takes the central `size` x
    `size` crop of the image whose shorter side was resized to `eval_resize`; null means that images already have the
    right size.

    Training images have `train_size`, where it is given, instead of `size` (Touvron et al. 2019, arXiv 1906.06423);
    with `progressive` it is the size to end with.

    `damaged` says what to do with a training image whose bytes are no longer those that were ingested: "fail", or
    "substitute" another, which is recorded. A score is never taken of a substitute.
    """

    size: PositiveInt
    train_size: PositiveInt | None = None
    mean: tuple[float, float, float]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    crop: Crop
    flip: bool = True
    pca_colour: NonNegativeFloat = 0.0
    colour_jitter: ColourJitter | None = None
    auto_augment: AutoAugment | None = None
    erasing: Erasing | None = None
    progressive: Progressive | None = None
    eval_resize: PositiveInt | None = None
    damaged: Literal["fail", "substitute"] = "fail"

    @property
    def training_size(self) -> int:
        """The side of training images, in pixels; under `progressive` the last one, unless it has an end of its own."""
        return self.train_size or self.size

    @model_validator(mode="after")
    def _sizes_need_a_resized_crop(self) -> "Input":
        for key in ("train_size", "progressive"):
            if getattr(self, key) is not None and isinstance(self.crop, PadCrop):
                raise ValueError(
                    f"input.{key} needs a crop that is resized, and input.crop is a pad_crop: use a resized_crop, or "
                    f"leave input.{key} out"
                )
        return self

    @model_validator(mode="after")
    def _progressive_sizes_grow(self) -> "Input":
        if self.progressive is None:
            return self
        if self.train_size is not None and self.progressive.end_size is not None:
            raise ValueError(
                f"input.train_size={self.train_size} and input.progressive.end_size={self.progressive.end_size} both "
                "say with what size training ends: give one of them"
            )
        first, last = self.progressive.start_size, self.progressive.end_size or self.training_size
        if first > last:
            raise ValueError(
                f"input.progressive.start_size={first} is larger than the size to end with, {last}: images only grow"
            )
        return self

    @model_validator(mode="after")
    def _resize_covers_the_crop(self) -> "Input":
        if self.eval_resize is not None and self.eval_resize < self.size:
            raise ValueError(f"input.eval_resize={self.eval_resize} is smaller than input.size={self.size}")
        return self


class Engine(Section):
    """What computes and reduces gradients: whole weights on every worker (`ddp`), or spread over the workers (`fsdp2`;
    `deepspeed` with `zero_stage` 1 to 3, by default 1). It decides how much memory and communication a step takes, and
    nothing of what is computed: a run may go on with another.

    Gradients are summed over the workers in the precision `reduce`. `deepspeed` holds whatever else a DeepSpeed
    configuration may contain.
    """

    name: Literal["ddp", "fsdp2", "deepspeed"] = "ddp"
    zero_stage: Literal[0, 1, 2, 3] | None = None
    reduce: Literal["fp32", "bf16"] = "fp32"
    deepspeed: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _only_deepspeed_has_stages(self) -> "Engine":
        for key, given in (("zero_stage", self.zero_stage is not None), ("deepspeed", bool(self.deepspeed))):
            if given and self.name != "deepspeed":
                raise ValueError(
                    f"engine.{key} would have no effect on engine.name={self.name}: leave it out, or give "
                    "engine.name=deepspeed"
                )
        return self


class Auto(Section):
    """What `checkpoint.every: auto` goes by, beside what it measures.

    `worker_mtbf` is how long one worker runs between two failures, believed until the run has failures of its own to
    count (docs/checkpoints.md says where the default comes from). The interval lies between `shortest` and `longest`;
    where an interval of `longest` would cost more than 1 % of the time it is lengthened.
    """

    worker_mtbf: WallTime = WallTime.parse("50000h")
    shortest: WallTime = WallTime.parse("30s")
    longest: WallTime = WallTime.parse("1h")

    @model_validator(mode="after")
    def _ascending(self) -> "Auto":
        if self.shortest.seconds > self.longest.seconds:
            raise ValueError(
                f"checkpoint.auto.shortest={self.shortest} is more than checkpoint.auto.longest={self.longest}: "
                "give the smaller bound to shortest"
            )
        return self


class Checkpoint(Section):
    """When state is saved, and which checkpoints are kept; nothing of it changes what the run computes.

    Saved every so often (`every`: a length of training, a time since the last save, or auto, which weighs the measured
    cost of a save against the failures to be expected, see `auto`), when a run is asked to stop, and at the end. Kept
    are the newest `keep_last`; the `keep_best` with the best top-1 score on the held-out images, of equal ones the
    newer (so an evaluation among the best is saved); and for ever one at every multiple of `keep_every`.

    On Ray, the state is copied into the memory of the machines every `memory` (null: never), each file to
    `memory_copies` of them.
    """

    every: IntervalOrAuto = "auto"
    auto: Auto = Auto()
    keep_last: PositiveInt = 3
    keep_best: NonNegativeInt = 0
    keep_every: PositiveDuration | None = None
    memory: Interval | None = None
    memory_copies: PositiveInt = 2


class Evaluate(Section):
    """When the held-out split is evaluated (always after the last step too), in micro-batches of `batch`.

    `weights` auto scores the moving average where the recipe keeps one (`ema`). `exact_batch_norm` averages batch-norm
    statistics over so many training micro-batches first; 0 takes those that training kept on the way.
    `scales` are the shorter sides of `longhaul eval --views multi-scale` (by default those of He et al. 2015, 3.4).
    """

    every: PositiveDuration = Duration.parse("1ep")
    batch: PositiveInt = 64
    weights: Literal["auto", "plain", "ema"] = "auto"
    exact_batch_norm: NonNegativeInt = 0
    scales: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (224, 256, 384, 480, 640)


class Log(Section):
    every: PositiveDuration = Duration.parse("10it")


class Recipe(Section):
    """A whole run. Two runs with equal recipes see the same samples, crops and learning rates at every step.

    With `deterministic` they have the same bits on as many workers of the same machines; with `reproducible`, which
    implies it, on any number of workers.
    """

    description: str = ""
    data: str | None = None  # the data set `longhaul train` uses when --data is left out; only "digits" is embedded
    seed: NonNegativeInt = Field(0, lt=2**63)
    deterministic: bool = False
    reproducible: bool = False
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    channels_last: bool = True
    compile: Literal["eager", "default", "cuda-graphs", "max-autotune"] = "eager"
    duration: PositiveDuration
    model: Model
    batch: Batch
    order: Shuffle = GlobalShuffle()
    input: Input
    optimizer: Optimizer = Sgd()
    schedule: Schedule
    gradients: Gradients = Gradients()
    ema: Ema | None = None
    mixing: Mixing = Mixing()
    loss: Loss = CrossEntropy()
    loss_scale: LossScale = LossScale()
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    log: Log = Log()

    @model_validator(mode="before")
    @classmethod
    def _reproducible_is_deterministic(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("reproducible") is True:
            return {"deterministic": True, **values}
        return values

    @model_validator(mode="after")
    def _engine_can(self) -> "Recipe":
        name = self.engine.name
        for key, wanted in (("reproducible", self.reproducible), ("compile", self.compile != "eager")):
            if wanted and name != "ddp":
                raise ValueError(f"{key}={str(getattr(self, key)).lower()} needs engine.name=ddp, and it is {name}")
        if self.reproducible and self.engine.reduce != "fp32":
            raise ValueError("reproducible=true needs engine.reduce=fp32: rounding between workers depends on them")
        if self.reproducible and not self.deterministic:
            raise ValueError("reproducible=true implies deterministic=true: leave deterministic=false out")
        return self
