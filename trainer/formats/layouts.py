"""In which order an optimizer has its parameters. torch's optimizers save state by number, not by name: what number 7
is depends on how whoever made the optimizer grouped the parameters of the network."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from configs import LonghaulError
from configs.optimisation import Sgd
from trainer.optim.build import parameter_groups

Layout = list[list[str]]  # for each group the names of its parameters, in order

_NORMS = (  # `norm_classes` of set_weight_decay in torchvision's references
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LocalResponseNorm,
)


def torchvision_layout(network: nn.Module, norm: bool, bias: bool) -> Layout:
    """As `set_weight_decay` of torchvision's references (references/classification/utils.py) groups parameters: with
    --norm-weight-decay those of normalisation layers are apart, with --bias-weight-decay everything called bias is, of
    normalisation layers too."""
    other: list[str] = []
    norms: list[str] = []
    biases: list[str] = []
    for path, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                kept = biases if bias and name == "bias" else norms if norm and isinstance(module, _NORMS) else other
                kept.append(f"{path}.{name}".removeprefix("."))
    return [group for group in (other, norms, biases) if group]


def longhaul_layout(network: nn.Module, optimizer: Sgd) -> Layout:
    """As our own optimizers have them: what decays and what does not; in one group where everything does."""
    if optimizer.decay_norm_and_bias or not optimizer.weight_decay:
        return torchvision_layout(network, norm=False, bias=False)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = parameter_groups(network, optimizer.weight_decay, decay_all=False)
    return [[names[id(parameter)] for parameter in group["params"]] for group in groups]


def name_state(optimizer: Mapping[str, Any], network: nn.Module, where: str) -> dict[str, Tensor]:
    """The momentum in the state dict of a torch.optim.SGD, by name of parameter.

    The grouping is the one among those in use whose groups have as many parameters as these, with momentum of the same
    shapes. Raises LonghaulError where there is none, or the state is another optimizer's.
    """
    groups, state = optimizer["param_groups"], optimizer["state"]
    if any(set(values) - {"momentum_buffer"} for values in state.values()):
        keys = sorted({key for values in state.values() for key in values})
        raise LonghaulError(f"{where} has the state of another optimizer than SGD ({', '.join(keys)}): not supported.")
    numbers = [list(group["params"]) for group in groups]
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    for layout in _in_use(network):
        if [len(group) for group in layout] != [len(group) for group in numbers]:
            continue
        named = dict(zip(_flat(layout), _flat(numbers), strict=True))
        buffers = {name: state.get(number, {}).get("momentum_buffer") for name, number in named.items()}
        if all(buffer is None or buffer.shape == shapes[name] for name, buffer in buffers.items()):
            return {name: buffer.float() for name, buffer in buffers.items() if buffer is not None}
    raise LonghaulError(
        f"{where} has its parameters in groups of {[len(group) for group in numbers]}, which is no grouping of the "
        "recipe's network that is known here (all in one; torchvision's; weights apart from norms and biases)."
    )


def state_dict(momentum: Mapping[str, Tensor], layout: Layout, groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A torch.optim.SGD's state dict, over parameters in `layout`, each group with the values in `groups`. Parameters
    without momentum have no state."""
    numbers = {name: number for number, name in enumerate(_flat(layout))}
    return {
        "state": {numbers[name]: {"momentum_buffer": momentum[name]} for name in _flat(layout) if name in momentum},
        "param_groups": [
            {**values, "params": [numbers[name] for name in names]}
            for names, values in zip(layout, groups, strict=True)
        ],
    }


def sgd_group(optimizer: Sgd, learning_rate: float, weight_decay: float) -> dict[str, Any]:
    """The values of a parameter group of torch.optim.SGD."""
    defaults = torch.optim.SGD([torch.zeros(1)], lr=0.0).defaults
    return {
        **defaults,
        "lr": learning_rate,
        "momentum": optimizer.momentum,
        "nesterov": optimizer.nesterov,
        "weight_decay": weight_decay,
    }


def _in_use(network: nn.Module) -> Iterator[Layout]:
    everything = torchvision_layout(network, norm=False, bias=False)
    yield everything
    for norm, bias in ((True, False), (True, True), (False, True)):
        yield torchvision_layout(network, norm, bias)
    yield torchvision_layout(network, norm=True, bias=False)[::-1]  # split_normalization_params, until 2022
    weights = longhaul_layout(network, Sgd())
    yield weights
    yield weights[::-1]


def _flat(groups: Sequence[Sequence[Any]]) -> list[Any]:
    return [item for group in groups for item in group]
