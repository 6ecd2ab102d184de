"""Training and held-out error over iterations, of several runs over one another (He et al. 2015, figures 4 and 6)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from configs import LonghaulError
from trainer.analysis.plot import Line, colour, plot
from trainer.analysis.tables import csv_text
from trainer.rundir import RunDirectory
from trainer.timeline import Event, surviving

_STRETCHES = 100


@dataclass(frozen=True)
class Point:
    """Error is top-1, in per cent. A training point stands for the mean over the `steps` up to and with `step`."""

    step: int
    epoch: float
    error: float
    loss: float | None
    steps: int = 1


@dataclass(frozen=True)
class Curves:
    """What of a run's events became part of it (`trainer.timeline.surviving`), by ascending step."""

    training: list[Point]
    held_out: list[Point]

    @property
    def last_step(self) -> int:
        return max((points[-1].step for points in (self.training, self.held_out) if points), default=0)


def read_curves(run: RunDirectory) -> Curves:
    """The curves of a run, finished or not; raises LonghaulError where nothing was measured yet."""
    events = [event for event in run.events() if isinstance(event, dict) and "event" in event]
    curves = Curves(_points(surviving(events, "step"), "train_top1"), _points(surviving(events, "evaluation"), "top1"))
    if not curves.last_step:
        raise LonghaulError(f"{run.events_file} tells of no step yet, so there is no curve to draw.")
    return curves


def _points(events: Sequence[Event], key: str) -> list[Point]:
    points, before = [], 0
    for event in events:
        step = int(event["step"])
        if event.get(key) is not None:
            error = 100 * (1 - event[key])
            points.append(Point(step, event.get("epoch", 0.0), error, event.get("loss"), max(step - before, 1)))
        before = step
    return points


def smooth(points: Sequence[Point], length: float) -> list[tuple[float, float]]:
    """(step, error) over consecutive stretches of `length` steps: the mean error, weighted by the steps that each point
    stands for, at the middle of the steps that it is the mean of."""
    stretches: dict[int, list[Point]] = {}
    for point in points:
        stretches.setdefault(math.ceil(point.step / length), []).append(point)
    smoothed = []
    for stretch in stretches.values():
        steps = sum(point.steps for point in stretch)
        mean = math.fsum(point.error * point.steps for point in stretch) / steps
        smoothed.append(((stretch[0].step - stretch[0].steps + stretch[-1].step) / 2, mean))
    return smoothed


def draw_curves(curves: Mapping[str, Curves]) -> str:
    """The picture, SVG: held-out error bold, training error dashed, a colour for each run.

    The axis ends at twice the highest error with which a curve ends, so that the ends can be told apart; what is above
    is cut off, as in the paper's figures.
    """
    length = max(found.last_step for found in curves.values()) / _STRETCHES
    lines: list[Line] = []
    for index, (name, found) in enumerate(curves.items()):
        held_out = [(float(point.step), point.error) for point in found.held_out]
        for kind, points, style in (
            ("held out", held_out, "bold"),
            ("training", smooth(found.training, length), "dashed"),
        ):
            last = f"{points[-1][1]:.2f} %" if points else "not measured yet"
            lines.append(
                Line(f"{name}, {kind}: {last}", colour(index), points, style, dots=style == "bold" and len(points) < 40)
            )
    highest = max(line.points[-1][1] for line in lines if line.points)
    return plot(lines, "iterations", "error (%)", min(2 * highest, 100.0))


def curves_csv(curves: Mapping[str, Curves]) -> str:
    """A row for each point as it was logged: run, step, epoch, split (training or held_out), error (%), loss."""
    rows = [
        (name, p.step, p.epoch, split, round(p.error, 6), p.loss)
        for name, found in curves.items()
        for split, points in (("training", found.training), ("held_out", found.held_out))
        for p in points
    ]
    return csv_text(("run", "step", "epoch", "split", "error", "loss"), rows)
