"""Batch norm's running statistics as one tensor: kept, given away and put back in a single operation."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class Statistics:
    """Moves the running means and variances of a network into one flat tensor (and the counters of batches into
    another), of which each layer's buffers become views. State dicts stay as they are."""

    def __init__(self, network: nn.Module) -> None:
        self.norms = [m for m in network.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
        names = ("running_mean", "running_var")
        self._values = _gather([(norm, name) for norm in self.norms for name in names])
        self._counters = _gather([(norm, "num_batches_tracked") for norm in self.norms])
        self._before: tuple[Tensor, Tensor] | None = None

    def track(self, wanted: bool) -> None:
        """Whether the next forward pass in training mode changes the statistics."""
        for norm in self.norms:
            norm.track_running_stats = wanted

    def keep(self) -> None:
        """Remember them as they are, for `put_back`."""
        if self.norms:
            self._before = (self._values.clone(), self._counters.clone())

    def put_back(self, condition: Tensor) -> None:
        """Where `condition` (bool []) holds, make them what they were at the last `keep`, whatever they are now."""
        if self._before is not None:
            for now, before in zip((self._values, self._counters), self._before, strict=True):
                now.copy_(torch.where(condition, before, now))
            self._before = None

    def broadcast(self, group: dist.ProcessGroup) -> None:
        """Give every rank those of rank 0."""
        if self.norms:
            dist.broadcast(self._values, src=0, group=group)
            dist.broadcast(self._counters, src=0, group=group)


@torch.no_grad()
def broadcast_together(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Give every rank the tensors of rank 0, in one operation for each dtype."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        dist.broadcast(flat, src=0, group=group)
        for tensor, part in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def _gather(places: list[tuple[nn.Module, str]]) -> Tensor:
    """One tensor with the buffers at `places` one after the other; each buffer becomes a view of it."""
    if not places:
        return torch.empty(0)
    buffers = [getattr(module, name) for module, name in places]
    flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
    parts = flat.split([buffer.numel() for buffer in buffers])
    for (module, name), buffer, part in zip(places, buffers, parts, strict=True):
        setattr(module, name, part.view(buffer.shape))
    return flat
