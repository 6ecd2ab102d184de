"""Training checkpoints of torchvision's references/classification/train.py.

A file of {"model", "optimizer", "lr_scheduler", "epoch", "args"}, with "model_ema" where an average is kept. "epoch" is
the last one done, counted from 0; training goes on with the next. The optimizer is a torch.optim.SGD over the groups
that `utils.set_weight_decay` makes (`layouts.torchvision_layout`).
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs import Duration, LonghaulError, Recipe
from trainer.atomic import replacing
from trainer.checkpoints.compare import compare_states
from trainer.export.form import library_name
from trainer.formats.layouts import longhaul_layout, name_state, sgd_group, state_dict, torchvision_layout
from trainer.formats.pickles import read_torch_file
from trainer.formats.training import TrainingState, fit, require_sgd

_STAND_INS = {"argparse.Namespace": argparse.Namespace}  # holds values and does nothing
_COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel


def read(path: Path, network: nn.Module, trust: bool) -> TrainingState:
    """A checkpoint whose model is `network`. Raises LonghaulError where it is not one, or another model's."""
    file = read_torch_file(path, _STAND_INS, trust)
    for key in ("model", "optimizer", "epoch"):
        if key not in file:
            raise LonghaulError(
                f"{path} has no '{key}': it is not a training checkpoint of torchvision's references/classification."
            )
    weights = fit(file["model"], network, str(path))
    averaged = file.get("model_ema")
    if averaged is not None:
        found = {name.removeprefix("module."): tensor for name, tensor in averaged.items() if name != _COUNTER}
        averaged = fit(found, network, f"{path}, model_ema")
    momentum = name_state(file["optimizer"], network, f"{path}, optimizer")
    return TrainingState(weights, momentum, averaged, epochs=int(file["epoch"]) + 1)


def write(
    state: TrainingState, recipe: Recipe, network: nn.Module, num_samples: int, rate: float, out: Path
) -> list[str]:
    """Write a checkpoint from which train.py --resume goes on, and return what a person should know, in sentences.

    `num_samples` is the size of the training split, `rate` the learning rate of the next step.

    It holds tensors and plain values alone ("args" is a dictionary), so that torch.load(weights_only=True) reads it.
    Of "lr_scheduler" it has what depends on the epoch; train.py's own arguments decide the rest. Raises LonghaulError
    where torchvision has no such network, or its optimizer no such state.
    """
    name = library_name(recipe.model, "torchvision")
    optimizer = require_sgd(recipe, "torchvision's references")
    assert state.steps is not None
    epochs = _whole_epochs(recipe, num_samples, state.steps)
    apart = not optimizer.decay_norm_and_bias and optimizer.weight_decay > 0
    layout = torchvision_layout(network, norm=apart, bias=apart)
    if apart and set(layout[0]) != set(longhaul_layout(network, optimizer)[0]):
        raise LonghaulError(
            f"model.name={recipe.model.name} has parameters that are neither normalisation's nor biases and do not "
            "decay, for which torchvision's references have no such group: set optimizer.decay_norm_and_bias=true."
        )
    decays = [optimizer.weight_decay] + [0.0] * (len(layout) - 1)
    groups = [{**sgd_group(optimizer, rate, decay), "initial_lr": recipe.schedule.lr} for decay in decays]
    file: dict[str, Any] = {
        "model": state.weights,
        "optimizer": state_dict(state.momentum, layout, groups),
        "lr_scheduler": scheduler_state(recipe, num_samples, epochs, rate, len(groups)),
        "epoch": epochs - 1,
        "args": {"model": name, "opt": "sgd_nesterov" if optimizer.nesterov else "sgd", "lr": recipe.schedule.lr,
                 "momentum": optimizer.momentum, "weight_decay": optimizer.weight_decay,
                 "norm_weight_decay": 0.0 if apart else None, "bias_weight_decay": 0.0 if apart else None},
    }  # fmt: skip
    if state.averaged is not None:
        averaged = {f"module.{name}": tensor for name, tensor in state.averaged.items()}
        file["model_ema"] = {_COUNTER: torch.tensor(state.steps), **averaged}
    with replacing(out) as temporary:
        torch.save(file, temporary)
        again = torch.load(temporary, weights_only=True)
        if compare_states(_tensors(file), _tensors(again)):
            raise LonghaulError(f"What was written for {out} differs from the checkpoint, and was removed: try again.")
    return _notes(recipe, num_samples, state.steps, epochs, apart)


def _whole_epochs(recipe: Recipe, num_samples: int, step: int) -> int:
    epochs = step * recipe.batch.size // num_samples
    return epochs + int(epoch_end(epochs + 1, recipe, num_samples) <= step)


def epoch_end(epochs: int, recipe: Recipe, num_samples: int) -> int:
    """The number of steps after which so many epochs are done; a batch over the border counts for the one before."""
    return Duration.parse(f"{epochs}ep").steps(recipe.batch.size, num_samples)


def scheduler_state(recipe: Recipe, num_samples: int, epochs: int, rate: float, num_groups: int) -> dict[str, Any]:
    """After so many epochs, at a learning rate of `rate`: what a StepLR, CosineAnnealingLR or ExponentialLR takes over
    from a state dict; with a warm-up, a SequentialLR of one that warms up and one of these."""
    state = {"last_epoch": epochs, "_step_count": epochs + 1, "_last_lr": [rate] * num_groups}
    rates = {"base_lrs": [recipe.schedule.lr] * num_groups}
    warmup = math.ceil(recipe.schedule.warmup.samples(recipe.batch.size, num_samples) / num_samples - 1e-9)
    if warmup == 0:
        return state | rates
    # SequentialLR steps one of the two, and the second from its own 0 on.
    own = (min(epochs, warmup - 1), max(epochs - warmup, 0))
    return state | {"_schedulers": [{**state, **rates, "last_epoch": last} for last in own]}


def _notes(recipe: Recipe, num_samples: int, step: int, epochs: int, apart: bool) -> list[str]:
    notes = []
    if step > epoch_end(epochs, recipe, num_samples):
        since = step * recipe.batch.size / num_samples - epochs
        notes.append(f"train.py counts whole epochs: it goes on with epoch {epochs}, of which {since:.2f} are done.")
    if apart:
        notes.append("Give train.py --norm-weight-decay 0 --bias-weight-decay 0: norms and biases did not decay.")
    return notes


def _tensors(file: dict[str, Any]) -> dict[str, Tensor]:
    found = {**file["model"], **{f"ema.{name}": tensor for name, tensor in file.get("model_ema", {}).items()}}
    return found | {f"momentum.{n}": s["momentum_buffer"] for n, s in file["optimizer"]["state"].items()}
