"""A directory that `timm.create_model("local-dir:...", pretrained=True)` loads, and timm's hub would."""

import io
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from configs import LonghaulError
from configs.schema import Input
from data_pipeline.split import Split
from trainer.export.contents import Contents
from trainer.export.form import Form, Predict, library_name
from trainer.trained import spread

_KEPT = ("first_conv", "classifier", "fixed_input_size")  # of timm's own configuration of the architecture
_MOST_LEVELS = 0.25  # of 255: how far pixels may be apart on average; single ones differ by a level in rounding


def crop_pct(size: int, eval_resize: int | None) -> float:
    """size / eval_resize, such that timm, which takes the whole part of size / crop_pct, resizes to eval_resize."""
    if eval_resize is None:
        return 1.0
    share = size / eval_resize
    while math.floor(size / share) < eval_resize:
        share = math.nextafter(share, 0.0)
    return share


def data_config(config: Input) -> dict[str, Any]:
    """How images are seen, in timm's terms (`timm.data.resolve_data_config`)."""
    return {
        "input_size": (3, config.size, config.size),
        "interpolation": "bilinear",
        "mean": config.mean,
        "std": config.std,
        "crop_pct": crop_pct(config.size, config.eval_resize),
        "crop_mode": "center",
    }


def _write(contents: Contents, path: Path) -> None:
    recipe = contents.trained.recipe
    name, seen = library_name(recipe.model, "timm"), data_config(recipe.input)
    own = timm.get_pretrained_cfg(name)
    kept = {} if own is None else {key: getattr(own, key) for key in _KEPT}
    # In the place of timm's configuration, which tells of other weights: their licence, authors and test size.
    cfg = {"architecture": name, "num_classes": len(contents.classes), **kept, **seen}
    network = timm.create_model(name, pretrained_cfg=cfg, num_classes=len(contents.classes))
    network.load_state_dict(contents.weights())
    timm.models.save_for_hf(
        network, str(path), model_config={"label_names": contents.classes}, safe_serialization=True, data_config=seen
    )
    config = path / "config.json"
    known = {key: value for key, value in contents.metadata().items() if key != "classes"}  # they are label_names
    described = {**json.loads(config.read_text()), "longhaul": known}
    config.write_text(json.dumps(described, indent=2))


def _network(path: Path) -> nn.Module:
    return timm.create_model(f"local-dir:{path}", pretrained=True).eval()


def _load(contents: Contents, path: Path) -> Predict:
    del contents
    return torch.no_grad()(_network(path))


@torch.no_grad()
def _examine(contents: Contents, path: Path, split: Split, num_images: int) -> list[str]:
    """Whether timm, told nothing but the directory, sees images as the recipe does, and the same classes in them."""
    trained, network = contents.trained, _network(path)
    resolved = timm.data.resolve_model_data_config(network)
    expected = data_config(trained.recipe.input)
    wrong = [f"{key} {resolved[key]} for {value}" for key, value in expected.items() if _differs(resolved[key], value)]
    if wrong:
        raise LonghaulError(f"timm would see images in another way than the recipe: {', '.join(wrong)}.")
    transform = timm.data.create_transform(**resolved, is_training=False)
    ids, levels, apart, same = spread(len(split), num_images), 0.0, 0.0, 0
    std = torch.tensor(trained.recipe.input.std).view(3, 1, 1)
    for batch in trained.batches(split, ids):
        here = split.images(batch.records[:, 0])
        theirs = torch.stack([transform(as_image(view)) for view in here])
        ours = batch.images.cpu()
        levels += float((255 * std * (theirs - ours)).abs().mean((1, 2, 3)).sum())
        logits, seen = network(ours), network(theirs)
        apart = max(apart, float((logits - seen).abs().max()))
        same += int((logits.argmax(1) == seen.argmax(1)).sum())
    if not levels / len(ids) <= _MOST_LEVELS:
        raise LonghaulError(
            f"timm's own transform gives pixels {levels / len(ids):.1f} levels of 255 from the recipe's."
        )
    return [
        f"with timm's own transform: pixels {levels / len(ids):.3f} levels of 255 apart on average, logits at most "
        f"{apart:.2g}; the same top-1 on {same} of {len(ids)} images"
    ]


def _differs(one: Any, other: Any) -> bool:
    return tuple(np.atleast_1d(one)) != tuple(np.atleast_1d(other))


def as_image(view: NDArray[np.uint8]) -> Image.Image:
    """An image of a split (the bytes of a JPEG, or pixels) as PIL reads it."""
    return Image.fromarray(view) if view.ndim == 3 else Image.open(io.BytesIO(view.tobytes())).convert("RGB")


TIMM = Form(
    suffix="-timm",
    require=partial(library_name, library="timm"),
    write=_write,
    load=_load,
    usage='timm.create_model("local-dir:{path}", pretrained=True)',
    holds=("config.json", "model.safetensors"),
    examine=_examine,
)
