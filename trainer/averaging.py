"""The exponential moving average of a network: weights and batch-norm statistics (Polyak averaging, as torchvision's
references and timm keep it)."""

import copy

import torch
from torch import Tensor, nn

from configs import Recipe
from trainer.progress import is_due
from trainer.statistics import Statistics


class Average:
    """A copy of a network that follows it. Its state is part of a checkpoint."""

    def __init__(self, recipe: Recipe, num_samples: int, network: nn.Module) -> None:
        assert recipe.ema is not None
        self._config, self._batch_size, self._num_samples = recipe.ema, recipe.batch.size, num_samples
        self._start = recipe.ema.start.steps(recipe.batch.size, num_samples)
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.statistics = Statistics(self.network)
        self._own, self._followed = _by_kind(self.network), _by_kind(network)

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Move towards the network where that is due after the `step`-th update (counted from 1)."""
        if not is_due(self._config.every, step, self._batch_size, self._num_samples):
            return
        (own, own_counters), (followed, counters) = self._own, self._followed
        if step <= self._start:
            torch._foreach_copy_(own, followed)
        else:
            torch._foreach_lerp_(own, followed, 1.0 - self._config.decay)
        if counters:  # a counter of batches has no mean
            torch._foreach_copy_(own_counters, counters)


def _by_kind(network: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and buffers that are averaged, and buffers of whole numbers."""
    tensors = [*network.parameters(), *network.buffers()]
    return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]
