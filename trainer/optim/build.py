"""The optimizer of a recipe, and which parameters it decays and adapts."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from configs import LonghaulError
from configs.optimisation import Lamb as LambConfig
from configs.optimisation import Lars as LarsConfig
from configs.optimisation import Optimizer
from configs.optimisation import Sgd as SgdConfig
from trainer.optim.layerwise import Lamb, Lars, Norms, whole_norms
from trainer.optim.momentum import Sgd

Groups = list[dict[str, Any]]

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # batch norm and instance norm first


def build_optimizer(
    config: Optimizer,
    model: nn.Module,
    stepped: Callable[[nn.Parameter], nn.Parameter] | None = None,
    norms: Norms = whole_norms,
    exact: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer of a recipe over the parameters of `model`, which are where they will be trained.

    Args:
        stepped: where an engine spreads a parameter, what of it is stepped here.
        norms: the L2 norms of whole parameters from what is here of each.
        exact: whether an element's bits must not depend on where in a tensor it lies (`momentum.choose_kernel`).

    Raises LonghaulError where apex is asked for and cannot be used.
    """
    groups = parameter_groups(model, config.weight_decay, config.decay_norm_and_bias)
    if stepped is not None:
        for group in groups:
            group["params"] = [stepped(parameter) for parameter in group["params"]]
    if isinstance(config, LarsConfig):
        return Lars(groups, config.momentum, config.trust, config.eps, config.style, norms, exact)
    if config.implementation == "apex":
        if stepped is not None:  # its LAMB would take the norms of what it is given
            raise LonghaulError(
                "optimizer.implementation=apex needs whole parameters: use engine.name=ddp, or "
                "optimizer.implementation=torch."
            )
        return _apex_optimizer(config, groups)
    if isinstance(config, LambConfig):
        return Lamb(groups, config.betas, config.eps, norms, exact)
    return Sgd(groups, config.style, config.momentum, config.nesterov, exact)


def parameter_groups(model: nn.Module, weight_decay: float, decay_all: bool) -> Groups:
    """The trainable parameters in up to two groups: the weights, which decay and are adapted (`adapt`), and the rest,
    which is not adapted and decays only with `decay_all`.

    The rest are the parameters of normalisation layers, by the type of the module (the batch norm of a shortcut is
    called `downsample.1`), biases, every parameter of one dimension (as in timm), and vectors of more dimensions that
    are not called `weight`, such as class tokens [1, 1, d] and LayerScale's factors [d, 1, 1].
    """
    weights: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                (weights if _is_weight(module, name, parameter) else rest).append(parameter)
    groups = [
        {"params": weights, "weight_decay": weight_decay, "adapt": True},
        {"params": rest, "weight_decay": weight_decay if decay_all else 0.0, "adapt": False},
    ]
    return [group for group in groups if group["params"]]


def _is_weight(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    if isinstance(module, _NORMS) or name == "bias" or parameter.ndim <= 1:
        return False
    return name == "weight" or parameter.numel() > max(parameter.shape)


def _all_of(groups: Groups) -> list[nn.Parameter]:
    return [parameter for group in groups for parameter in group["params"]]


def _apex_optimizer(config: SgdConfig | LambConfig, groups: Groups) -> torch.optim.Optimizer:
    mend = "or set optimizer.implementation=torch"
    try:
        # A package called apex proves nothing: on the package index it is a web toolkit, and without its CUDA
        # extensions NVIDIA's can be imported but not used.
        importlib.import_module("amp_C")
    except ImportError:
        raise LonghaulError(
            "optimizer.implementation=apex needs NVIDIA's apex with its CUDA extensions (amp_C), which cannot be "
            f"imported here: build it from NVIDIA's source or use NVIDIA's container, {mend}."
        ) from None
    device = _all_of(groups)[0].device
    if device.type != "cuda":
        raise LonghaulError(f"optimizer.implementation=apex runs on CUDA and not on {device}: use a GPU, {mend}.")
    from trainer.optim import apex

    if isinstance(config, LambConfig):
        return apex.Lamb(groups, config.betas, config.eps)
    return apex.Sgd(groups, config.momentum, config.nesterov)
