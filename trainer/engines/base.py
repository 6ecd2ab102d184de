"""The interface of an engine: what the training loop needs, and no more."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from trainer.gradients import Health


class Engine(Protocol):
    """A model and its optimizer, spread over the workers in some way."""

    def forward_backward(
        self, images: torch.Tensor, labels: torch.Tensor, seed: int, first: bool, last: bool
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch.

        Args:
            images: float32 [n, 3, height, width], channels-last.
            labels: int64 [n], or after mixing float32 [n, classes], each row a distribution.
            seed: for anything random in the network; a function of recipe, step and micro-batch.
            first: whether this is micro-batch 0 of the step, whose batch-norm statistics are kept.
            last: whether this is the rank's last micro-batch of the step, after which gradients are reduced.

        Returns:
            float64 [2] on the device, detached: the mean loss, and the number of correct predictions (after
            mixing, of the likeliest class).
        """
        ...

    def update(self, step: int, learning_rate: float) -> None:
        """The optimizer step number `step` (from 0) with the mean gradient over the whole batch. Where that is not
        finite, weights, optimizer state and batch-norm statistics stay as they were."""
        ...

    def health(self) -> Health:
        """What became of the updates so far; waits for the device."""
        ...

    def evaluating(self, ema: bool) -> AbstractContextManager[nn.Module]:
        """The network in evaluation mode, its averaged weights where `ema`; after `synchronise_buffers`."""
        ...

    def synchronise_buffers(self) -> None:
        """Give every rank the batch-norm statistics of rank 0, which alone keeps them; before saving or evaluating."""
        ...

    def export_state(self) -> dict[str, Any]:
        """The canonical state, sharing memory where it can: tensors by `model.<fqn>`, `optim.state.<fqn>.<name>`,
        `ema.<fqn>`, `guard.<name>` and `loss_scale.<name>`."""
        ...

    def import_state(self, state: dict[str, Any]) -> None:
        """Take over a state of the form of `export_state`."""
        ...
