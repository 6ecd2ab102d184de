"""safetensors: the weights, and in the file's metadata everything that `build_model` needs."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from configs import parse_recipe
from trainer.export.contents import Contents
from trainer.export.form import Form, Predict
from trainer.models import build_model


def load_safetensors(path: Path) -> nn.Module:
    """The network of an exported file, float32, on the CPU, in evaluation mode."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    recipe = parse_recipe(json.loads(metadata["recipe"]), str(path))
    network = build_model(recipe.model, len(json.loads(metadata["classes"])), recipe.seed)
    network.load_state_dict(load_file(path))
    return network.eval()


def _write(contents: Contents, path: Path) -> None:
    save_file(contents.weights(), path, {"format": "pt", **contents.metadata()})


def _load(contents: Contents, path: Path) -> Predict:
    del contents
    return torch.no_grad()(load_safetensors(path))


SAFETENSORS = Form(
    suffix=".safetensors",
    require=lambda _: None,
    write=_write,
    load=_load,
    usage='safetensors.torch.load_file("{path}")',
)
