"""What the events of a run say about it: its attempts, what became part of it, where its wall time went.

Pure functions of the list of events, in the order in which they were written; an event that is missing costs accuracy,
never an error.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Event = dict[str, Any]

PRODUCTIVE = "productive training"
DATA_WAIT = "data wait"
EVALUATION = "evaluation"
CHECKPOINT = "checkpoint stall"
LOST = "lost work"
OTHER = "start-up, restarts and idle"
CATEGORIES = (PRODUCTIVE, DATA_WAIT, EVALUATION, CHECKPOINT, LOST, OTHER)

FAILURES = ("failure", "worker_failure", "error")
_LIMITING_SHARE = 0.10
_STALLS = ("checkpoint_started", "memory_save_started")
_WITH_STEP = ("step", "evaluation", *_STALLS, "stopped", "finished")


@dataclass(frozen=True)
class Window:
    """The steps of one step event: those after `first`, up to and with `last`; means are in seconds a step."""

    first: int
    last: int
    step_seconds: float
    data_wait_seconds: float
    images_per_second: float = 0.0

    @property
    def steps(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class Attempt:
    """One start of the workers and what they did until they ended.

    Attributes:
        events: the start first, the rest as written.
        kept_until: the last step (counted from 1) whose work became part of the run, because no later attempt
            resumed before it; infinite for the last attempt.
    """

    events: tuple[Event, ...]
    kept_until: float = math.inf

    @property
    def start(self) -> Event:
        return self.events[0]

    @property
    def number(self) -> int:
        return int(self.start.get("attempt", 0))

    @property
    def from_step(self) -> int:
        """The number of updates done before this attempt's first."""
        return int(self.start.get("step", 0))

    @property
    def reached(self) -> int:
        """The last step known to have been done."""
        return max([self.from_step, *(int(e.get("step", 0)) for e in self.events if e["event"] in _WITH_STEP)])

    @property
    def lost_steps(self) -> int:
        """Steps that a later attempt did again, as far as they are known from events."""
        return max(0, self.reached - max(self.from_step, int(min(self.kept_until, self.reached))))

    @property
    def seconds(self) -> float:
        """From the start to the last event."""
        return max(e["time"] for e in self.events) - self.start["time"]

    @property
    def ending(self) -> str:
        """How it ended: finished, stopped, failed, cut (nothing was written about it), or running."""
        kinds = {e["event"] for e in self.events}
        for kind in ("finished", "stopped"):
            if kind in kinds:
                return kind
        if kinds.intersection(FAILURES):
            return "failed"
        return "running" if self.kept_until == math.inf else "cut"

    @property
    def was_cut(self) -> bool:
        """Whether it ended before it was finished or was asked to stop."""
        return self.ending in ("failed", "cut")

    def windows(self) -> list[Window]:
        """The steps in order, as step events tell of them, and then those that only a later event knows of."""
        found: list[Window] = []
        done = self.from_step
        for event in self.events:
            if event["event"] == "step" and int(event.get("step", 0)) > done:
                seconds = float(event.get("step_seconds", 0.0))
                wait = min(float(event.get("data_wait_seconds", 0.0)), seconds)
                rate = float(event.get("images_per_second", 0.0))
                found.append(Window(done, int(event["step"]), seconds, wait, rate))
                done = found[-1].last
        return found + self._tail(found)

    def _tail(self, found: Sequence[Window]) -> list[Window]:
        """Steps after the last step event, at its pace, or faster where there was less time between the events."""
        latest = max((i for i, e in enumerate(self.events) if e["event"] == "step"), default=len(self.events))
        after = [e for e in self.events[latest + 1 :] if e["event"] in _WITH_STEP]
        reached = max((int(e.get("step", 0)) for e in after), default=0)
        if not found or reached <= found[-1].last:
            return []
        free = after[-1]["time"] - self.events[latest]["time"] - sum(_paused(e) for e in after)
        before, steps = found[-1], reached - found[-1].last
        seconds = min(before.step_seconds, max(0.0, free) / steps)
        wait = min(before.data_wait_seconds, seconds)
        return [Window(before.last, reached, seconds, wait, before.images_per_second)]


def attempts(events: Iterable[Event]) -> list[Attempt]:
    """The attempts in order. An event without an attempt's number (a failure noted outside the workers) belongs to the
    attempt that started last; one of an attempt that never started belongs to none."""
    groups: list[list[Event]] = []
    for event in events:
        if event["event"] == "start":
            groups.append([event])
        elif (group := _owner(groups, event)) is not None:
            group.append(event)
    kept, found = math.inf, []
    for group in reversed(groups):
        found.append(Attempt(tuple(group), kept))
        kept = min(kept, int(group[0].get("step", 0)))
    return found[::-1]


def _owner(groups: Sequence[list[Event]], event: Event) -> list[Event] | None:
    number = event.get("attempt")
    same = (g for g in reversed(groups) if number is None or g[0].get("attempt", number) == number)
    return next(same, None)


def surviving(events: Iterable[Event], kind: str) -> list[Event]:
    """The events of one kind that became part of the run, by ascending step: what an attempt did past the step that
    a later one resumed from is left out."""
    kept: list[Event] = []  # by ascending step, so that what is undone is always at the end
    for event in events:
        step = int(event.get("step", 0))
        starts, wanted = event["event"] in ("start", "resume"), event["event"] == kind and "step" in event
        while kept and ((starts and kept[-1]["step"] > step) or (wanted and kept[-1]["step"] >= step)):
            kept.pop()
        if wanted:
            kept.append(event)
    return kept


def status(events: Iterable[Event]) -> str:
    """finished, stopped, failed, running, or "not started"."""
    events = list(events)
    tries = attempts(events)
    if tries:
        return tries[-1].ending
    return "failed" if any(e["event"] in FAILURES for e in events) else "not started"


def mean_rate(events: Iterable[Event]) -> float | None:
    """Images per second over all steps that were measured, without evaluation and waiting for checkpoints."""
    windows = [w for attempt in attempts(events) for w in attempt.windows() if w.images_per_second > 0]
    seconds = sum(w.steps * w.step_seconds for w in windows)
    images = sum(w.steps * w.step_seconds * w.images_per_second for w in windows)
    return images / seconds if seconds > 0 else None


def time_ledger(events: Iterable[Event]) -> dict[str, float]:
    """Where the wall time between the first start and the last event went, in seconds by category.

    The categories are `CATEGORIES`, in that order; they add up to that wall time. For every attempt, up to the step
    that a later attempt resumed from:

    - productive training: for each step event, its steps since the one before it (or since the attempt's start)
      x (`step_seconds` - `data_wait_seconds`). Steps after the last step event that an evaluation, a checkpoint or
      the end tells of count at the pace of that last step event.
    - data wait: the same steps x `data_wait_seconds`, the slowest worker's.
    - evaluation: the sum of `seconds` of evaluation events.
    - checkpoint stall: the sum of `stall_seconds` of checkpoint_started and memory_save_started events; writing goes
      on behind the steps and costs nothing here.
    - lost work: all of the above past the step that a later attempt resumed from.
    - start-up, restarts and idle: what is left of the wall time: from each start to its first step, from the last
      event of an attempt to the next start, and the steps between an attempt's last event and its death.

    Where clocks disagree so that the parts exceed the wall time, they are scaled down to it.
    """
    events = list(events)
    ledger = dict.fromkeys(CATEGORIES, 0.0)
    tries = attempts(events)
    if not tries:
        return ledger
    wall = max(0.0, max(e["time"] for e in events) - tries[0].start["time"])
    for attempt in tries:
        for category, kept, seconds in _parts(attempt):
            ledger[category] += kept * seconds
            ledger[LOST] += (1 - kept) * seconds
    known = sum(ledger.values())
    if known > wall:
        ledger = {category: seconds * wall / known for category, seconds in ledger.items()}
    ledger[OTHER] = max(0.0, wall - sum(ledger.values()))
    return ledger


def _parts(attempt: Attempt) -> Iterator[tuple[str, float, float]]:
    """Category, the share of it that became part of the run, seconds."""
    for window in attempt.windows():
        kept = min(max(attempt.kept_until - window.first, 0), window.steps) / window.steps
        yield PRODUCTIVE, kept, window.steps * (window.step_seconds - window.data_wait_seconds)
        yield DATA_WAIT, kept, window.steps * window.data_wait_seconds
    for event in attempt.events:
        if event["event"] in ("evaluation", *_STALLS):
            category = EVALUATION if event["event"] == "evaluation" else CHECKPOINT
            yield category, float(event.get("step", 0) <= attempt.kept_until), _paused(event)


def _paused(event: Event) -> float:
    """Seconds of an event during which no step was computed."""
    key = {"evaluation": "seconds", **dict.fromkeys(_STALLS, "stall_seconds")}.get(event["event"], "")
    return float(event.get(key, 0.0))


def shares(ledger: Mapping[str, float]) -> dict[str, float]:
    """Per cent of the sum, rounded to 0.1 so that they add up to exactly 100 (all 0 for an empty ledger)."""
    total = sum(ledger.values())
    if total <= 0:
        return dict.fromkeys(ledger, 0.0)
    exact = {category: 1000 * seconds / total for category, seconds in ledger.items()}
    tenths = {category: math.floor(value) for category, value in exact.items()}
    by_remainder = sorted(exact, key=lambda category: tenths[category] - exact[category])
    for category in by_remainder[: 1000 - sum(tenths.values())]:
        tenths[category] += 1
    return {category: value / 10 for category, value in tenths.items()}


_SENTENCES = {
    DATA_WAIT: "Input bound: workers waited for data during {part} of the wall time, and training took {training}.",
    EVALUATION: "Limited by evaluation: it took {part} of the wall time, and training {training}.",
    CHECKPOINT: "Limited by checkpoints: steps stood still for {part} of the wall time, and training took {training}.",
    OTHER: "Limited by {cause}: start-up, restarts and idle time took {part} and lost work {lost} of the wall time, "
    "and training {training}.",
    PRODUCTIVE: "Compute bound: {training} of the wall time went into forward, backward and the exchange of gradients, "
    "{wait} into waiting for data, and nothing but computing took more than {most}.",
}


def verdict(ledger: Mapping[str, float], tries: Sequence[Attempt]) -> str:
    """One sentence: what limits the run, and the numbers that this rests on.

    The largest of data wait, evaluation, checkpoint stall, and interruptions (lost work, start-up, restarts and idle)
    limits the run if it took more than 10 % of the wall time; otherwise computing does.
    """
    total = sum(ledger.values())
    if total <= 0 or ledger[PRODUCTIVE] + ledger[LOST] <= 0:
        return "No step has been measured yet, so nothing can be said about what limits the run."
    seconds = {category: ledger[category] for category in (DATA_WAIT, EVALUATION, CHECKPOINT)}
    seconds[OTHER] = ledger[OTHER] + ledger[LOST]
    worst = max(seconds, key=lambda category: seconds[category])
    limit = worst if seconds[worst] > _LIMITING_SHARE * total else PRODUCTIVE

    def part(category: str) -> str:
        return f"{ledger[category] / total:.1%}".replace("%", "\N{NO-BREAK SPACE}%")

    return _SENTENCES[limit].format(
        part=part(limit), training=part(PRODUCTIVE), lost=part(LOST), wait=part(DATA_WAIT),
        most=f"{_LIMITING_SHARE:.0%}".replace("%", "\N{NO-BREAK SPACE}%"), cause=_interruption(tries, seconds[OTHER]),
    )  # fmt: skip


def _interruption(tries: Sequence[Attempt], seconds: float) -> str:
    """What most of `seconds` that were neither training nor waiting came from, in words."""
    pauses = sum(
        later.start["time"] - attempt.start["time"] - attempt.seconds
        for attempt, later in pairwise(tries)
        if attempt.ending in ("finished", "stopped")
    )
    cut = sum(attempt.was_cut for attempt in tries)
    if pauses > seconds / 2:
        return f"pauses ({pauses:,.0f} s between a stop and the next start)"
    return f"failures ({cut} of {len(tries)} attempts were cut short)" if cut else "start-up"
