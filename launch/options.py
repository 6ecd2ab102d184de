"""Options that several commands have, as what they stand for."""

from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from configs import LonghaulError
from data_pipeline.cache import parse_bytes
from data_pipeline.storage import Location, parse_location
from launch.commands import find_run
from trainer.rundir import RunDirectory

if TYPE_CHECKING:
    from trainer.trained import Images
    from trainer.weights import Weights


def choose_images(data: str | None, cache_dir: Path | None, cache_bytes: str | None) -> "Images":
    """--data, --cache-dir and --cache-bytes."""
    from trainer.trained import Images

    limit = None if cache_bytes is None else parse_bytes(cache_bytes)
    return Images(None if data is None else parse_location(data), cache_dir and cache_dir.absolute(), limit)


def find_target(target: str, runs: Path) -> tuple[RunDirectory, str | None]:
    """A run by name or directory, or the run of a checkpoint's directory or URL with that checkpoint's name."""
    checkpoint = parse_location(target)
    if isinstance(checkpoint, str):
        base, _, name = checkpoint.rpartition("/")
        return _run_with(base, runs), name
    own = RunDirectory(checkpoint.parent.parent)
    if checkpoint.is_dir() and checkpoint.parent.name == "checkpoints" and own.recipe_file.is_file():
        return own, checkpoint.name  # with or without a manifest: that it has none is for its reader to say
    if (checkpoint / "manifest.json").is_file():
        return _run_with(checkpoint.parent, runs), checkpoint.name
    return find_run(target, runs), None


def _run_with(location: Location, runs: Path) -> RunDirectory:
    """The run that keeps its checkpoints there."""
    for file in sorted(runs.absolute().glob("*/checkpoints.url")):
        run = RunDirectory(file.parent)
        if run.checkpoint_location() == location:
            return run
    raise LonghaulError(f"No run in {runs} keeps its checkpoints in {location}: give --runs, or a run's name.")


def choose_weights(weights: str) -> "Weights":
    """Raises LonghaulError for anything but auto, plain and ema."""
    from trainer.weights import Weights

    if weights not in get_args(Weights):
        raise LonghaulError(f"--weights {weights}: it is auto, plain or ema.")
    return cast("Weights", weights)


def choose_groups(groups: str | None) -> list[str]:
    """--only and --ignore: names of groups of tensors, with commas between them."""
    return [] if groups is None else [group.strip() for group in groups.split(",")]
