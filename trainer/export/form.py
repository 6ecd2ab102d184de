"""The forms in which networks are exported."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from configs import LonghaulError
from configs.schema import Model
from data_pipeline.split import Split
from trainer.export.contents import Contents

Predict = Callable[[torch.Tensor], torch.Tensor]
FORMS = ("safetensors", "onnx", "torchvision", "timm")


@dataclass(frozen=True)
class Form:
    """One form.

    Attributes:
        suffix: of the file's name.
        require: raises LonghaulError where there is no such form of a network.
        write: writes it at a path.
        load: reads what was written in the way its users do; gives a function from normalised images, float32
            [n, 3, height, width], to logits, float32 [n, classes], on the CPU.
        usage: how its users read it, with {path}, {classes} (how many) and {name} (of the network in its library).
        holds: the names of the files, where the form is a directory.
        examine: further checks on images of a split: what they found, in words; raises LonghaulError.
    """

    suffix: str
    require: Callable[[Model], object]
    write: Callable[[Contents, Path], None]
    load: Callable[[Contents, Path], Predict]
    usage: str
    holds: tuple[str, ...] = ()
    examine: Callable[[Contents, Path, Split, int], list[str]] = lambda *_: []


def choose_form(name: str) -> Form:
    """The form of that name; raises LonghaulError where there is none. Imports the library that it is for."""
    if name == "safetensors":
        from trainer.export.to_safetensors import SAFETENSORS as form
    elif name == "onnx":
        from trainer.export.to_onnx import ONNX as form
    elif name == "torchvision":
        from trainer.export.to_torchvision import TORCHVISION as form
    elif name == "timm":
        from trainer.export.to_timm import TIMM as form
    else:
        raise LonghaulError(f"--to {name}: it is {', '.join(FORMS[:-1])} or {FORMS[-1]}.")
    return form


def library_name(model: Model, library: str) -> str:
    """The name under which `library` (torchvision or timm) has the same network; raises LonghaulError.

    Both have ResNets with option B shortcuts and, of bottlenecks, the stride in the 3x3 convolution (v1.5).
    """
    source, _, name = model.name.rpartition(":")
    deep = name in ("resnet50", "resnet101", "resnet152")
    why = f"has no network like model.name={model.name}"
    if source == library:
        return name
    if deep or name in ("resnet18", "resnet34"):
        if source or (model.shortcut == "B" and (model.stride == "v1.5" or not deep)):
            return name
        own = f"model.stride={model.stride}" if model.shortcut == "B" else f"model.shortcut={model.shortcut}"
        why = f"has {name} with option B shortcuts and stride v1.5 only, and this one has {own}"
    raise LonghaulError(f"{library} {why}: export it --to safetensors or onnx.")
