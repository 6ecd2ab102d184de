"""Classifiers of torchvision and timm by name, with random weights: nothing is ever downloaded.

They are the libraries' own objects, so that their state dicts fit the libraries' weights. In training mode GoogLeNet
and Inception v3 of torchvision return (logits, *auxiliary logits), as `trainer.models` has it. The libraries take
seconds to import, and are imported only where a network of theirs is built.
"""

import warnings
from typing import Any

from torch import nn

from configs import LonghaulError, did_you_mean

LIBRARIES = ("torchvision", "timm")


def build_library_model(library: str, name: str, num_classes: int, drop_path: float) -> nn.Module:
    """The classifier `name` of "torchvision" or "timm", its weights drawn from torch's generator as the library draws
    them, with the library's own defaults. Raises LonghaulError where there is none, or it has no `drop_path`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, for their own maintainers
        if library == "torchvision":
            return _torchvision(name, num_classes)
        return _timm(name, num_classes, drop_path)


def _torchvision(name: str, num_classes: int) -> nn.Module:
    from torchvision import models

    classifiers = models.list_models(module=models)
    if name not in classifiers:
        if name in models.list_models():
            raise LonghaulError(f"torchvision:{name} does not classify images: name one of torchvision's classifiers.")
        raise LonghaulError(f"torchvision has no classifier '{name}'{did_you_mean(name, classifiers)}.")
    # Two take `transform_input`, which is off without pretrained weights: images come normalised as the recipe says.
    return models.get_model(name, weights=None, num_classes=num_classes)


def _timm(name: str, num_classes: int, drop_path: float) -> nn.Module:
    import timm

    architecture, tag = timm.models.split_model_name_tag(name)
    if not timm.is_model(architecture):  # also hf-hub:..., which would be fetched
        raise LonghaulError(f"timm has no model '{name}'{did_you_mean(architecture, timm.list_models())}.")
    if tag:
        raise LonghaulError(
            f"timm:{name}: '{tag}' names pretrained weights, and training starts from random ones: give "
            f"timm:{architecture}."
        )
    options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    try:
        model = timm.create_model(name, pretrained=False, num_classes=num_classes, **options)
    except TypeError:
        if not options:
            raise
        raise LonghaulError(f"model.drop_path={drop_path}: timm:{name} has none; leave it out, or give 0.") from None
    if getattr(model, "num_classes", None) != num_classes:
        raise LonghaulError(f"timm:{name} has no classifier: name another.")
    return model
