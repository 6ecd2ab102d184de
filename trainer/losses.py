"""Training losses, built from the recipe."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from configs.optimisation import BinaryCrossEntropy, Loss

Outputs = Tensor | tuple[Tensor, ...]


def build_loss(config: Loss) -> Callable[[Outputs, Tensor], Tensor]:
    """The loss of a recipe: a function of outputs and targets that returns the mean over the batch, float32, 0-dim.

    Outputs are logits [n, classes] of any float type, or a tuple of them and the logits of auxiliary classifiers,
    whose losses are added with the weight `config.auxiliary`. Targets are labels, int64 [n], or distributions over the
    classes, float32 [n, classes], without label smoothing: it is applied to both.
    """

    def one(logits: Tensor, targets: Tensor) -> Tensor:
        if isinstance(config, BinaryCrossEntropy):
            return _binary_cross_entropy(logits.float(), targets, config.label_smoothing, config.target_threshold)
        return functional.cross_entropy(logits.float(), targets, label_smoothing=config.label_smoothing)

    def loss(outputs: Outputs, targets: Tensor) -> Tensor:
        if isinstance(outputs, Tensor):
            return one(outputs, targets)
        main, *auxiliary = (one(logits, targets) for logits in outputs)
        return main + config.auxiliary * torch.stack(auxiliary).sum() if auxiliary else main

    return loss


def main_logits(outputs: Outputs) -> Tensor:
    """The logits [n, classes] that predictions are made from, of a network with or without auxiliary classifiers."""
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def _binary_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float, threshold: float | None) -> Tensor:
    """As timm's BinaryCrossEntropy, with targets smoothed as timm's Mixup does it: towards 1 / classes."""
    classes = logits.shape[1]
    if targets.ndim == 1:
        targets = functional.one_hot(targets, classes)
    targets = targets.float() * (1.0 - smoothing) + smoothing / classes
    if threshold is not None:
        targets = (targets > threshold).float()
    return functional.binary_cross_entropy_with_logits(logits, targets)
