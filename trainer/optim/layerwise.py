"""Optimizers that choose the length of each weight's step by the weight's own norm, for large batches.

Where a norm is 0 the rate is not adapted: NVIDIA's choice, in apex (LARC.py before 2025; multi_tensor_lamb.cu) and
MXNet (multi_lars-inl.h), and timm's. The arithmetic runs in torch's fused kernels, which alone write to parameters and
state, and do not where `found_inf` is 1.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from trainer.optim.momentum import Style, choose_kernel, gather, make_momentum_buffers, momentum_step

Norms = Callable[[list[Tensor]], Tensor]
"""The L2 norm of each parameter, or gradient, from what is held of it here: float32 [n]."""


def whole_norms(tensors: list[Tensor]) -> Tensor:
    """Of tensors that are held whole."""
    return torch.stack(torch._foreach_norm(tensors))


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman & Ginsburg 2017, arXiv 1708.03888, algorithm 1).

    In groups with `adapt` the gradient g becomes r (g + weight_decay w), r = trust |w| / (|g| + weight_decay |w| + eps)
    for each parameter; then momentum as in torch (timm, apex) or as in Caffe (the paper, MLPerf's reference and
    NVIDIA's submissions). Other groups take plain momentum.
    """

    found_inf: Tensor | None = None
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        momentum: float,
        trust: float,
        eps: float,
        style: Style,
        norms: Norms = whole_norms,
        exact: bool = False,
    ) -> None:
        super().__init__(params, {"lr": 0.0, "momentum": momentum, "weight_decay": 0.0, "adapt": True})
        self.trust, self.eps, self.style, self._norms, self.exact = trust, eps, style, norms, exact
        make_momentum_buffers(self)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        kernel = choose_kernel(self, self.exact)
        for group in self.param_groups if kernel else ():
            parameters, gradients, buffers = gather(self, group)
            decay = group["weight_decay"]
            if group["adapt"] and parameters:
                rates = self._local_rates(parameters, gradients, decay)
                torch._foreach_add_(gradients, parameters, alpha=decay)
                torch._foreach_mul_(gradients, rates)
                decay = 0.0
            momentum_step(self.style, parameters, gradients, buffers, group["lr"], group["momentum"], decay, kernel)

    def _local_rates(self, parameters: list[Tensor], gradients: list[Tensor], decay: float) -> list[Tensor]:
        weight, gradient = self._norms(parameters), self._norms(gradients)
        rates = self.trust * weight / (gradient + decay * weight + self.eps)
        return _where_both(weight, gradient, rates)


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2019, arXiv 1904.00962, algorithm 2) with the bias correction of NVIDIA's FusedLAMB and timm's.

    u = m / (sqrt(v) + eps) + weight_decay w with Adam's corrected moments m and v; in groups with `adapt`
    w -= lr (|w| / |u|) u for each parameter, in others w -= lr u. Neither norm is bounded. The global norm of the
    gradient is not clipped here: `gradients.clip_norm` does it.
    """

    found_inf: Tensor | None = None
    _step_supports_amp_scaling = True

    def __init__(
        self, params: Any, betas: tuple[float, float], eps: float, norms: Norms = whole_norms, exact: bool = False
    ) -> None:
        super().__init__(params, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0, "adapt": True})
        self._updates: dict[Tensor, Tensor] = {}
        self._norms, self.exact = norms, exact
        for group in self.param_groups:
            for parameter in group["params"]:
                self._updates[parameter] = torch.zeros_like(parameter)
                self.state[parameter] = make_moments(parameter, parameter.device)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        kernel = choose_kernel(self, self.exact)
        for group in self.param_groups if kernel else ():
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            updates = self._adam_steps(parameters, group, kernel)
            torch._foreach_add_(updates, parameters, alpha=-group["weight_decay"])
            if group["adapt"]:
                weight, update = self._norms(parameters), self._norms(updates)
                torch._foreach_mul_(updates, _where_both(weight, update, weight / update))
            # Plain descent along -updates, for the sake of its `found_inf`.
            sgd(
                parameters, updates, [None] * len(updates), weight_decay=0.0, momentum=0.0, lr=group["lr"],
                dampening=0.0, nesterov=False, maximize=True, **kernel,
            )  # fmt: skip

    def _adam_steps(self, parameters: list[Tensor], group: dict[str, Any], kernel: dict[str, Any]) -> list[Tensor]:
        """-m / (sqrt(v) + eps), by a step of Adam from zero at a rate of 1, which moves `step` and the moments on."""
        updates = [self._updates[parameter] for parameter in parameters]
        states = [self.state[parameter] for parameter in parameters]
        torch._foreach_zero_(updates)
        beta1, beta2 = group["betas"]
        adam(
            updates, [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states], [],
            [state["step"] for state in states], amsgrad=False, beta1=beta1, beta2=beta2, lr=1.0, weight_decay=0.0,
            eps=group["eps"], maximize=False, **kernel,
        )  # fmt: skip
        return updates


def make_moments(parameter: Tensor, step_device: torch.device) -> dict[str, Tensor]:
    """The state of Adam and LAMB at the start: `step` is 0-dim float32, the moments are like the parameter."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=step_device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def _where_both(first: Tensor, second: Tensor, rates: Tensor) -> list[Tensor]:
    """`rates`, one 0-dim tensor each, or 1 where either norm is 0."""
    return list(torch.where((first > 0) & (second > 0), rates, 1.0).unbind())
