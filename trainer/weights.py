"""The network of a checkpoint, in one process and without an engine: for evaluation, analysis and export."""

from typing import Literal

import torch
from torch import nn

from configs import LonghaulError, Recipe
from trainer.checkpoints.files import load
from trainer.checkpoints.manifest import Saved, newest_valid, open_valid
from trainer.models import build_model
from trainer.rundir import RunDirectory

Weights = Literal["auto", "plain", "ema"]


def choose_checkpoint(run: RunDirectory, checkpoint: str | None) -> Saved:
    """A checkpoint that verifies: the one called `checkpoint`, or (None) the newest of the run. Raises LonghaulError
    where there is none."""
    store = run.store()
    if checkpoint is not None:
        try:
            return open_valid(store, checkpoint)
        except LonghaulError as error:
            raise LonghaulError(f"The checkpoint cannot be used: {error}.") from None
    saved = newest_valid(store)
    if saved is None:
        raise LonghaulError(f"{store} holds no checkpoint that verifies.")
    return saved


def uses_ema(recipe: Recipe, weights: Weights) -> bool:
    """Whether `weights` means the averaged ones; "auto" does where the recipe averages. Raises LonghaulError where
    averaged ones are asked for and there are none."""
    if weights == "ema" and recipe.ema is None:
        raise LonghaulError("Averaged weights (ema) are asked for, and the recipe keeps none: use plain ones.")
    return recipe.ema is not None and weights != "plain"


def load_network(recipe: Recipe, saved: Saved, weights: Weights = "auto") -> nn.Module:
    """The network of a checkpoint on the CPU, float32, in evaluation mode, with as many classes as it was trained for.

    Raises LonghaulError where the checkpoint does not fit the recipe.
    """
    network = build_model(recipe.model, int(saved.manifest["num_classes"]), recipe.seed)
    prefix = "ema" if uses_ema(recipe, weights) else "model"
    with torch.no_grad():
        load(saved, {f"{prefix}.{name}": tensor for name, tensor in network.state_dict().items()})
    return network.eval()
