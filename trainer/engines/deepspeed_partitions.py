"""Where DeepSpeed's ZeRO keeps what of each parameter, and an optimizer that steps it.

ZeRO lays parameters end to end in flat fp32 tensors, of which a rank holds one stretch (stages 1 and 2), or cuts each
parameter into equal stretches and lays a rank's own end to end (stage 3); both pad. Read from the source of DeepSpeed
0.19: runtime/zero/stage_1_and_2.py, stage3.py. None of it is public: the version is pinned.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Stretch:
    """What a rank holds of a parameter in a flat tensor; perhaps nothing.

    Attributes:
        parameter: the module's, whose own shape stage 3 takes away.
        start: the place of its first element here in the parameter's row-major form.
        values: the elements, 1-D; a view of the flat tensor, and a leaf that an optimizer can step.
        flat: the flat tensor.
        at: where in it they begin.
    """

    parameter: nn.Parameter
    start: int
    values: nn.Parameter
    flat: Tensor
    at: int


def stretches(zero: Any, stage: int, rank: int) -> list[Stretch]:
    """Those of all parameters, in an order that is the same on every rank. `zero` is DeepSpeed's optimizer."""
    return list(_of_whole_groups(zero, rank) if stage < 3 else _of_each_parameter(zero, rank))


def _of_whole_groups(zero: Any, rank: int) -> Iterator[Stretch]:
    for index, flat in enumerate(zero.single_partition_of_fp32_groups):
        first, beyond = rank * flat.numel(), (rank + 1) * flat.numel()
        offsets = zero.round_robin_bit16_offsets[index]
        for parameter, offset in zip(zero.round_robin_bit16_groups[index], offsets, strict=True):
            start = min(max(first - offset, 0), parameter.numel())
            end = min(max(beyond - offset, start), parameter.numel())
            yield _stretch(parameter, start, end - start, flat, offset + start - first)


def _of_each_parameter(zero: Any, rank: int) -> Iterator[Stretch]:
    for flat, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
        at = 0
        for parameter in parameters:
            size = parameter.partition_numel()
            start = min(rank * size, parameter.ds_numel)
            yield _stretch(parameter, start, min(size, parameter.ds_numel - start), flat, at)
            at += size


def _stretch(parameter: nn.Parameter, start: int, count: int, flat: Tensor, at: int) -> Stretch:
    at = at if count else 0
    return Stretch(parameter, start, nn.Parameter(flat.detach()[at : at + count]), flat, at)


class PartitionOptimizer(torch.optim.Optimizer):
    """What DeepSpeed steps, knowing flat tensors alone: it has another optimizer step the stretches in them.

    So each parameter keeps its own decay, norm (LARS, LAMB) and state, whatever else shares a flat tensor with it.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(list(parameters), {"lr": 0.0})
        self._stretches: list[Stretch] = []
        self._step_stretches: Callable[[], None] = lambda: None

    def delegate(self, held: list[Stretch], step: Callable[[], None]) -> None:
        """Step `held`, in flat tensors that have taken the place of the parameters, by `step`. It is called with the
        gradients of some of them set, and is to leave the others alone."""
        self._stretches, self._step_stretches = held, step

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """As DeepSpeed calls it: with one or more flat tensors in the groups, their gradients whole."""
        flats = {id(flat): flat.grad for group in self.param_groups for flat in group["params"]}
        stepped = [(held, flats[id(held.flat)]) for held in self._stretches if id(held.flat) in flats]
        for held, gradient in stepped:
            assert gradient is not None
            held.values.grad = gradient[held.at : held.at + held.values.numel()]
        self._step_stretches()
        for held, _ in stepped:
            held.values.grad = None
