"""The exponential moving average of a network: weights and batch-norm statistics (Polyak averaging, as torchvision's
references and timm keep it)."""

import torch
import torch.distributed as dist
from torch import nn

from configs import Recipe
from trainer.checkpoints.state import Piece, State, values
from trainer.progress import is_due
from trainer.statistics import broadcast_together


class Average:
    """Follows a network, in the same pieces as an engine holds it. `state` is part of a checkpoint."""

    def __init__(self, recipe: Recipe, num_samples: int, own: State, followed: State) -> None:
        """`own`: where the average is kept, at first equal to `followed`; both by name as in a state_dict, sharing
        memory with whoever gave them."""
        assert recipe.ema is not None
        self._config, self._batch_size, self._num_samples = recipe.ema, recipe.batch.size, num_samples
        self._start = recipe.ema.start.steps(recipe.batch.size, num_samples)
        self.state = own
        pairs = [(values(own[name]), values(part)) for name, part in followed.items()]
        self._averaged = [(mean, source) for mean, source in pairs if source.is_floating_point()]
        self._copied = [(mean, source) for mean, source in pairs if not source.is_floating_point()]
        self._buffers = [own[name] for name, part in followed.items() if not isinstance(part, (Piece, nn.Parameter))]

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Move towards the network where that is due after the `step`-th update (counted from 1)."""
        if not is_due(self._config.every, step, self._batch_size, self._num_samples):
            return
        own, followed = (list(each) for each in zip(*self._averaged, strict=True))
        if step <= self._start:
            torch._foreach_copy_(own, followed)
        else:
            torch._foreach_lerp_(own, followed, 1.0 - self._config.decay)
        for counter, source in self._copied:  # a counter of batches has no mean
            counter.copy_(source)

    def broadcast(self, group: dist.ProcessGroup) -> None:
        """Give every rank the averaged buffers of rank 0."""
        broadcast_together([values(part) for part in self._buffers], group)
