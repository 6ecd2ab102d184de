"""The training loop. For each step: load, forward and backward, update, account."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from configs import Duration, Recipe
from data_pipeline.loader import Batch, training_batches
from data_pipeline.mixing import draw_mix, mix
from data_pipeline.order import Order
from data_pipeline.philox import philox
from data_pipeline.records import substitutes
from data_pipeline.split import Split
from trainer.batchnorm import exact_statistics, replaced_statistics
from trainer.checkpoints.policy import SavePolicy
from trainer.checkpoints.saver import Checkpointer
from trainer.checkpoints.store import Store
from trainer.dealing import Work, deal
from trainer.engines import Engine
from trainer.evaluate import Score, evaluate
from trainer.fetching import FetchMeter
from trainer.gradients import Health
from trainer.group import Group
from trainer.history import History
from trainer.ledger import Ledger, Recorder
from trainer.predict import Predictor
from trainer.progress import Window, is_due
from trainer.schedules import learning_rate, total_steps
from trainer.stopping import Agreement, StopRequests
from trainer.telemetry import Telemetry
from trainer.weights import uses_ema

_FORWARD_PURPOSE = 0xFFFF_FFFE  # apart from the order's and the augmentation's


@dataclass
class Loop:
    """Everything a run's loop works with; `step` is the number of updates done."""

    recipe: Recipe
    group: Group
    engine: Engine
    train_split: Split
    val_split: Split | None
    order: Order
    recorder: Recorder
    checkpointer: Checkpointer
    policy: SavePolicy
    telemetry: Telemetry
    requests: StopRequests
    threads: int
    history: History
    step: int
    imported: dict[str, Any] | None = None  # where the steps before it are from, which this ledger has not seen

    def __post_init__(self) -> None:
        self.window = Window(self.group, self.recipe.batch.num_micro, self.recipe.batch.size)
        self.fetches = FetchMeter(self.train_split, self.group)
        self._last_rate = 0.0
        self._correct: torch.Tensor | float = 0.0
        self.num_classes = self.recipe.model.num_classes or len(self.train_split.manifest.classes)

    def run(self) -> Score | None:
        """Train from `step` to the end, or until a stop is asked for, or updates fail (see `failing_since`).

        Returns the final score (None: not reached, or nothing held out)."""
        total = total_steps(self.recipe, len(self.train_split))
        micros = deal(self.recipe.batch.num_micro, self.group.world_size, self.group.rank)
        batches = training_batches(
            self.train_split, self.recipe.input, self.order,
            Work(self.step, total, micros), self.group.device, self.threads,
        )  # fmt: skip
        agreement = Agreement(self.group, num_flags=3)
        score = None
        while self.step < total:
            agreement.ask(*self._wishes())
            for micro in micros:
                batch = self._mix(self._load(batches), micro)
                self._forward_backward(batch, micro)
                self._record(micro, batch)
            self._update()
            self._look_back()
            stop, *wanted = agreement.answer()
            due = self.policy.end_step(self.step, *wanted)
            finished = self.step == total
            told = self._due(self.recipe.log.every) or stop or finished
            evaluated = self._due(self.recipe.evaluate.every) or finished
            saved = due.save or stop or finished
            copied = due.copy and self.checkpointer.memory is not None
            if told or evaluated or saved or copied:
                health = self.engine.health()
                if told:
                    self._account(total, health)
                if health.failing_since is not None:
                    return None  # before it is saved: what is saved can be gone on with
            if evaluated:
                score = self._evaluate()
            if saved or self.policy.is_best(self.history.scores, self.step):
                self._save()
            elif copied:
                self._save(self.checkpointer.memory)
            if stop and not finished:
                self.checkpointer.wait()  # "stopped" promises that the checkpoint is there
                self.telemetry.event("stopped", step=self.step)
                return None
        return score

    def finished(self) -> bool:
        return self.step >= total_steps(self.recipe, len(self.train_split))

    def failing_since(self) -> int | None:
        """The step (from 0) since which every update was skipped, where these are too many; waits for the device."""
        return self.engine.health().failing_since

    def evaluate_only(self) -> Score | None:
        """The score of the state as it is."""
        return self._evaluate()

    def _wishes(self) -> tuple[bool, bool, bool]:
        """Whether this worker wants to stop, to save and to copy after the step that begins."""
        saving, copying = self.checkpointer.busy(), self.checkpointer.busy(in_memory=True)
        return self.requests.here(), *self.policy.begin_step(self.step, saving, copying)

    def _load(self, batches: Iterator[Batch]) -> Batch:
        began = time.monotonic()
        batch = next(batches)
        self.window.data_wait_seconds += time.monotonic() - began
        return batch

    def _mix(self, batch: Batch, micro: int) -> Batch:
        height, width = batch.images.shape[2:]
        how = draw_mix(self.recipe.mixing, self.recipe.seed, self.step, micro, height, width)
        if how is None:
            return batch
        images, targets = mix(batch.images, batch.labels, self.num_classes, how)
        return replace(batch, images=images, labels=targets)

    def _forward_backward(self, batch: Batch, micro: int) -> None:
        seed = forward_seed(self.recipe.seed, self.step, micro)
        sums = self.engine.forward_backward(batch.images, batch.labels, seed, micro)
        self.window.add(sums)
        if self.recipe.schedule.hold is not None:
            self._correct += sums[1]

    def _record(self, micro: int, batch: Batch) -> None:
        self.recorder.record(self.step, micro, batch.records)
        self.window.num_substitutes += len(substitutes(batch.records))

    def _update(self) -> None:
        self._last_rate = learning_rate(self.recipe, len(self.train_split), self.step, self.history)
        self.engine.update(self.step, self._last_rate)
        self.step += 1
        self.window.steps += 1

    def _look_back(self) -> None:
        """While the schedule holds its rate until training gets somewhere, count where it has got to."""
        correct, self._correct = self._correct, 0.0
        hold = self.recipe.schedule.hold
        if hold is not None and self.history.holding(self.recipe):
            count = torch.as_tensor(correct, device=self.group.device).double()
            dist.all_reduce(count, group=self.group.gradients)
            self.history.trained(hold, self.recipe.batch.size, len(self.train_split), self.step, int(count))

    def _account(self, total: int, health: Health) -> None:
        fetched = self.fetches.report(self.window.steps)
        figures: dict[str, Any] = {
            **self.window.report(),
            "gradient_norm": health.gradient_norm,
            "num_skipped": health.num_skipped,
            **({"loss_scale": health.loss_scale} if self.recipe.precision == "fp16" else {}),
            **fetched,
        }
        self.telemetry.step(self.step, total, round(self.order.epoch_of(self.step), 4), lr=self._last_rate, **figures)
        if (interval := self.policy.news()) is not None:
            self.telemetry.event("checkpoint_interval", step=self.step, **interval)

    def _evaluate(self) -> Score | None:
        if self.val_split is None:
            return None
        began = time.monotonic()
        score = self._score(self.val_split)
        self.history.evaluated(self.step, score.num_top1, score.num_images)
        seconds = time.monotonic() - began
        self.window.paused_seconds += seconds
        self.telemetry.evaluation(self.step, round(self.order.epoch_of(self.step), 4), seconds, score.as_dict())
        return score

    def _score(self, split: Split) -> Score:
        recipe, device = self.recipe, self.group.device
        self.engine.synchronise_buffers()
        with self.engine.evaluating(uses_ema(recipe, recipe.evaluate.weights)) as network, ExitStack() as restored:
            if recipe.evaluate.exact_batch_norm:
                exact = exact_statistics(
                    network, recipe, self.train_split, self.group, self.threads, recipe.evaluate.exact_batch_norm
                )
                restored.enter_context(replaced_statistics(network, exact))
            return evaluate(Predictor(network, recipe, device), split, recipe, self.group, self.threads)

    def _save(self, memory: Store | None = None) -> None:
        """Start to save what decides the future: where the run keeps its checkpoints, or in `memory`."""
        if self.checkpointer.last_step == self.step:
            return
        began = time.monotonic()
        self.engine.synchronise_buffers()
        ledger = self.recorder.merge(self.order, self.step, self.group)
        state = training_state(self.engine, self.step, ledger)
        extra = {
            "epoch": self.order.epoch_of(self.step),
            "history": self.history.as_dict(),
            "num_classes": self.num_classes,
            "num_substitutes": len(ledger.substitutes),
            **self._score_of_this_step(),
            **({} if self.imported is None else {"imported": self.imported}),
        }
        self.checkpointer.save(self.step, state, extra, memory)
        stall = time.monotonic() - began
        self.window.paused_seconds += stall
        self.policy.saved(stall, in_memory=memory is not None)
        started = "checkpoint_started" if memory is None else "memory_save_started"
        self.telemetry.event(started, step=self.step, stall_seconds=round(stall, 4))

    def _score_of_this_step(self) -> dict[str, Any]:
        scores = self.history.scores
        if not scores or scores[-1][0] != self.step:
            return {}
        return {"score": {"num_top1": scores[-1][1], "num_images": scores[-1][2]}}

    def _due(self, every: Duration) -> bool:
        return is_due(every, self.step, self.recipe.batch.size, len(self.train_split))


def training_state(engine: Engine, step: int, ledger: Ledger) -> dict[str, Any]:
    """Everything that decides the future of a run, as tensors by name. No generator's state is among it: every random
    number is a function of the seed and of where it is used."""
    return {**engine.export_state(), **ledger.state(), "progress.step": torch.tensor(step, dtype=torch.int64)}


def forward_seed(seed: int, step: int, micro: int) -> int:
    """The seed of whatever is random inside the network (dropout, say) for one micro-batch, below 2**63."""
    high, low, _, _ = philox(seed, (step & 0xFFFFFFFF, step >> 32, micro, _FORWARD_PURPOSE))
    return int((high >> np.uint64(1)) << np.uint64(32) | low)
