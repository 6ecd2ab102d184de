"""Optimizers, built from the recipe."""

import torch
from torch import nn

from configs.optimisation import Optimizer, Sgd


def build_optimizer(config: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """SGD over two groups: what decays and what does not. Momentum exists from the start, as zeros, so that a state
    dict has the same keys before and after the first step (for the update itself it makes no difference)."""
    if not isinstance(config, Sgd):
        raise NotImplementedError(config.kind)
    decaying, exempt = _split_by_decay(model, config.decay_norm_and_bias)
    groups = [
        {"params": decaying, "weight_decay": config.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=0.0,  # set before every step from the schedule
        momentum=config.momentum,
        nesterov=config.nesterov,
        fused=True,
    )
    for group in optimizer.param_groups:
        for parameter in group["params"] if config.momentum else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _split_by_decay(model: nn.Module, everything: bool) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """By the type of the module, not by name: the batch norm of a shortcut is called `downsample.1`."""
    decaying: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_norm = isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm)
            keep = everything or not (is_norm or name == "bias")
            (decaying if keep else exempt).append(parameter)
    return decaying, exempt
