"""A run that goes on from another program's training checkpoint."""

from typing import Any

import torch

from configs import LonghaulError, Recipe
from configs.schema import Engine as EngineSection
from data_pipeline.order import Order, build_order
from data_pipeline.split import read_manifest
from data_pipeline.storage import Location
from trainer.atomic import replacing
from trainer.checkpoints.files import write
from trainer.checkpoints.manifest import FORMAT, Saved, checkpoint_name, open_checkpoint, render
from trainer.engines import Engine, build_engine
from trainer.formats.foreign import Source
from trainer.formats.torchvision import epoch_end
from trainer.formats.training import MOMENTUM, TrainingState, require_sgd
from trainer.group import Group, Rendezvous, free_port, join
from trainer.history import History
from trainer.ledger import Ledger
from trainer.loop import training_state
from trainer.models import build_model
from trainer.rundir import Events, RunDirectory


def import_run(
    source: Source, run: RunDirectory, recipe: Recipe, data: Location, trust: bool
) -> tuple[Saved, list[str]]:
    """Make the directory of a run whose only checkpoint is what `source` holds, and return that checkpoint with what a
    person should know, in sentences. `longhaul train` of the same recipe, data and name goes on from there.

    The step is that of the source, or the end of its last epoch. Steps before it are not in the ledger, which the
    checkpoint's manifest says (`imported`), and with it those of all that follow.

    Raises LonghaulError where the source does not fit the recipe, or the run is there already.
    """
    if run.path.exists() and any(run.path.iterdir()):
        raise LonghaulError(f"{run.path} exists and is not empty: give another directory for the run.")
    require_sgd(recipe, source.program)
    _require_known_rate(recipe)
    manifest, _ = read_manifest(data)
    num_classes = recipe.model.num_classes or len(manifest.classes)
    state = source.read(build_model(recipe.model, num_classes, recipe.seed), trust)
    order = build_order(recipe, [shard.rows for shard in manifest.splits["train"]])
    step = epoch_end(state.epochs or 0, recipe, order.num_samples) if state.steps is None else state.steps
    imported = {"from": source.program, "file": str(source.path), "step": step}
    with replacing(run.path) as temporary:
        temporary.mkdir()
        draft = RunDirectory(temporary)
        draft.write_recipe(recipe)
        _save(draft, recipe, state, order, num_classes, step, imported)
        events = Events(draft)
        events.write("imported", **imported, data=str(data))
        events.close()
    return open_checkpoint(run.store(), checkpoint_name(step)), _notes(recipe, state)


def _save(
    run: RunDirectory, recipe: Recipe, state: TrainingState, order: Order, num_classes: int, step: int,
    imported: dict[str, Any],
) -> None:  # fmt: skip
    store, name = run.store(), checkpoint_name(step)
    extra = {
        "epoch": order.epoch_of(step),
        "history": History().as_dict(),
        "num_classes": num_classes,
        "num_substitutes": 0,
        "imported": imported,
    }
    alone = Rendezvous(0, 1, 0, "127.0.0.1", free_port())
    with join(alone, torch.device("cpu"), timeout_seconds=600) as group:
        engine = _engine(recipe, state, order.num_samples, num_classes, group)
        store.begin(name)
        files = write(training_state(engine, step, Ledger.empty(order, step)), store, name, group.saving)
        store.commit(name, name, render({"format": FORMAT, "step": step, "world_size": 1, "files": files, **extra}))


def _engine(recipe: Recipe, state: TrainingState, num_samples: int, num_classes: int, group: Group) -> Engine:
    """An engine in that state: which one makes no difference to what it exports."""
    plain = {
        "engine": EngineSection(),
        "compile": "eager",
        "optimizer": recipe.optimizer.model_copy(update={"implementation": "torch"}),
    }
    engine = build_engine(recipe.model_copy(update=plain), num_samples, num_classes, group)
    into = engine.export_state()
    into |= {f"model.{name}": tensor for name, tensor in state.weights.items()}
    into |= {f"optim.state.{name}{MOMENTUM}": tensor for name, tensor in state.momentum.items()}
    if recipe.ema is not None:
        into |= {f"ema.{name}": tensor for name, tensor in (state.averaged or state.weights).items()}
    engine.import_state(into)
    return engine


def _require_known_rate(recipe: Recipe) -> None:
    if recipe.schedule.kind == "plateau" or recipe.schedule.hold is not None:
        key = "schedule.hold" if recipe.schedule.hold is not None else "schedule.kind=plateau"
        raise LonghaulError(
            f"{key} makes the learning rate depend on results from before, which other programs' checkpoints do not "
            "have: use a schedule that is a function of the step."
        )


def _notes(recipe: Recipe, state: TrainingState) -> list[str]:
    notes = list(state.notes)
    if recipe.ema is not None and state.averaged is None:
        notes.append("It has no moving average: ours begins as a copy of the weights.")
    if recipe.ema is None and state.averaged is not None:
        notes.append("Its moving average is left out: the recipe keeps none (ema).")
    if not state.momentum:
        notes.append("It has no momentum: ours begins at zero.")
    return notes
