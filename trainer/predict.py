"""Predictions of a plain network, in the precision and the memory format of its recipe."""

from collections.abc import Callable

import torch
from torch import nn

from configs import Recipe

Predict = Callable[[torch.Tensor], torch.Tensor]
"""Images, float32 [n, 3, height, width], normalised, to logits, float32 [n, classes]."""

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
        self._channels_last, self._device_type = recipe.channels_last, device.type
        self._dtype = _AUTOCAST.get(recipe.precision)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        laid_out = images if self._channels_last else images.contiguous()
        with torch.autocast(self._device_type, dtype=self._dtype, enabled=self._dtype is not None):
            return self._network(laid_out).float()
