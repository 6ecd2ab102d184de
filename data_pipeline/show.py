"""`longhaul data show`: a picture of samples as the network sees them, beside their originals with the crop boxes."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from configs import Recipe
from data_pipeline.loader import Batch, training_batches
from data_pipeline.order import Order
from data_pipeline.records import SHOWN
from data_pipeline.split import Split

_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#46a0a0", "#f032e6", "#9a6324")
_GAP = 6


@dataclass(frozen=True)
class _SameSamples:
    """The first samples of a run, again in every epoch: what the loader is told to read, step e being epoch e."""

    ids: NDArray[np.int64]
    seed: int

    @property
    def num_samples(self) -> int:
        return len(self.ids)

    @property
    def batch_size(self) -> int:
        return len(self.ids)

    @property
    def micro_size(self) -> int:
        return len(self.ids)

    def micro_batch(self, step: int, micro: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        del micro
        return np.full_like(self.ids, step), self.ids


def show_samples(directory: Path, recipe: Recipe, out: Path, num_samples: int, num_epochs: int) -> None:
    """Write the picture: a row for each of the first samples of the run, first the original with the crop box of each
    epoch in a colour, then what the network sees in each epoch, framed in that colour."""
    split = Split(directory, "train")
    order = Order(recipe.seed, len(split), recipe.batch.size, recipe.batch.micro)
    ids = order.at(np.arange(min(num_samples, len(split))))[1]
    work = [(epoch, 0) for epoch in range(num_epochs)]
    chosen = _SameSamples(ids, recipe.seed)
    batches = list(training_batches(split, recipe.input, chosen, work, torch.device("cpu"), threads=1))
    side = max(recipe.input.size, 112)
    columns = 1 + num_epochs
    grid = Image.new("RGB", (columns * (side + _GAP) + _GAP, len(ids) * (side + 16 + _GAP) + _GAP), "white")
    pen = ImageDraw.Draw(grid)
    for row in range(len(ids)):
        top = _GAP + row * (side + 16 + _GAP)
        boxes = [batch.records[row, 2:6].tolist() for batch in batches]
        shown = int(batches[0].records[row, SHOWN])
        grid.paste(_original(split, shown, boxes, side), (_GAP, top))
        label = split.manifest.classes[split.labels[shown]]
        pen.text((_GAP, top + side + 2), f"{label}  {split.key(shown)}"[: columns * side // 7], fill="black")
        for column, image in enumerate(_seen(recipe, batches, row), start=1):
            left = _GAP + column * (side + _GAP)
            grid.paste(image.resize((side, side), Image.Resampling.NEAREST), (left, top))
            pen.rectangle((left - 2, top - 2, left + side + 1, top + side + 1), outline=_colour(column - 1), width=2)
    grid.save(out)


def _original(split: Split, sample: int, boxes: list[list[int]], side: int) -> Image.Image:
    """The image, shrunk or enlarged to fit a square of `side`, with boxes (y, x, height, width)."""
    (view,) = split.images(np.array([sample]))
    image = Image.fromarray(view) if view.ndim == 3 else Image.open(io.BytesIO(view.tobytes())).convert("RGB")
    scale = side / max(image.size)
    square = Image.new("RGB", (side, side), "#dddddd")
    square.paste(image.resize([max(1, round(scale * length)) for length in image.size], Image.Resampling.BILINEAR))
    pen = ImageDraw.Draw(square)
    for number, (y, x, height, width) in enumerate(boxes):
        pen.rectangle([scale * v for v in (x, y, x + width, y + height)], outline=_colour(number), width=2)
    return square


def _seen(recipe: Recipe, batches: list[Batch], row: int) -> list[Image.Image]:
    """One sample of each batch, with the normalisation undone."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (recipe.input.mean, recipe.input.std))
    pixels = [(255 * (batch.images[row] * std + mean)).round().clamp(0, 255) for batch in batches]
    return [Image.fromarray(image.to(torch.uint8).permute(1, 2, 0).numpy()) for image in pixels]


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]
