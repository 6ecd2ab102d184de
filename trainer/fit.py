"""How many images fit: the memory of one worker in training, and the largest micro-batch for it."""

from dataclasses import dataclass

from configs.optimisation import Lamb, Optimizer
from trainer.count import Costs

RESERVE = 0.1
"""The share of the memory that stays free for what is not counted: the CUDA context, workspaces of cuDNN and of
collectives, the batches that the input pipeline holds, and the allocator's fragmentation."""


@dataclass(frozen=True)
class Footprint:
    """What one worker keeps in memory throughout a run with replicated weights (engine ddp), in bytes."""

    weights: int
    gradients: int
    optimizer: int
    average: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average


def footprint(costs: Costs, optimizer: Optimizer, averaged: bool) -> Footprint:
    """Weights (with batch-norm statistics), gradients, the optimizer's state and, where `averaged`, the moving average;
    all float32."""
    weights = 4 * costs.parameters
    kept = weights + costs.buffer_bytes
    return Footprint(kept, weights, state_tensors(optimizer) * weights, kept if averaged else 0)


def state_tensors(optimizer: Optimizer) -> int:
    """How many tensors of its size the optimizer keeps for a parameter: its momentum, or Adam's two moments."""
    if isinstance(optimizer, Lamb):
        return 2
    return 1 if optimizer.momentum else 0


def largest_micro_batch(costs: Costs, kept: Footprint, memory: int) -> int:
    """The most images of a micro-batch on a device with `memory` bytes, less the reserve; 0 where not one fits."""
    left = memory - int(RESERVE * memory) - kept.total - costs.step_bytes
    return max(0, left // costs.peak_bytes)
