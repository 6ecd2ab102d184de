"""A state dict that `torchvision.models` loads strictly."""

from functools import partial
from pathlib import Path

import torch
from torchvision.models import get_model

from trainer.export.contents import Contents
from trainer.export.form import Form, Predict, library_name


def _write(contents: Contents, path: Path) -> None:
    torch.save(contents.weights(), path)


def _load(contents: Contents, path: Path) -> Predict:
    name = library_name(contents.trained.recipe.model, "torchvision")
    network = get_model(name, weights=None, num_classes=len(contents.classes))
    network.load_state_dict(torch.load(path, weights_only=True))
    return torch.no_grad()(network.eval())


TORCHVISION = Form(
    suffix="-torchvision.pth",
    require=partial(library_name, library="torchvision"),
    write=_write,
    load=_load,
    usage='torchvision.models.get_model("{name}", num_classes={classes}).load_state_dict(torch.load("{path}"))',
)
