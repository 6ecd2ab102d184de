"""When a run's state is saved. The policy decides; the loop acts."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from configs import Duration, Recipe, WallTime
from trainer.checkpoints.interval import Pace, failures_in
from trainer.group import Group
from trainer.progress import is_due
from trainer.timeline import Event


@dataclass(frozen=True)
class Due:
    """What to do with the state after a step: save it, or else copy it into the memory of other machines."""

    save: bool
    copy: bool


class SavePolicy:
    """The decisions of `checkpoint.every`, `.keep_every`, `.keep_best` and `.memory`.

    What is due by the step is a function of the step, which every rank knows. What hangs on a clock, or on how far a
    save has got, is for rank 0 to say: as a step begins it is asked, while the step computes all learn of it
    (`Agreement`), after the step all act on it.
    """

    def __init__(
        self,
        recipe: Recipe,
        num_samples: int,
        pace: Pace | None,
        leads: bool,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`num_samples`: of the training split; `pace`: of `every: auto`, where this is rank 0 (`leads`)."""
        self._config, self._batch_size, self._num_samples = recipe.checkpoint, recipe.batch.size, num_samples
        self._pace, self._leads, self._now = pace, leads, now
        self._saved_at = self._copied_at = self._step_began = now()
        self._saving = self._copy_is_due = False

    def begin_step(self, step: int, saving: bool, copying: bool) -> tuple[bool, bool]:
        """Whether rank 0 wants the state saved, and copied, after the update that follows `step` others.

        `saving`, `copying`: whether a save and a copy are under way. By the clock no save is begun behind another. A
        copy waits for both, whatever it goes by: it is there to save time.
        """
        self._saving, self._step_began = saving, self._now()
        if not self._leads:
            return False, False
        memory, since = self._config.memory, self._step_began - self._copied_at
        by_clock = isinstance(memory, WallTime) and since >= memory.seconds
        self._copy_is_due = self._copy_is_due or by_clock or self._reaches(memory, step + 1)
        save = not saving and self._save_by_clock(self._step_began - self._saved_at)
        return save, self._copy_is_due and not (saving or copying)

    def end_step(self, step: int, save: bool, copy: bool) -> Due:
        """What is due after `step` updates, with what all have learnt of rank 0's wishes."""
        if self._pace is not None:
            self._pace.cost.step(self._now() - self._step_began, self._saving)
        save = save or any(self._reaches(every, step) for every in (self._config.every, self._config.keep_every))
        return Due(save, copy and not save)

    def is_best(self, scores: Sequence[tuple[int, int, int]], step: int) -> bool:
        """Whether the state after `step` updates was scored, and is among the `keep_best` best of all that were;
        `scores` are those of `History`."""
        if not scores or scores[-1][0] != step:
            return False
        *earlier, (_, correct, images) = scores
        return sum(top1 / of > correct / images for _, top1, of in earlier) < self._config.keep_best

    def saved(self, stall: float, in_memory: bool) -> None:
        """A save, or a copy into other machines' memory, was begun; training stood still for `stall` seconds."""
        if in_memory:
            self._copied_at, self._copy_is_due = self._now(), False
            return
        self._saved_at = self._now()
        if self._pace is not None:
            self._pace.cost.save_began(stall)

    def news(self) -> dict[str, Any] | None:
        """What to say of the interval that `every: auto` has come to, where that has not been said; see `Pace.news`."""
        return None if self._pace is None else self._pace.news()

    def _save_by_clock(self, elapsed: float) -> bool:
        if self._pace is not None:
            return self._pace.is_due(elapsed)
        return isinstance(self._config.every, WallTime) and elapsed >= self._config.every.seconds

    def _reaches(self, every: object, step: int) -> bool:
        return isinstance(every, Duration) and is_due(every, step, self._batch_size, self._num_samples)


def build_policy(recipe: Recipe, num_samples: int, group: Group, events: Iterable[Event]) -> SavePolicy:
    """The policy of a recipe, for an attempt whose start is the last in the run's `events` (of use on rank 0 alone)."""
    leads, pace = group.rank == 0, None
    if leads and recipe.checkpoint.every == "auto":
        pace = Pace(recipe.checkpoint.auto, failures_in(events), group.world_size)
    return SavePolicy(recipe, num_samples, pace, leads)
