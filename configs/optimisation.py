"""The sections of a recipe that say how weights are updated: optimizer, learning rate, gradients, averaging."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from configs.duration import Duration
from configs.section import PositiveDuration, Section, default_kind

Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class Sgd(Section):
    """Stochastic gradient descent with momentum; batch norm and biases decay only if asked.

    `style` torch: v = momentum v + g, w -= lr v (`torch.optim.SGD`); caffe: v = momentum v + lr g, w -= v, which
    differs where the learning rate changes. `implementation` apex is NVIDIA's FusedSGD, of style torch.
    """

    kind: Literal["sgd"] = "sgd"
    momentum: Share = 0.9
    nesterov: bool = False
    style: Literal["torch", "caffe"] = "torch"
    weight_decay: NonNegativeFloat = 1e-4
    decay_norm_and_bias: bool = False
    implementation: Literal["torch", "apex"] = "torch"

    @model_validator(mode="after")
    def _can_be_had(self) -> "Sgd":
        if self.nesterov and not self.momentum:
            raise ValueError("optimizer.nesterov=true needs an optimizer.momentum above 0")
        if self.implementation == "apex" and self.style == "caffe":
            raise ValueError(
                "optimizer.implementation=apex has no optimizer.style=caffe: use optimizer.implementation=torch, or "
                "optimizer.style=torch"
            )
        return self


class Lars(Section):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv 1708.03888): each weight's rate is multiplied by
    `trust` |w| / (|g| + weight_decay |w| + eps). Batch norm and biases are not adapted, and decay only if asked."""

    kind: Literal["lars"] = "lars"
    momentum: Share = 0.9
    style: Literal["torch", "caffe"] = "torch"
    trust: PositiveFloat = 0.001
    eps: NonNegativeFloat = 0.0
    weight_decay: NonNegativeFloat = 5e-5
    decay_norm_and_bias: bool = False


class Lamb(Section):
    """LAMB (You et al. 2019, arXiv 1904.00962): Adam's step, scaled for each weight to |w| / |step|. Batch norm and
    biases are not adapted, and decay only if asked. `implementation` apex is NVIDIA's FusedLAMB, which adapts just what
    decays."""

    kind: Literal["lamb"] = "lamb"
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: PositiveFloat = 1e-6
    weight_decay: NonNegativeFloat = 0.01
    decay_norm_and_bias: bool = False
    implementation: Literal["torch", "apex"] = "torch"

    @model_validator(mode="after")
    def _can_be_had(self) -> "Lamb":
        if self.implementation == "apex" and (self.decay_norm_and_bias or not self.weight_decay):
            raise ValueError(
                "optimizer.implementation=apex adapts just what decays: use optimizer.implementation=torch, or an "
                "optimizer.weight_decay above 0 with optimizer.decay_norm_and_bias=false"
            )
        return self


Optimizer = Annotated[Sgd | Lars | Lamb, Field(discriminator="kind"), default_kind("sgd")]


class Hold(Section):
    """A rate to begin with, kept until the training error over a whole `window` is below `train_error` (He et al. 2015,
    section 4.2, for ResNet-110). Windows follow each other and do not overlap. The schedule counts steps from the start
    of the run, not from the end of the hold."""

    lr: NonNegativeFloat = 0.01
    train_error: float = Field(default=0.8, gt=0.0, le=1.0)
    window: PositiveDuration = Duration.parse("50it")


class _Schedule(Section):
    """`lr` is reached after a linear `warmup` from `warmup_lr`, or after `hold`."""

    lr: NonNegativeFloat
    warmup: Duration = Duration.parse("0it")
    warmup_lr: NonNegativeFloat = 0.0
    hold: Hold | None = None

    @model_validator(mode="after")
    def _begins_in_one_way(self) -> "_Schedule":
        if self.hold is not None and self.warmup.value > 0:
            raise ValueError(
                f"schedule.hold and schedule.warmup={self.warmup} are two ways to begin: leave one of them out"
            )
        return self


class Constant(_Schedule):
    kind: Literal["constant"] = "constant"


class MultiStep(_Schedule):
    """The learning rate is multiplied by `gamma` at each milestone."""

    kind: Literal["multistep"] = "multistep"
    milestones: tuple[Duration, ...]
    gamma: PositiveFloat = 0.1


class Cosine(_Schedule):
    """Half a cosine from `lr` to `end_lr`, after a linear warm-up."""

    kind: Literal["cosine"] = "cosine"
    end_lr: NonNegativeFloat = 0.0


class Polynomial(_Schedule):
    """(1 - progress)^power from `lr` to `end_lr`, after a linear warm-up (LARS and MLPerf: power 2)."""

    kind: Literal["polynomial"] = "polynomial"
    end_lr: NonNegativeFloat = 0.0
    power: PositiveFloat = 2.0


class OneCycle(_Schedule):
    """Linear from `warmup_lr` up to `lr` over `warmup`, then linear down to `end_lr` at the end of the run (Smith 2018,
    arXiv 1803.09820). Without `warmup` only the way down remains."""

    kind: Literal["one_cycle"] = "one_cycle"
    end_lr: NonNegativeFloat = 0.0


class Plateau(_Schedule):
    """The rate is multiplied by `gamma` when the held-out top-1 error has not fallen by more than `threshold` (a share:
    0.001 is a tenth of a point) below its best for `patience` evaluations in a row, at most `drops` times. The best is
    the error that last fell so far below the best before it: many small steps down count once they add up.

    He et al. 2015 divide "when the error plateaus" without a rule; this one counts whole images, so that it is a
    function of the evaluations' results alone, which are kept in every checkpoint.
    """

    kind: Literal["plateau"] = "plateau"
    gamma: PositiveFloat = 0.1
    patience: PositiveInt = 10
    threshold: Share = 0.001
    drops: PositiveInt = 3


Schedule = Annotated[Constant | MultiStep | Cosine | Polynomial | OneCycle | Plateau, Field(discriminator="kind")]


class Gradients(Section):
    """`clip_norm` bounds the L2 norm of the whole gradient. An update whose gradient is not finite is skipped and
    counted; after `max_skipped` in a row the run stops, or goes back to the checkpoint before the first of them (and
    stops when the same steps fail again: then it is the recipe, not the machine)."""

    clip_norm: PositiveFloat | None = None
    max_skipped: PositiveInt = 20
    when_exceeded: Literal["stop", "rollback"] = "stop"


class Ema(Section):
    """An exponential moving average of weights and batch-norm statistics: every `every` it moves by 1 - `decay`
    towards them. Until `start` it is a copy of them."""

    decay: float = Field(default=0.9999, gt=0.0, lt=1.0)
    every: PositiveDuration = Duration.parse("1it")
    start: Duration = Duration.parse("0it")


class LossScale(Section):
    """Dynamic loss scaling for fp16: halved after a gradient that is not finite, doubled after `growth_steps` good
    ones (Micikevicius et al. 2017, arXiv 1710.03740; as `torch.amp.GradScaler`)."""

    initial: PositiveFloat = 65536.0
    growth_steps: PositiveInt = 2000


class CrossEntropy(Section):
    """Softmax and cross-entropy; `auxiliary` weighs the loss of each auxiliary classifier (GoogLeNet has two)."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: Share = 0.0
    auxiliary: NonNegativeFloat = 0.3


class BinaryCrossEntropy(Section):
    """A sigmoid for each class, averaged over them, as in "ResNet strikes back" (Wightman et al. 2021). With a
    `target_threshold` a class whose (mixed) target exceeds it counts as wholly present."""

    kind: Literal["binary_cross_entropy"] = "binary_cross_entropy"
    label_smoothing: Share = 0.0
    target_threshold: float | None = Field(default=None, ge=0.0, lt=1.0)
    auxiliary: NonNegativeFloat = 0.3


Loss = Annotated[CrossEntropy | BinaryCrossEntropy, Field(discriminator="kind"), default_kind("cross_entropy")]
