"""What a training checkpoint of any program comes to: weights and momentum by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from configs import LonghaulError, Recipe
from configs.optimisation import Sgd
from trainer.checkpoints.inventory import read_state
from trainer.checkpoints.manifest import Saved

MOMENTUM = ".momentum_buffer"


@dataclass(frozen=True)
class TrainingState:
    """What other programs' checkpoints and ours have in common.

    Attributes:
        weights: of the network by name, batch-norm statistics among them.
        momentum: by the name of the parameter; those left out are zeros.
        averaged: the moving average, like `weights`; None where none is kept.
        steps: updates done, where that is what the program counts.
        epochs: epochs done, where it counts these.
        notes: what a person should know, in sentences.
    """

    weights: dict[str, Tensor]
    momentum: dict[str, Tensor]
    averaged: dict[str, Tensor] | None = None
    steps: int | None = None
    epochs: int | None = None
    notes: list[str] = field(default_factory=list)


def require_sgd(recipe: Recipe, program: str) -> Sgd:
    """The recipe's optimizer. Raises LonghaulError where its state has no counterpart in torch.optim.SGD's."""
    optimizer = recipe.optimizer
    if not isinstance(optimizer, Sgd):
        raise LonghaulError(
            f"optimizer.kind={optimizer.kind}: with {program} only SGD's state can be exchanged; `longhaul export` "
            "gives the weights alone, and `longhaul checkpoint merge` everything."
        )
    if optimizer.style == "caffe":
        raise LonghaulError(
            f"optimizer.style=caffe keeps the learning rate in the momentum, which torch.optim.SGD, used with "
            f"{program}, does not: only optimizer.style=torch can be exchanged."
        )
    return optimizer


def read_checkpoint(saved: Saved, network: nn.Module) -> TrainingState:
    """The training state of a checkpoint of ours; `network` is of its recipe."""
    state = read_state(saved, ignore=["ledger", "guard", "loss_scale"])
    named = [name for name, _ in network.named_parameters()]
    momentum = {n: state[f"optim.state.{n}{MOMENTUM}"] for n in named if f"optim.state.{n}{MOMENTUM}" in state}
    averaged = _below("ema.", state)
    return TrainingState(_below("model.", state), momentum, averaged or None, steps=saved.step)


def fit(found: Mapping[str, Tensor], network: nn.Module, where: str) -> dict[str, Tensor]:
    """Weights for every tensor of a network and no other, as float32 where they are floating point.

    Raises LonghaulError naming the first that is missing, or too much, or has another shape.
    """
    wanted = network.state_dict()
    for name in [*wanted, *found]:
        if name not in found:
            raise LonghaulError(f"{where} has no '{name}', which the recipe's network has: {_MEND}.")
        if name not in wanted:
            raise LonghaulError(f"{where} has '{name}', which the recipe's network has not: {_MEND}.")
        if found[name].shape != wanted[name].shape:
            raise LonghaulError(
                f"{where}: '{name}' has shape {list(found[name].shape)}, and in the recipe's network "
                f"{list(wanted[name].shape)}: {_MEND}."
            )
    return {name: found[name].to(tensor.dtype).contiguous() for name, tensor in wanted.items()}


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


_MEND = "give the --recipe, or the model.* values, that it was trained with"
