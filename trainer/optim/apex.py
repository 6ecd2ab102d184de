"""NVIDIA's fused optimizers under the protocol of `trainer.optim`. Only where `amp_C` is there can this be imported.

Written from apex's source as of July 2026 (apex/optimizers/fused_sgd.py, fused_lamb.py, csrc/multi_tensor_lamb.cu).
"""

import math
from typing import Any

import torch
from apex.optimizers import FusedLAMB, FusedSGD

from trainer.optim.layerwise import make_moments


class Sgd(FusedSGD):
    """FusedSGD in torch's form. Its kernel reads a flag on the device, and does nothing where it is set."""

    found_inf: torch.Tensor | None = None
    _step_supports_amp_scaling = True

    def __init__(self, params: Any, momentum: float, nesterov: bool) -> None:
        super().__init__(params, lr=0.0, momentum=momentum, nesterov=nesterov, set_grad_none=True)
        for group in self.param_groups:
            for parameter in group["params"]:  # without momentum too: FusedSGD makes them in any case
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def step(self) -> None:
        if self.found_inf is None:
            self._dummy_overflow_buf.zero_()
        else:
            self._dummy_overflow_buf.copy_(self.found_inf)
        super().step()


class Lamb(FusedLAMB):
    """FusedLAMB without its clipping. It adapts what decays (`use_nvlamb` would adapt everything), so the recipe is
    held to weights that decay and a rest that does not.

    Its kernels ignore the flag, and it counts steps on the host: `found_inf` is read there, which waits for the GPU.
    """

    found_inf: torch.Tensor | None = None
    _step_supports_amp_scaling = True

    def __init__(self, params: Any, betas: tuple[float, float], eps: float) -> None:
        super().__init__(
            params, lr=0.0, bias_correction=True, betas=betas, eps=eps, adam_w_mode=True, grad_averaging=True,
            set_grad_none=True, max_grad_norm=math.inf, use_nvlamb=False,
        )  # fmt: skip
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = make_moments(parameter, torch.device("cpu"))

    def step(self) -> None:
        if self.found_inf is not None and self.found_inf.item():
            return
        for group in self.param_groups:
            steps = [self.state[parameter]["step"] for parameter in group["params"]]
            group["step"] = int(steps[0])  # its own count; ours is what a checkpoint restores
            torch._foreach_add_(steps, 1)
        super().step()
