"""Result cards: what a recipe scored here, in a file that says all that the score depends on.

A card holds runs of one recipe that differ in their seed alone. It carries the whole recipe as it was resolved, and the
overrides that make it of a built-in one: so it stays true, and `changes` tells, when that recipe is changed.
"""

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from configs import LonghaulError, Recipe, list_recipes, load_recipe, parse_recipe
from trainer.rundir import RunDirectory, difference

Card = dict[str, Any]
_APART = {"description", "seed"}  # what runs of one card may differ in


def make_card(runs: Sequence[RunDirectory], name: str | None, machine: str, versions: dict[str, str]) -> Card:
    """The card of finished runs of one recipe, of each seed one.

    Args:
        name: the recipe's, built in or a path; None: that of the built-in one with the fewest differences.
        machine: where they ran, in words.
        versions: of what they ran with, by package; torch's is added from the runs.

    Raises LonghaulError where the runs do not belong on one card.
    """
    recipes = [run.recipe() for run in runs]
    starts = [_start(run) for run in runs]
    _require_alike(runs, recipes, starts)
    name = name or nearest_recipe(recipes[0])
    overrides = overrides_between(load_recipe(name), recipes[0])
    scores = sorted((_score(*run) for run in zip(runs, recipes, starts, strict=True)), key=lambda score: score["seed"])
    resolved = _comparable(recipes[0])
    return {
        "recipe": name,
        "overrides": overrides,
        "recipe_sha256": _sha256(resolved),
        **{key: _summary([score[key] for score in scores]) for key in ("top1", "top5")},
        "runs": scores,
        "machine": machine,
        "commit": ", ".join(sorted({start.get("commit", "unknown") for start in starts})),
        "versions": {**versions, "torch": starts[0]["torch"]},
        "data_sha256": starts[0]["data_sha256"],
        "resolved": resolved,
    }


def read_cards(directory: Path) -> dict[str, Card]:
    """The cards in a directory by their file's name, in its order."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))}


def changes(card: Card) -> list[str]:
    """In what the card's recipe, loaded today, is no longer that of the card, one ``key: old -> new`` each.

    A key that the schema gained since, with a default under which nothing changes, is no difference. Raises
    LonghaulError where the recipe is gone or the card's own is no longer valid.
    """
    then = parse_recipe(card["resolved"], f"the card of {card['recipe']}")
    return [line for line in difference(then, load_recipe(card["recipe"], card["overrides"])) if not _apart(line)]


def is_whole(card: Card) -> bool:
    """Whether the recipe in the card is the one of which it has the hash, and the summary that of its runs."""
    summaries = all(card[key] == _summary([run[key] for run in card["runs"]]) for key in ("top1", "top5"))
    return summaries and card["recipe_sha256"] == _sha256(card["resolved"])


def overrides_between(base: Recipe, changed: Recipe) -> list[str]:
    """The overrides that make one recipe of another, but for seed and description."""
    return _overrides(_comparable(base), _comparable(changed), "")


def nearest_recipe(recipe: Recipe) -> str:
    """The built-in recipe with the fewest differences; raises LonghaulError where there are several."""
    counts = {name: len(difference(load_recipe(name), recipe)) for name in list_recipes()}
    nearest = [name for name, count in counts.items() if count == min(counts.values())]
    if len(nearest) > 1:
        raise LonghaulError(f"The run is as near to the recipes {' and '.join(nearest)}: say which with --recipe.")
    return nearest[0]


def _require_alike(runs: Sequence[RunDirectory], recipes: Sequence[Recipe], starts: Sequence[dict[str, Any]]) -> None:
    first = runs[0]
    for run, recipe, start in zip(runs[1:], recipes[1:], starts[1:], strict=True):
        found = [line for line in difference(recipes[0], recipe) if not _apart(line)]
        if found:
            raise LonghaulError(
                f"{first.path} and {run.path} differ in more than the seed ({'; '.join(found)}): make a card of each."
            )
        if start["data_sha256"] != starts[0]["data_sha256"]:
            raise LonghaulError(f"{first.path} and {run.path} were trained on different data: make a card of each.")
    seeds = [recipe.seed for recipe in recipes]
    for seed in seeds:
        if seeds.count(seed) > 1:
            raise LonghaulError(f"More than one of the runs has the seed {seed}: a card holds each seed once.")


def _start(run: RunDirectory) -> dict[str, Any]:
    """How the run's last attempt began; raises LonghaulError where it has no score yet."""
    result = run.result()
    if result is None:
        raise LonghaulError(f"{run.path} is not finished (it has no result.json): finish it first.")
    if result["top1"] is None:
        raise LonghaulError(f"{run.path} has no score: its data set holds nothing out to evaluate.")
    return [event for event in run.events() if event["event"] == "start"][-1]


def _score(run: RunDirectory, recipe: Recipe, start: dict[str, Any]) -> dict[str, Any]:
    result = run.result() or {}
    finished = max(event["time"] for event in run.events() if event["event"] == "finished")
    return {
        "seed": recipe.seed,
        **{key: result[key] for key in ("top1", "top5", "loss", "num_images", "steps", "seconds", "attempts")},
        "workers": start["world_size"],
        "date": datetime.fromtimestamp(finished, UTC).date().isoformat(),
    }


def _summary(shares: Sequence[float]) -> dict[str, float]:
    """Mean, and of several their sample standard deviation."""
    mean = {"mean": round(statistics.fmean(shares), 6)}
    return mean if len(shares) == 1 else {**mean, "std": round(statistics.stdev(shares), 6)}


def _comparable(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude=_APART)


def _sha256(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _apart(line: str) -> bool:
    return line.partition(":")[0] in _APART


def _overrides(base: Mapping[str, Any], changed: Mapping[str, Any], prefix: str) -> list[str]:
    """Key by key, but a section whole where its kind changes, as recipes merge."""
    found: list[str] = []
    for key, new in changed.items():
        old = base.get(key)
        if new == old:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping) and old.get("kind") == new.get("kind"):
            found += _overrides(old, new, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}={_typed(new)}")
    return found


def _typed(value: Any) -> str:
    """A value as one types it in an override."""
    plain = isinstance(value, str) and yaml.safe_load(value) == value
    return value if plain else json.dumps(value)
