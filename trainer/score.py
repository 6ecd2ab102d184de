"""`longhaul eval`: the score of checkpoints and of their ensemble, in one process or under torchrun."""

import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs import LonghaulError, Recipe
from data_pipeline.cache import Cache
from data_pipeline.split import Split
from data_pipeline.storage import Location, parse_location
from data_pipeline.views import choose_views
from trainer.batchnorm import exact_statistics, replaced_statistics
from trainer.checkpoints.manifest import Saved, open_checkpoint
from trainer.evaluate import Member, Score, evaluate_ensemble
from trainer.group import Group, Rendezvous, join, pick_device
from trainer.predict import Predictor, place
from trainer.run import cores_each
from trainer.rundir import RunDirectory
from trainer.weights import Weights, choose_checkpoint, load_network, uses_ema


@dataclass(frozen=True)
class Target:
    """What is to be scored: a checkpoint of a run, or (None) its newest valid one."""

    run: RunDirectory
    checkpoint: str | None = None


@dataclass(frozen=True)
class How:
    """How checkpoints are scored.

    Attributes:
        device: "auto", "cpu" or "cuda".
        threads: CPU threads a worker (0: cores / workers, or 1 where a recipe is deterministic).
        views: a name in `data_pipeline.views.VIEWS`.
        weights: None for what each recipe says.
        norm_batches: micro-batches for exact batch-norm statistics, 0 for the moving average; None for what each
            recipe says.
        cache_directory, cache_bytes: see `data_pipeline.cache.Cache`.
    """

    device: str = "auto"
    threads: int = 0
    views: str = "central"
    weights: Weights | None = None
    norm_batches: int | None = None
    cache_directory: Path | None = None
    cache_bytes: int | None = None


@dataclass(frozen=True)
class Scored:
    """The score of one checkpoint; `averaged`: with the moving average of its weights; `norm_batches`: see `How`."""

    saved: Saved
    averaged: bool
    norm_batches: int
    score: Score


def score_checkpoints(
    targets: Sequence[Target], data: Location | None = None, how: How = How()
) -> tuple[list[Scored], Score]:
    """Score checkpoints, one by one and all together as an ensemble (of one: itself), on the held-out split of `data`
    (None: that of their runs).

    Raises LonghaulError where there is no such checkpoint, no such views or weights, nothing is held out, or they
    cannot be an ensemble: runs on different data, or networks of different numbers of classes.
    """
    recipes = [target.run.recipe() for target in targets]
    views = [choose_views(how.views, recipe.input, recipe.evaluate) for recipe in recipes]
    weights = [how.weights or recipe.evaluate.weights for recipe in recipes]
    averaged = [uses_ema(recipe, which) for recipe, which in zip(recipes, weights, strict=True)]
    norm_batches = [
        recipe.evaluate.exact_batch_norm if how.norm_batches is None else how.norm_batches for recipe in recipes
    ]
    data = data or _common_data(targets)
    cache = None if isinstance(data, Path) else Cache(how.cache_directory, how.cache_bytes)
    rendezvous = Rendezvous.from_environment()
    threads = how.threads or _threads_each(recipes)
    torch.set_num_threads(threads)
    with ExitStack() as stack:
        split = stack.enter_context(closing(Split(data, "val", cache)))
        device = pick_device(how.device, rendezvous.local_rank)
        group = stack.enter_context(join(rendezvous, device, timeout_seconds=600))
        checkpoints = [_choose(target, group) for target in targets]
        _check_classes(checkpoints, split)
        members = []
        for i, recipe in enumerate(recipes):
            network = place(load_network(recipe, checkpoints[i], weights[i]), recipe, device)
            if norm_batches[i]:
                _use_exact_statistics(stack, network, recipe, data, cache, group, threads, norm_batches[i])
            members.append(Member(Predictor(network, recipe, device), views[i]))
        batch_size = min(recipe.evaluate.batch for recipe in recipes)
        scores = evaluate_ensemble(members, split, batch_size, group, threads)
    each = zip(checkpoints, averaged, norm_batches, scores, strict=False)  # the last score may be the ensemble's
    return [Scored(*one) for one in each], scores[-1]


def _threads_each(recipes: Sequence[Recipe]) -> int:
    """As in training, so that a deterministic run scores here what it scored there."""
    deterministic = any(recipe.deterministic for recipe in recipes)
    return 1 if deterministic else cores_each(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _common_data(targets: Sequence[Target]) -> Location:
    """Where the data lies that the runs were trained on, which must have been the same."""
    starts: list[dict[str, Any]] = [
        next(event for event in target.run.events() if event["event"] == "start") for target in targets
    ]
    for target, start in zip(targets, starts, strict=True):
        if start["data_sha256"] != starts[0]["data_sha256"]:
            raise LonghaulError(
                f"{target.run.path} was trained on {start['data']} and {targets[0].run.path} on {starts[0]['data']}, "
                f"whose contents differ: give --data the one to score them all on."
            )
    return parse_location(starts[0]["data"])


def _choose(target: Target, group: Group) -> Saved:
    """Rank 0 chooses: a run that goes on may have a newer checkpoint by the time that another looks."""
    found: str | LonghaulError | None = None
    if group.rank == 0:
        try:
            found = choose_checkpoint(target.run, target.checkpoint).name
        except LonghaulError as error:
            found = error
    found = group.from_zero(found)
    if isinstance(found, LonghaulError):
        raise found
    return open_checkpoint(target.run.store(), found)


def _check_classes(checkpoints: Sequence[Saved], split: Split) -> None:
    numbers = [int(saved.manifest["num_classes"]) for saved in checkpoints]
    for saved, number in zip(checkpoints, numbers, strict=True):
        if number != numbers[0]:
            raise LonghaulError(
                f"{saved} tells {number} classes apart and {checkpoints[0]} {numbers[0]}: an ensemble needs "
                f"the same classes; score them one by one."
            )
    if numbers[0] < len(split.manifest.classes):
        raise LonghaulError(
            f"{checkpoints[0]} tells {numbers[0]} classes apart but {split.location} has "
            f"{len(split.manifest.classes)}: give --data what it was trained for."
        )


def _use_exact_statistics(
    stack: ExitStack,
    network: nn.Module,
    recipe: Recipe,
    data: Location,
    cache: Cache | None,
    group: Group,
    threads: int,
    num_micro: int,
) -> None:
    with closing(Split(data, "train", cache, recipe.input.damaged)) as split:
        statistics = exact_statistics(network, recipe, split, group, threads, num_micro)
    stack.enter_context(replaced_statistics(network, statistics))
