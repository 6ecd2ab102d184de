"""Predictions of a plain network, in the precision and the memory format of its recipe."""

from collections.abc import Callable

import torch
from torch import nn

from configs import Recipe

Predict = Callable[[torch.Tensor], torch.Tensor]
"""Images, float32 [n, 3, height, width], normalised, to logits, float32 [n, classes]."""

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    """The precision that a recipe computes in, on a device."""
    dtype = _AUTOCAST.get(recipe.precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def place(network: nn.Module, recipe: Recipe, device: torch.device) -> nn.Module:
    """The network itself, moved to `device`, its weights in the memory format that the recipe trains in."""
    network.to(device)
    if recipe.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


class Predictor:
    """A `Predict` of a network that gives logits alone in evaluation mode, which it is put into and left in.

    The network's weights stay as they are: `place` moves those of one that was just loaded.
    """

    def __init__(self, network: nn.Module, recipe: Recipe, device: torch.device) -> None:
        self._network = network.eval()
        self._recipe, self._device = recipe, device

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        laid_out = images if self._recipe.channels_last else images.contiguous()
        with autocast(self._recipe, self._device):
            return self._network(laid_out).float()
