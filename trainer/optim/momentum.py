"""Stochastic gradient descent with momentum, in torch's form and in Caffe's."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.sgd import sgd

Style = Literal["torch", "caffe"]


class Sgd(torch.optim.Optimizer):
    """Momentum as in torch (`torch.optim.SGD`), or as in Caffe, the paper's framework
    (src/caffe/solvers/sgd_solver.cpp, nesterov_solver.cpp).

    Caffe's, with g = gradient + weight_decay w: v' = momentum v + lr g, w -= v'; with Nesterov's form
    w -= (1 + momentum) v' - momentum v. Unlike in torch's form, a step keeps the rate it was taken at: after the rate
    is divided by 10, v still holds steps ten times as large.
    """

    found_inf: Tensor | None = None
    _step_supports_amp_scaling = True

    def __init__(self, params: Any, style: Style, momentum: float, nesterov: bool, exact: bool = False) -> None:
        super().__init__(params, {"lr": 0.0, "momentum": momentum, "nesterov": nesterov, "weight_decay": 0.0})
        self.style, self.exact = style, exact
        make_momentum_buffers(self)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        kernel = choose_kernel(self, self.exact)
        for group in self.param_groups if kernel else ():
            parameters, gradients, buffers = gather(self, group)
            momentum_step(
                self.style, parameters, gradients, buffers, group["lr"], group["momentum"], group["weight_decay"],
                kernel, group["nesterov"],
            )  # fmt: skip


def choose_kernel(optimizer: Any, exact: bool) -> dict[str, Any]:
    """Torch's fused kernels, which look at `found_inf` themselves; or nothing where this step is to be skipped.

    On a CPU they round the elements at the end of a tensor, which fill no vector register, otherwise than the rest
    (torch 2.13: 58 of 1,001 parameters), so that bits depend on how tensors are cut. Where that must not be (`exact`),
    a CPU takes operations that treat all alike, which pass over memory four times for once.
    """
    if not exact or optimizer.param_groups[0]["params"][0].device.type != "cpu":
        return {"fused": True, "found_inf": optimizer.found_inf}
    if optimizer.found_inf is not None and optimizer.found_inf > 0:
        return {}
    return {"fused": False, "foreach": True, "found_inf": None}


def make_momentum_buffers(optimizer: torch.optim.Optimizer) -> None:
    """Zeros for every parameter of a group with momentum, in its memory format."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def gather(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[Any]]:
    """Parameters that have a gradient, their gradients, and their momentum buffers (None without momentum)."""
    parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
    buffers = [optimizer.state[parameter].get("momentum_buffer") for parameter in parameters]
    return parameters, [parameter.grad for parameter in parameters], buffers


def momentum_step(
    style: Style,
    parameters: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Any],
    lr: float,
    momentum: float,
    weight_decay: float,
    kernel: dict[str, Any],
    nesterov: bool = False,
) -> None:
    """One step in a kernel of `choose_kernel`. Overwrites the gradients."""
    if not parameters:
        return
    if style == "caffe":
        # With gradient and decay scaled by the rate and a rate of 1, torch's form is Caffe's; Nesterov's too, since
        # momentum v = v' - lr g makes Caffe's (1 + momentum) v' - momentum v equal to lr g + momentum v'.
        torch._foreach_mul_(gradients, lr)
        lr, weight_decay = 1.0, lr * weight_decay
    sgd(
        parameters, gradients, buffers, weight_decay=weight_decay, momentum=momentum, lr=lr, dampening=0.0,
        nesterov=nesterov, maximize=False, **kernel,
    )  # fmt: skip
