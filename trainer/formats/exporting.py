"""A checkpoint of ours in the form of another program."""

from pathlib import Path

from configs import LonghaulError
from data_pipeline.split import read_manifest
from data_pipeline.storage import Location
from trainer.checkpoints.manifest import Saved
from trainer.formats import deepspeed, torchvision
from trainer.formats.training import read_checkpoint
from trainer.history import History
from trainer.models import build_model
from trainer.rundir import RunDirectory
from trainer.schedules import learning_rate


def export_checkpoint(
    run: RunDirectory, saved: Saved, data: Location, to: str, out: Path, stage: int, ranks: int, force: bool
) -> list[str]:
    """Write a checkpoint of `run` for `to` (torchvision or deepspeed) at `out`, and return what a person should know,
    in sentences. Raises LonghaulError where that cannot be."""
    if out.exists() and (not force or (out.is_dir() and not deepspeed.is_checkpoint(out))):
        raise LonghaulError(f"{out} exists: give another place, or --force to write over a checkpoint of that form.")
    recipe = run.recipe()
    network = build_model(recipe.model, int(saved.manifest["num_classes"]), recipe.seed)
    state = read_checkpoint(saved, network)
    num_samples = read_manifest(data)[0].num_samples("train")
    rate = learning_rate(recipe, num_samples, saved.step, History.from_dict(saved.manifest["history"]))
    if to == "torchvision":
        return torchvision.write(state, recipe, network, num_samples, rate, out)
    return deepspeed.write(state, recipe, network, rate, out, stage, ranks)
