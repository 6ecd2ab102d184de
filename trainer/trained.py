"""A trained network and the images to try it on, in one process: for analysis and export."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from configs import LonghaulError, Recipe
from data_pipeline.cache import Cache
from data_pipeline.loader import Batch, evaluation_batches
from data_pipeline.split import Split, read_manifest
from data_pipeline.storage import Location
from trainer.batchnorm import exact_statistics
from trainer.checkpoints.manifest import Saved
from trainer.group import Rendezvous, free_port, join
from trainer.rundir import RunDirectory
from trainer.weights import Weights, load_network, uses_ema


@dataclass(frozen=True)
class Trained:
    """The network of a checkpoint, float32, in evaluation mode.

    Attributes:
        num_classes: of the network; the data may name fewer.
        averaged: whether the weights are the moving average of those that were trained.
        device: where the network is.
        threads: CPU threads for decoding images.
    """

    run: RunDirectory
    recipe: Recipe
    saved: Saved
    network: nn.Module
    num_classes: int
    averaged: bool
    device: torch.device
    threads: int

    def batches(self, split: Split, ids: NDArray[np.int64]) -> Iterator[Batch]:
        """The images `ids` of a split in central view, in batches as the recipe evaluates them."""
        size = self.recipe.evaluate.batch
        chosen = [ids[first : first + size] for first in range(0, len(ids), size)]
        return evaluation_batches(split, self.recipe.input, chosen, self.device, self.threads)

    def laid_out(self, images: torch.Tensor) -> torch.Tensor:
        """Images in the memory format that the recipe trains in."""
        return images if self.recipe.channels_last else images.contiguous()

    def recipe_sha256(self) -> str:
        """See `RunDirectory.recipe_sha256`."""
        return self.run.recipe_sha256()

    def classes(self, split: Split) -> list[str]:
        """A name for each class of the network; raises LonghaulError where the data has more classes than it."""
        names = list(split.manifest.classes)
        if len(names) > self.num_classes:
            raise LonghaulError(
                f"{split.location} has {len(names)} classes, and the network of {self.saved} {self.num_classes}: "
                f"give --data the data set that it was trained on."
            )
        return names + [f"(class {index} has no name)" for index in range(len(names), self.num_classes)]


def load_trained(run: RunDirectory, saved: Saved, weights: Weights, device: torch.device, threads: int) -> Trained:
    """The network of a checkpoint of `run`, with its plain or averaged weights (see `trainer.weights.uses_ema`)."""
    recipe = run.recipe()
    network = load_network(recipe, saved, weights).to(device)
    if recipe.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    num_classes = int(saved.manifest["num_classes"])
    return Trained(run, recipe, saved, network, num_classes, uses_ema(recipe, weights), device, threads)


@dataclass(frozen=True)
class Images:
    """Which images: of `data` (None: the data set that a run was trained on), at a URL through a cache."""

    data: Location | None = None
    cache_directory: Path | None = None
    cache_bytes: int | None = None

    @contextmanager
    def open(self, run: RunDirectory, *splits: str) -> Iterator[Split]:
        """The first of these splits that there is. Raises LonghaulError where there is none of them."""
        location = self.data or run.data()
        there = read_manifest(location)[0].splits
        name = next((name for name in splits if there.get(name)), splits[0])
        cache = None if isinstance(location, Path) else Cache(self.cache_directory, self.cache_bytes)
        with closing(Split(location, name, cache)) as split:
            yield split


def use_exact_statistics(trained: Trained, images: Images) -> None:
    """Give the network the batch-norm statistics that its recipe evaluates it with, where those are exact ones
    (`evaluate.exact_batch_norm`), measured on the training split of the same data."""
    num_micro = trained.recipe.evaluate.exact_batch_norm
    if not num_micro:
        return
    alone = Rendezvous(0, 1, 0, "127.0.0.1", free_port())
    with images.open(trained.run, "train") as split, join(alone, trained.device, timeout_seconds=600) as group:
        exact = exact_statistics(trained.network, trained.recipe, split, group, trained.threads, num_micro)
    trained.network.load_state_dict(exact, strict=False)


def spread(num_samples: int, count: int) -> NDArray[np.int64]:
    """`count` sample ids (all where there are fewer), evenly spread, so that data sorted by class gives of every class;
    int64, ascending."""
    count = min(count, num_samples)
    return np.arange(count, dtype=np.int64) * num_samples // max(count, 1)
