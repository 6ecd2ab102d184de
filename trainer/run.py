"""One worker's life: join, check, resume, train, finish. The same under Ray, under torchrun and alone."""

import gc
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from configs import LonghaulError, Recipe
from data_pipeline.cache import Cache
from data_pipeline.order import Order, build_order
from data_pipeline.resolution import size_at
from data_pipeline.split import Split
from data_pipeline.storage import Location
from trainer.checkpoints.files import load
from trainer.checkpoints.manifest import Saved
from trainer.checkpoints.policy import build_policy
from trainer.checkpoints.retention import Retention
from trainer.checkpoints.saver import Checkpointer
from trainer.checkpoints.state import empty_like
from trainer.count import count
from trainer.engines import Engine, build_engine
from trainer.evaluate import Score
from trainer.fetching import fetch_ahead, require_room, warn_of_sorted_shards
from trainer.group import Group, Rendezvous, join, pick_device, together
from trainer.history import History
from trainer.job import Job
from trainer.ledger import Ledger, Recorder
from trainer.loop import Loop
from trainer.memory import keep_freed_memory
from trainer.provenance import commit
from trainer.resume import checkpoint_to_resume, roll_back
from trainer.rundir import RunDirectory, settle_location, settle_recipe, write_atomically
from trainer.schedules import require_scores, total_steps
from trainer.stopping import StopRequests
from trainer.telemetry import Telemetry

_NO_MEMORY = (
    "checkpoint.memory is passed over: without Ray nothing outlives the workers that could keep a checkpoint in memory."
)


@dataclass(frozen=True)
class Outcome:
    """How a worker's life ended: "finished", "stopped" (asked to, after saving), and at which step."""

    status: str
    step: int


def work(job: Job, place: Rendezvous, local_world_size: int) -> Outcome:
    """Train the job as one of `place.world_size` workers. Raises LonghaulError, on every rank alike, for what the
    user can mend."""
    device = pick_device(job.device, place.local_rank)
    if device.type == "cpu":
        keep_freed_memory()
    with join(place, device, job.timeout_seconds) as group, StopRequests(job.run.stop_file) as requests:
        together(group, lambda: _require_shared(job.run))
        together(group, lambda: settle_location(job.run, job.checkpoints, record=group.rank == 0))
        recipe = _settle(job, group)
        _choose_algorithms(recipe.deterministic)
        # The number of threads decides the order of sums, so a deterministic run does not take it from the machine.
        threads = job.threads or (1 if recipe.deterministic else cores_each(local_world_size))
        torch.set_num_threads(threads)
        train_split, val_split, order = together(group, lambda: _open_data(job, recipe))
        with closing(train_split), nullcontext() if val_split is None else closing(val_split):
            engine = together(group, lambda: _build(recipe, train_split, group))
            gc.freeze()  # what was made until here is no garbage: the collector need not look through it again
            return _Worker(job, recipe, group, requests, engine, train_split, val_split, order, threads).run()


def _choose_algorithms(deterministic: bool) -> None:
    """On GPUs: the same algorithms at every start, or the fastest found by trying. Before anything is computed."""
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses


def cores_each(local_world_size: int) -> int:
    """CPU threads for each of the workers of this machine, so that together they do not exceed its cores."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size)


class _Worker:
    def __init__(
        self,
        job: Job,
        recipe: Recipe,
        group: Group,
        requests: StopRequests,
        engine: Engine,
        train_split: Split,
        val_split: Split | None,
        order: Order,
        threads: int,
    ) -> None:
        self.job, self.recipe, self.group, self.engine = job, recipe, group, engine
        self.requests, self.threads = requests, threads
        self.train_split, self.val_split, self.order = train_split, val_split, order
        self.memory = job.memory()
        self.stores = [job.run.store()] if self.memory is None else [job.run.store(), self.memory]

    def run(self) -> Outcome:
        broken: list[tuple[str, str]] = []
        result: Outcome | Saved | None = checkpoint_to_resume(self.stores, self.group, broken)
        while not isinstance(result, Outcome):
            result = self._attempt(result, broken)
            broken = []
        return result

    def _attempt(self, saved: Saved | None, broken: list[tuple[str, str]]) -> Outcome | Saved:
        """From a checkpoint, or the beginning, to the end of the run or of its patience; or to updates that failed, for
        which the checkpoint to go back to is returned."""
        run, group = self.job.run, self.group
        attempt = group.from_zero(_next_attempt(run) if group.rank == 0 else None)
        telemetry = Telemetry(run, attempt, 0 if saved is None else saved.step, enabled=group.rank == 0)
        try:
            self._announce(telemetry, saved, broken)
            warn_of_sorted_shards(self.train_split, self.order, telemetry)
            loop, score = self._train(telemetry, saved, attempt)
            since = loop.failing_since()
            if since is not None:
                return roll_back(self.recipe, run, self.stores, group, telemetry, since)
            if not loop.finished():
                return Outcome("stopped", loop.step)
            if group.rank == 0:
                _write_result(run, score, loop.step, attempt)
            telemetry.event("finished", step=loop.step)
            return Outcome("finished", loop.step)
        except BaseException as error:
            telemetry.event("failure", rank=group.rank, error=f"{type(error).__name__}: {error}".splitlines()[0])
            raise
        finally:
            telemetry.close()

    def _train(self, telemetry: Telemetry, saved: Saved | None, attempt: int) -> tuple[Loop, Score | None]:
        """Let the loop run until it ends by itself."""
        step = 0 if saved is None else saved.step
        last = total_steps(self.recipe, len(self.train_split))
        fetch_ahead(self.train_split, self.order, step, last, self.group, telemetry)
        retention = Retention(self.recipe, len(self.train_split))
        checkpointer = Checkpointer(
            self.stores[0], self.group, attempt,
            superfluous=lambda store: store.names()[:-1] if store is self.memory else retention(store),
            on_saved=lambda saved, seconds: telemetry.event(
                "checkpoint" if saved.store is not self.memory else "memory_save",
                path=str(saved), step=saved.step, seconds=round(seconds, 3),
            ),
            on_failed=lambda store, at, why: telemetry.event(
                "checkpoint_failed" if store is not self.memory else "memory_save_failed", step=at, reason=why
            ),
            memory=self.memory,
        )  # fmt: skip
        history = History() if saved is None else History.from_dict(saved.manifest["history"])
        policy = build_policy(self.recipe, len(self.train_split), self.group, self.job.run.events())
        imported = None if saved is None else saved.manifest.get("imported")
        loop = Loop(
            self.recipe, self.group, self.engine, self.train_split, self.val_split, self.order,
            Recorder(self._restore(saved)), checkpointer, policy, telemetry, self.requests, self.threads, history, step,
            imported,
        )  # fmt: skip
        checkpointer.last_step = step if saved is not None else -1
        score = loop.evaluate_only() if loop.finished() else loop.run()
        checkpointer.close()
        return loop, score

    def _announce(self, telemetry: Telemetry, saved: Saved | None, broken: Iterable[tuple[str, str]]) -> None:
        """Everything about this start in events.jsonl, and the recipe beside it."""
        workers = self.group.gather(
            {
                "rank": self.group.rank,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "device": str(self.group.device),
                "threads": self.threads,
            }
        )
        data_hash = self.train_split.fingerprint
        together(self.group, lambda: _check_same_data(self.job.run, data_hash, self.job.data))
        for path, why in broken:
            telemetry.event("checkpoint_broken", path=path, reason=why)
        for why in self.train_split.unreadable:
            telemetry.event("warning", message=f"{why} Until then other samples are shown in the place of its own.")
        if self.recipe.checkpoint.memory is not None and self.memory is None:
            telemetry.event("warning", message=_NO_MEMORY)
        telemetry.event(
            "start", world_size=self.group.world_size, workers=workers, data=str(self.job.data), data_sha256=data_hash,
            step=0 if saved is None else saved.step, recipe_sha256=_recipe_hash(self.recipe), torch=torch.__version__,
            commit=commit() if self.group.rank == 0 else "",
        )  # fmt: skip
        if saved is not None:
            telemetry.event("resume", step=saved.step, path=str(saved), saved_by=saved.manifest["world_size"])
        if self.group.rank == 0:
            self.job.run.write_recipe(self.recipe)
            self.job.run.stop_file.unlink(missing_ok=True)
        self.group.barrier()

    def _restore(self, saved: Saved | None) -> Ledger:
        if saved is None:
            return Ledger.empty(self.order, 0)
        ledger = Ledger.empty(self.order, saved.step, saved.manifest["num_substitutes"])
        state = empty_like(self.engine.export_state())
        try:
            load(saved, {**state, **ledger.state()}, self.group)
        except LonghaulError as error:
            if self.memory is None or saved.store is not self.memory:
                raise
            # A machine was lost while it was read: nothing for the user to mend. The next start does without it.
            if self.group.rank == 0:
                self.memory.remove(saved.name)
            raise OSError(str(error)) from None
        self.engine.import_state(state)
        return ledger


def _require_shared(run: RunDirectory) -> None:
    if not run.path.is_dir():
        raise LonghaulError(
            f"The run's directory {run.path} is not there: give --runs a directory that every machine shares."
        )


def _settle(job: Job, group: Group) -> Recipe:
    """The resolved recipe, decided by rank 0: `precision: auto` becomes what its hardware is fast at."""

    def decide() -> Recipe | None:
        if group.rank != 0:
            return None
        recipe = settle_recipe(job.run, job.recipe, job.allow_changes)
        if recipe.precision == "auto":
            recipe = recipe.model_copy(update={"precision": "bf16" if has_fast_bf16(group.device) else "fp32"})
        if recipe.batch.num_micro < group.world_size:
            raise LonghaulError(
                f"{group.world_size} workers are too many: batch.size={recipe.batch.size} in micro-batches of "
                f"{recipe.batch.micro} gives work to {recipe.batch.num_micro} at most; use --workers "
                f"{recipe.batch.num_micro}."
            )
        return recipe

    return group.from_zero(together(group, decide))


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 arithmetic is in the hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _open_data(job: Job, recipe: Recipe) -> tuple[Split, Split | None, Order]:
    """The training split, the held-out one where there is one, and the order; checks that the cache can hold them."""
    cache = None if isinstance(job.data, Path) else Cache(job.cache_directory, job.cache_bytes)
    train_split = Split(job.data, "train", cache, recipe.input.damaged)
    val_split = Split(job.data, "val", cache) if train_split.manifest.num_samples("val") else None
    order = build_order(recipe, [shard.rows for shard in train_split.shards])
    if cache is not None:
        require_room(train_split, val_split, order, cache)
    return train_split, val_split, order


def _build(recipe: Recipe, split: Split, group: Group) -> Engine:
    wanted, found_classes = recipe.model.num_classes, len(split.manifest.classes)
    require_scores(recipe, bool(split.manifest.num_samples("val")))
    if ":" in recipe.model.name:  # ours take any size; where a library's network does not, this says so in one sentence
        for size in sorted({recipe.input.size, size_at(recipe.input, recipe.batch.size, len(split), 0)}):
            count(recipe.model, wanted or found_classes, size, recipe.precision)
    if wanted is not None and wanted < found_classes:
        raise LonghaulError(
            f"model.num_classes={wanted} but the data set has {found_classes} classes; leave the key out to follow it."
        )
    return build_engine(recipe, len(split), wanted or found_classes, group)


def _next_attempt(run: RunDirectory) -> int:
    return 1 + sum(event["event"] == "start" for event in run.events())


def _check_same_data(run: RunDirectory, data_hash: str, data: Location) -> None:
    first = next((e for e in run.events() if e["event"] == "start"), None)
    if first is not None and first["data_sha256"] != data_hash:
        raise LonghaulError(
            f"The run {run.path} was started on {first['data']}, whose contents are not those of {data}: "
            f"give the same data, or another --name."
        )


def _recipe_hash(recipe: Recipe) -> str:
    return hashlib.sha256(recipe.model_dump_json(exclude={"description"}).encode()).hexdigest()


def _write_result(run: RunDirectory, score: Score | None, step: int, attempt: int) -> None:
    figures = {"top1": None, "top5": None, "num_images": 0} if score is None else score.as_dict()
    result = {**figures, "steps": step, "seconds": round(_seconds_worked(run), 3), "attempts": attempt}
    write_atomically(run.result_file, json.dumps(result, indent=1) + "\n")


def _seconds_worked(run: RunDirectory) -> float:
    """Wall time from the start of each attempt to its last event, summed; the last one goes on until now."""
    began: dict[int, float] = {}
    ended: dict[int, float] = {}
    for event in run.events():
        attempt = event.get("attempt", 0)  # the driver's events have none
        if event["event"] == "start":
            began[attempt] = event["time"]
        if attempt in began:
            ended[attempt] = event["time"]
    ended[max(ended)] = time.time()
    return sum(ended[attempt] - began[attempt] for attempt in ended)
