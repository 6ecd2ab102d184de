"""`longhaul model`: the layers of a network, what it costs, and how many images fit into memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from configs import LonghaulError, Recipe, load_recipe
from configs.load import RECIPE_DIRECTORY, apply_overrides, parse_recipe
from data_pipeline.cache import parse_bytes, readable
from trainer.count import Costs, Layer, count, count_inference
from trainer.fit import RESERVE, footprint, largest_micro_batch
from trainer.models import MODELS

_MOST_OF_IT = 0.8
_BESIDE_THE_MODEL: dict[str, Any] = {  # what a recipe must have and this command does not look at
    "duration": "1it",
    "batch": {"size": 1, "micro": 1},
    "schedule": {"kind": "constant", "lr": 0.0},
}


@dataclass(frozen=True)
class Subject:
    """A network as it is trained: the recipe, and the image size and number of classes it is looked at with."""

    recipe: Recipe
    size: int
    classes: int

    @property
    def precision(self) -> str:
        return "bf16" if self.recipe.precision == "auto" else self.recipe.precision


def list_models(console: Console) -> None:
    """Print the networks of ours, with parameters and multiply-adds at the size they were made for."""
    table = Table("network", "images", "shortcut")
    for heading in ("parameters", "GMACs"):
        table.add_column(heading, justify="right")
    for name in MODELS:
        subject = _of_network(name, (), None, None)
        parameters, multiply_adds = count_inference(subject.recipe.model, subject.classes, subject.size)
        shortcut = "" if "plain" in name else subject.recipe.model.shortcut
        table.add_row(name, _square(subject.size), shortcut, f"{parameters:,}", _giga(multiply_adds))
    console.print(table)
    console.print(
        "And the classifiers of two libraries, with random weights: torchvision:NAME (torchvision:vgg16, "
        "torchvision:googlenet) and timm:NAME (timm:resnet50d).",
        highlight=False,
    )


def show_model(
    console: Console,
    name: str,
    overrides: Sequence[str],
    size: int | None,
    classes: int | None,
    precision: str | None,
    optimizer: str | None,
    memory: str | None,
    every_layer: bool,
) -> None:
    """Print the costs of a network, or of the network of a recipe. Raises LonghaulError for what cannot be."""
    limit = None if memory is None else _memory(memory)
    changes = [f"model.{change.removeprefix('model.')}" for change in overrides]
    changes += [] if precision is None else [f"precision={precision}"]
    changes += [] if optimizer is None else [f"optimizer={{kind: {optimizer}}}"]
    subject = _subject(name, changes, size, classes)
    costs = count(subject.recipe.model, subject.classes, subject.size, subject.precision)
    console.print(_table(subject, costs, every_layer))
    for line in _summary(subject, costs, limit):
        console.print(line, highlight=False)


def _subject(name: str, changes: Sequence[str], size: int | None, classes: int | None) -> Subject:
    """The network of that name, else the recipe."""
    is_path = "/" in name or name.endswith((".yaml", ".yml"))
    if name in MODELS or (":" in name and not is_path):
        return _of_network(name, changes, size, classes)
    if is_path or (RECIPE_DIRECTORY / f"{name}.yaml").is_file():
        return _seen(load_recipe(name, changes), size, classes)
    raise LonghaulError(f"There is no network and no recipe '{name}': `longhaul model` lists the networks.")


def _of_network(name: str, changes: Sequence[str], size: int | None, classes: int | None) -> Subject:
    cifar = name.startswith("cifar-")
    model = {"name": name, "shortcut": "A"} if cifar else {"name": name}  # as in the paper
    images = {"size": 32 if cifar else 224, "mean": [0] * 3, "std": [1] * 3, "crop": {"kind": "resized_crop"}}
    values = {**_BESIDE_THE_MODEL, "model": model, "input": images}
    return _seen(parse_recipe(apply_overrides(values, changes), name), size, classes)


def _seen(recipe: Recipe, size: int | None, classes: int | None) -> Subject:
    usual = 10 if recipe.model.name.startswith("cifar-") else 1000
    return Subject(
        recipe, size or recipe.input.train_size or recipe.input.size, classes or recipe.model.num_classes or usual
    )


def _memory(text: str) -> int:
    try:
        return parse_bytes(text)
    except LonghaulError:
        raise LonghaulError(f"--memory {text} is not a size: write it as 80GB or 24GiB.") from None


def _table(subject: Subject, costs: Costs, every_layer: bool) -> Table:
    model = subject.recipe.model
    options = "" if ":" in model.name else f" (stride {model.stride}, shortcut {model.shortcut})"
    title = f"{model.name}{options}: {_square(subject.size)} images, {subject.classes} classes"
    table = Table("layer", "type", "output", title=title)
    for heading in ("parameters", "GMACs", f"saved {subject.precision}"):
        table.add_column(heading, justify="right")
    for layer in _layers(costs) if every_layer else stages(costs.layers):
        table.add_row(
            layer.name or "(itself)", layer.kind, "x".join(map(str, layer.shape)),
            f"{layer.parameters:,}", _giga(layer.multiply_adds), readable(layer.saved_bytes),
        )  # fmt: skip
    table.add_section()
    table.add_row("all", "", "", f"{costs.parameters:,}", _giga(costs.multiply_adds), readable(costs.saved_bytes))
    return table


def _layers(costs: Costs) -> list[Layer]:
    return [layer for layer in costs.layers if layer.works]


def stages(layers: Sequence[Layer]) -> list[Layer]:
    """A network's parts with what is in them: those of the network itself, and those of a part that does most of it."""
    total = sum(layer.multiply_adds for layer in layers)

    def visit(name: str) -> Iterator[Layer]:
        inside = [layer for layer in layers if not name or layer.name == name or layer.name.startswith(f"{name}.")]
        whole, *parts = inside
        children = [part for part in parts if "." not in part.name[len(name) :].lstrip(".")]
        if children and sum(layer.multiply_adds for layer in inside) > _MOST_OF_IT * total:
            yield whole
            for child in children:
                yield from visit(child.name)
        else:
            kinds = {child.kind for child in children}
            kind = f"{len(children)} x {kinds.pop()}" if len(kinds) == 1 else whole.kind
            sums = [
                sum(getattr(part, key) for part in inside) for key in ("parameters", "multiply_adds", "saved_bytes")
            ]
            yield Layer(name, kind, whole.shape, *sums)

    return [part for part in visit("") if part.works]


def _summary(subject: Subject, costs: Costs, limit: int | None) -> Iterator[str]:
    recipe = subject.recipe
    kept = footprint(costs, recipe.optimizer, recipe.ema is not None)
    yield (
        f"For each image autograd saves {readable(costs.saved_bytes)} in {subject.precision}; at the peak of a step "
        f"{readable(costs.peak_bytes)} are in use, and {readable(costs.step_bytes)} whatever the micro-batch."
    )
    average = f" + moving average {readable(kept.average)}" if kept.average else ""
    yield (
        f"Kept all the time: weights {readable(kept.weights)} + gradients {readable(kept.gradients)} + "
        f"{recipe.optimizer.kind} {readable(kept.optimizer)}{average} = {readable(kept.total)}."
    )
    if limit is None:
        yield "With --memory 80GB: the largest micro-batch for it."
        return
    most = largest_micro_batch(costs, kept, limit)
    fits = f"The largest micro-batch is {most:,} images" if most else "Not even one image fits"
    yield (
        f"{fits} in {readable(limit)}, {RESERVE:.0%} of it left for what is not counted: CUDA context, workspaces, "
        "loaded batches, fragmentation."
    )


def _giga(multiply_adds: int) -> str:
    return f"{multiply_adds / 1e9:.3f}"


def _square(size: int) -> str:
    return f"{size}x{size}"
