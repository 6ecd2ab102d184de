"""`longhaul eval`: the score of a checkpoint, in one process or under torchrun."""

import os
from contextlib import closing
from pathlib import Path

import torch

from data_pipeline.cache import Cache
from data_pipeline.split import Split
from data_pipeline.storage import Location, parse_location
from data_pipeline.views import choose_views
from trainer.checkpoint import Saved, like, load
from trainer.engines import build_engine
from trainer.evaluate import Score, evaluate
from trainer.group import Rendezvous, join, pick_device
from trainer.run import cores_each
from trainer.rundir import RunDirectory
from trainer.weights import choose_checkpoint


def score_checkpoint(
    run: RunDirectory,
    checkpoint: Path | None,
    data: Location | None,
    device: str,
    threads: int,
    views: str = "central",
    cache_directory: Path | None = None,
    cache_bytes: int | None = None,
) -> tuple[Score, Saved]:
    """Score `checkpoint` (None: the run's newest valid one) on the held-out split of `data` (None: the run's), seen in
    `views` (a name in `data_pipeline.views.VIEWS`).

    Raises LonghaulError where there is no such checkpoint, no such views, or nothing is held out.
    """
    recipe = run.recipe()
    chosen = choose_views(views, recipe.input, recipe.evaluate)
    saved = choose_checkpoint(run, checkpoint)
    if data is None:
        data = parse_location(next(event["data"] for event in run.events() if event["event"] == "start"))
    split = Split(data, "val", None if isinstance(data, Path) else Cache(cache_directory, cache_bytes))
    place = Rendezvous.from_environment()
    threads = threads or cores_each(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(threads)
    with closing(split), join(place, pick_device(device, place.local_rank), timeout_seconds=600) as group:
        engine = build_engine(recipe, recipe.model.num_classes or len(split.manifest.classes), group)
        state = like(engine.export_state())
        load(saved, state, group)
        engine.import_state(state)
        return evaluate(engine, split, recipe, group, threads, chosen), saved
