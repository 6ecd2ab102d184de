"""Compiling the forward and backward pass with torch.compile, and on GPUs into CUDA graphs."""

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from configs import LonghaulError

_MODES = {"default": "default", "cuda-graphs": "reduce-overhead", "max-autotune": "max-autotune"}


def compiled(network: nn.Module, how: str, device: torch.device) -> Callable[..., Any]:
    """The forward pass of `network` as the recipe's `compile` says. It is compiled when it first runs: once for batch
    norm that keeps statistics, and once for one that does not.

    Raises LonghaulError where the machine cannot do it.
    """
    if how == "eager":
        return network
    if how == "cuda-graphs" and device.type != "cuda":
        raise LonghaulError("compile=cuda-graphs needs a GPU; use compile=default, or compile=eager.")
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise LonghaulError("compile needs a C++ compiler on a CPU: install g++, set CXX, or use compile=eager.")
    forward = torch.compile(network, mode=_MODES[how])
    if how == "default" or device.type != "cuda":
        return forward

    def graphed(*inputs: torch.Tensor) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # outputs of the micro-batch before are no longer looked at
        return forward(*inputs)

    return graphed
