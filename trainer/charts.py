"""Curves over steps as inline SVG. Colours come from the page's style sheet, by class."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 560.0, 236.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 12.0, 10.0, 42.0
_MOST_POINTS = 280  # more than two pixels a point; a longer curve is drawn as means, with the range behind it


@dataclass(frozen=True)
class Series:
    """A curve: (step, value) by ascending step. `css` is its class; `dots` marks every point."""

    name: str
    css: str
    points: Sequence[tuple[int, float]]
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line at a step; `css` is "failure" or "resume", `label` is shown on hovering."""

    step: int
    css: str
    label: str


@dataclass(frozen=True)
class Axis:
    """The horizontal axis: from 0 to `last` steps, each `epochs_per_step` epochs long (0: not known)."""

    last: int
    epochs_per_step: float

    def x(self, step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / max(1, self.last)

    def name(self, step: int) -> str:
        epoch = f" (epoch {step * self.epochs_per_step:,.1f})" if self.epochs_per_step else ""
        return f"step {step:,}{epoch}"


@dataclass(frozen=True)
class Bucket:
    """Consecutive points drawn as one: the last of their steps, and the values' least, mean and greatest."""

    step: int
    low: float
    mean: float
    high: float


def thin(points: Sequence[tuple[int, float]], most: int = _MOST_POINTS) -> list[Bucket]:
    """At most `most` buckets of equally many points each (the last may have fewer); values that are no numbers (a
    loss of NaN) are left out."""
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    size = max(1, math.ceil(len(finite) / most))
    groups = [finite[first : first + size] for first in range(0, len(finite), size)]
    return [
        Bucket(group[-1][0], min(values), math.fsum(values) / len(values), max(values))
        for group in groups
        for values in [[value for _, value in group]]
    ]


def ticks(top: float, count: int = 4) -> list[float]:
    """About `count` round numbers from 0 up to `top`."""
    if not 0 < top < math.inf:
        return [0.0]
    raw = top / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    return [index * step for index in range(int(top / step + 1e-9) + 1)]


def figure(
    title: str,
    series: Sequence[Series],
    axis: Axis,
    marks: Sequence[Mark],
    show: Callable[[float], str],
    top: float | None = None,
    show_tick: Callable[[float], str] | None = None,
) -> str:
    """A <figure>: title, legend, the latest values (those under the pointer, once it is there), and the curves.

    `show` writes a value with its unit, `show_tick` (None: the same) a round one at the vertical axis, which goes from
    0 to `top` (None: a little above the highest value).
    """
    buckets = [thin(curve.points) for curve in series]
    highest = max([bucket.high for curve in buckets for bucket in curve], default=0.0)
    limit = top or highest * 1.05 or 1.0
    height = _HEIGHT - _TOP - _BOTTOM

    def y(value: float) -> float:
        return _TOP + height * (1 - min(max(value / limit, 0.0), 1.0))

    both = list(zip(series, buckets, strict=True))
    drawn = [_grid(limit, axis, show_tick or show, y), *(_mark(mark, axis) for mark in marks)]
    drawn += [_curve(curve, found, axis, y) for curve, found in both]
    data = json.dumps([_readings(found, axis, y, show) for found in buckets])
    legend = "".join(_legend(curve, found, axis, show) for curve, found in both)
    return (
        f'<figure data-series="{escape(data)}"><figcaption><h3>{escape(title)}</h3><p class="legend">{legend}</p>'
        f'</figcaption><svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" '
        f'aria-label="{escape(title)} over steps">{"".join(drawn)}</svg></figure>'
    )


def _legend(curve: Series, found: Sequence[Bucket], axis: Axis, show: Callable[[float], str]) -> str:
    reading = f"{show(found[-1].mean)} at {axis.name(found[-1].step)}" if found else "not measured yet"
    return f'<span class="key {curve.css}">{escape(curve.name)} <b>{escape(reading)}</b></span> '


def _readings(
    found: Sequence[Bucket], axis: Axis, y: Callable[[float], float], show: Callable[[float], str]
) -> list[tuple[float, float, str]]:
    """For the pointer: x and y in the SVG's units, and what to say."""
    return [(round(axis.x(b.step), 1), round(y(b.mean), 1), f"{show(b.mean)} at {axis.name(b.step)}") for b in found]


def _curve(curve: Series, found: Sequence[Bucket], axis: Axis, y: Callable[[float], float]) -> str:
    places = [(axis.x(b.step), b) for b in found]
    line = " ".join(f"{x:.1f},{y(b.mean):.1f}" for x, b in places)
    band = ""
    if len(curve.points) > _MOST_POINTS:
        edge = [(x, y(b.high)) for x, b in places] + [(x, y(b.low)) for x, b in reversed(places)]
        band = f'<polygon class="band" points="{" ".join(f"{x:.1f},{at:.1f}" for x, at in edge)}"/>'
    dots = ""
    if curve.dots or len(found) == 1:
        dots = "".join(f'<circle class="dot" cx="{x:.1f}" cy="{y(b.mean):.1f}" r="3"/>' for x, b in places)
    return f'<g class="curve {curve.css}">{band}<polyline points="{line}"/>{dots}</g>'


def _grid(limit: float, axis: Axis, show: Callable[[float], str], y: Callable[[float], float]) -> str:
    parts = []
    for value in ticks(limit):
        ends = f'x1="{_LEFT:g}" x2="{_WIDTH - _RIGHT:g}"'
        parts.append(f'<line class="grid" {ends} y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{escape(show(value))}</text>')
    for step in ticks(axis.last, 5):
        place = f'x="{axis.x(step):.1f}" text-anchor="middle"'
        parts.append(f'<text {place} y="{_HEIGHT - 24:g}">{step:,.0f}</text>')
        if axis.epochs_per_step:
            epoch = f"{step * axis.epochs_per_step:,.1f}".removesuffix(".0")
            parts.append(f'<text class="second" {place} y="{_HEIGHT - 8:g}">{epoch}</text>')
    names = '<text x="4" y="{at:g}" class="{css}">{name}</text>'
    parts.append(names.format(at=_HEIGHT - 24, css="first", name="step"))
    if axis.epochs_per_step:
        parts.append(names.format(at=_HEIGHT - 8, css="second", name="epoch"))
    return "".join(parts)


def _mark(mark: Mark, axis: Axis) -> str:
    x = f"{axis.x(mark.step):.1f}"
    return (
        f'<line class="mark {mark.css}" x1="{x}" x2="{x}" y1="{_TOP:g}" y2="{_HEIGHT - _BOTTOM:g}">'
        f"<title>{escape(mark.label)}</title></line>"
    )
