"""Exact batch-norm statistics: a strict average over many micro-batches, in place of the moving average of training.

The published ResNets have them: mean and variance "are strictly computed using average (not moving average) on a
sufficiently large training batch after the training procedure" (KaimingHe/deep-residual-networks, README). A moving
average holds statistics of weights that are gone, and counts the last few micro-batches most.

In training mode a layer normalises by the statistics of the batch it sees, not by those it keeps, so one pass gives
all layers at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from configs import LonghaulError, Recipe
from data_pipeline.loader import training_batches
from data_pipeline.order import build_order
from data_pipeline.split import Split
from trainer.group import Group
from trainer.predict import Predictor
from trainer.schedules import total_steps

Statistics = dict[str, torch.Tensor]
_STATISTICS = ("running_mean", "running_var")


def exact_statistics(
    network: nn.Module, recipe: Recipe, split: Split, group: Group, threads: int, num_micro: int
) -> Statistics:
    """Mean and variance of every batch norm, averaged over `num_micro` micro-batches of the training split.

    They are a function of weights, recipe and data. The micro-batches are those that would follow the run's last step:
    augmented as training augments at its final resolution, but not mixed. What else is random in training (dropout,
    stochastic depth) is off. Ranks take turns, and each micro-batch's mean and unbiased variance are added in their
    order in float64: the bits do not depend on the number of workers. Called by all ranks together.

    Args:
        network: on the group's device, the same on all ranks; left as it was, in evaluation mode.

    Returns:
        `NAME.running_mean` and `NAME.running_var` of each norm, as in its state_dict; float32 [channels].

    Raises:
        LonghaulError: where the network has no norm that keeps statistics.
    """
    norms = _norms(network)
    order = build_order(recipe, [shard.rows for shard in split.shards])
    first, each = total_steps(recipe, len(split)), recipe.batch.num_micro
    work = [(first + k // each, k % each) for k in range(num_micro)]
    own = work[group.rank :: group.world_size]
    batches = training_batches(split, recipe.input, order, own, group.device, threads)
    predict = Predictor(network, recipe, group.device)
    found = {f"{name}.{key}": getattr(norm, key) for name, norm in norms.items() for key in _STATISTICS}
    sizes = [tensor.numel() for tensor in found.values()]
    total = torch.zeros(sum(sizes), dtype=torch.float64, device=group.device)
    with _measuring(norms):
        for done in range(0, num_micro, group.world_size):
            batch = next(batches, None)
            if batch is not None:
                predict(batch.images)
            for one in _gathered(torch.cat([*found.values()]), group)[: num_micro - done]:
                total += one
    means = (total / num_micro).float().split(sizes)
    return dict(zip(found, means, strict=True))


@contextmanager
def replaced_statistics(network: nn.Module, statistics: Statistics) -> Iterator[None]:
    """The network with other statistics (of `exact_statistics`) in its norms; its own come back at the end."""
    norms = _norms(network)
    with _kept(norms):
        with torch.no_grad():
            for name, norm in norms.items():
                for key in _STATISTICS:
                    getattr(norm, key).copy_(statistics[f"{name}.{key}"])
        yield


def _norms(network: nn.Module) -> dict[str, _NormBase]:
    norms = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, _NormBase) and module.running_mean is not None
    }
    if not norms:
        raise LonghaulError(
            "The network has no batch norm that keeps statistics, so there are none to average: set "
            "evaluate.exact_batch_norm=0 (of `longhaul eval`: --batch-norm 0)."
        )
    return norms


@contextmanager
def _measuring(norms: dict[str, _NormBase]) -> Iterator[None]:
    """After each forward pass the norms hold the mean and the unbiased variance of that pass."""
    before = [(norm, norm.training, norm.momentum, norm.track_running_stats) for norm in norms.values()]
    with _kept(norms):
        for norm in norms.values():
            # Not train(): an activation or dropout inside the norm stays in evaluation mode.
            norm.training, norm.momentum, norm.track_running_stats = True, 1.0, True
        try:
            yield
        finally:
            for norm, training, momentum, tracked in before:
                norm.training, norm.momentum, norm.track_running_stats = training, momentum, tracked


@contextmanager
def _kept(norms: dict[str, _NormBase]) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for norm in norms.values() for buffer in norm.buffers(recurse=False)]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def _gathered(own: torch.Tensor, group: Group) -> list[torch.Tensor]:
    """Every rank's tensor, in order of rank."""
    found = [torch.empty_like(own) for _ in range(group.world_size)]
    dist.all_gather(found, own, group=group.gradients)
    return found
