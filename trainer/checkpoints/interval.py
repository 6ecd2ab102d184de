"""`checkpoint.every: auto`: how long to go on without saving, from what a save costs and how often workers fail.

Saving more often costs more, saving less often loses more at a failure. Young 1974 ("A first order approximation to the
optimum checkpoint interval", CACM 17(9)) found the interval at which the sum is least, sqrt(2 x cost x MTBF); Daly 2006
("A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3)) one that holds also where
saving takes a good part of the time between failures.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from configs.schema import Auto
from trainer.timeline import Attempt, Event, attempts

# How many failures the prior counts for. Between a computing centre's machines and spot instances there are orders of
# magnitude, so it is given up for the run's own failures as soon as there are any: 0.01 failures in 500 worker-hours.
_PRIOR_FAILURES = 0.01
_MAX_OVERHEAD = 0.01  # of an interval that only the upper bound makes so short
_STEPS_FIRST = 10  # measured without a save before the first one is begun
_STEPS_REMEMBERED, _SAVES_REMEMBERED = 64, 8
_WORTH_TELLING = 0.2  # the change, as a share, from which on the interval is told again
_ENDED_BY_HAND = ("LonghaulError:", "KeyboardInterrupt:")


@dataclass(frozen=True)
class Failures:
    """What a run has lived through: failures, and the seconds of all its workers added up."""

    count: int = 0
    worker_seconds: float = 0.0


def failures_in(events: Iterable[Event]) -> Failures:
    """Failures of the attempts in a run's events, the last of which is the one under way.

    An attempt that was asked to stop has lost nothing, and one that ended for what the user had to mend, or by a second
    Ctrl-C, says nothing about machines: their time counts, they do not.
    """
    past = attempts(events)[:-1]
    return Failures(
        sum(attempt.was_cut and not _by_hand(attempt) for attempt in past),
        sum(attempt.seconds * int(attempt.start.get("world_size", 1)) for attempt in past),
    )


def _by_hand(attempt: Attempt) -> bool:
    return any(
        event["event"] == "error"
        or (event["event"] == "failure" and str(event.get("error", "")).startswith(_ENDED_BY_HAND))
        for event in attempt.events
    )


def mean_time_between_failures(failures: Failures, worker_mtbf: float, num_workers: int) -> float:
    """Seconds between two failures of any of `num_workers`, each of which ends the attempt of all.

    Failures are taken as a Poisson process with a rate a worker-second whose prior is a Gamma distribution with the
    mean 1 / `worker_mtbf`, and with it the posterior one: this is one over the posterior's mean.
    """
    seconds = _PRIOR_FAILURES * worker_mtbf + failures.worker_seconds
    return seconds / (_PRIOR_FAILURES + failures.count) / num_workers


def young(cost: float, mtbf: float) -> float:
    """Young's interval (1974): the first-order optimum, in the unit of both arguments."""
    return math.sqrt(2 * cost * mtbf)


def daly(cost: float, mtbf: float) -> float:
    """Daly's interval (2006, equation 37): the time from the end of one save to the beginning of the next for which a
    run is expected to end first, in the unit of both arguments. `cost` is the time that a save takes from training."""
    if cost >= 2 * mtbf:
        return mtbf
    ratio = cost / (2 * mtbf)
    return young(cost, mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def expected_time(interval: float, cost: float, mtbf: float) -> float:
    """The time that a run with failures is expected to take for each second of training: Daly's complete cost
    function, but for a factor that stands for restarts and that no interval changes."""
    return mtbf * math.expm1((interval + cost) / mtbf) / interval


def choose(cost: float, mtbf: float, bounds: Auto) -> float:
    """Daly's interval within the recipe's bounds, in seconds."""
    longest = max(bounds.longest.seconds, cost / _MAX_OVERHEAD)
    return min(max(daly(cost, mtbf), bounds.shortest.seconds), longest)


class SaveCost:
    """What a save takes from training, measured: the time that steps stand still for it, and by how much those are
    slower behind which it is written."""

    def __init__(self) -> None:
        self._free: deque[float] = deque(maxlen=_STEPS_REMEMBERED)
        self._saves: deque[tuple[float, float]] = deque(maxlen=_SAVES_REMEMBERED)  # stood still, slowed down by
        self._stall: float | None = None  # of the save under way, and the steps in front of it
        self._steps: list[float] = []

    def save_began(self, stall: float) -> None:
        """A save was begun, for which training stood still for `stall` seconds."""
        self._save_ended()
        self._stall = stall

    def step(self, seconds: float, saving: bool) -> None:
        """A step took so long; `saving`: a save was under way as it began."""
        if saving:
            self._steps.append(seconds)
        else:
            self._save_ended()
            self._free.append(seconds)

    @property
    def num_free_steps(self) -> int:
        """Steps remembered behind which nothing was saved."""
        return len(self._free)

    @property
    def step_seconds(self) -> float:
        """How long a step takes behind which nothing is saved; 0 where there was none."""
        return statistics.median(self._free) if self._free else 0.0

    @property
    def seconds(self) -> float | None:
        """The cost of a save; None until one is over. Medians: one save, or one step, may have met with anything."""
        if not self._saves:
            return None
        saves = list(self._saves)[1:] or self._saves  # the first one also made room for the copies
        stalls, slowed = zip(*saves, strict=True)
        return statistics.median(stalls) + max(0.0, statistics.median(slowed))

    def _save_ended(self) -> None:
        if self._stall is not None:
            slowed = sum(self._steps) - len(self._steps) * self.step_seconds if self._free else 0.0
            self._saves.append((self._stall, slowed))
        self._stall, self._steps = None, []


class Pace:
    """The interval of `every: auto`, as it is at this moment. Rank 0's, whose clock decides."""

    def __init__(
        self, bounds: Auto, failures: Failures, num_workers: int, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._bounds, self._failures, self._num_workers, self._now = bounds, failures, num_workers, now
        self._began = now()
        self._told: float | None = None
        self.cost = SaveCost()

    def mtbf(self) -> float:
        """Seconds between two failures of any worker, to the best of what is known by now."""
        here = (self._now() - self._began) * self._num_workers
        lived = Failures(self._failures.count, self._failures.worker_seconds + here)
        return mean_time_between_failures(lived, self._bounds.worker_mtbf.seconds, self._num_workers)

    def interval(self) -> float | None:
        """Seconds between two saves; None until a save's cost is known."""
        cost = self.cost.seconds
        return None if cost is None else choose(cost, self.mtbf(), self._bounds)

    def is_due(self, elapsed: float) -> bool:
        """Whether to save, `elapsed` seconds after the last save. The first one comes early, to measure what it costs,
        but not before it is known how long steps take without it."""
        interval = self.interval()
        if interval is None:
            return elapsed >= self._bounds.shortest.seconds and self.cost.num_free_steps >= _STEPS_FIRST
        return elapsed >= interval

    def news(self) -> dict[str, Any] | None:
        """The interval and what it rests on, where that was not yet told or has changed."""
        interval, cost = self.interval(), self.cost.seconds
        if interval is None or cost is None:
            return None
        if self._told is not None and abs(interval / self._told - 1) <= _WORTH_TELLING:
            return None
        self._told = interval
        steps = interval / self.cost.step_seconds if self.cost.step_seconds else 0.0
        return {
            "seconds": round(interval, 3),
            "steps": round(steps),
            "cost_seconds": round(cost, 4),
            "mtbf_seconds": round(self.mtbf()),
            "num_failures": self._failures.count,
        }
