"""Plots as SVG files of their own: unlike the charts of a report they carry their colours with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from trainer.charts import ticks

# Okabe and Ito 2008, without its yellow: told apart by the colour-blind too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")

_WIDTH, _HEIGHT = 760.0, 400.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 18.0, 16.0, 50.0
_ROW = 20.0
_STYLES = {"bold": 'stroke-width="2.2"', "dashed": 'stroke-width="1.1" stroke-dasharray="4 2.5" stroke-opacity="0.85"'}


@dataclass(frozen=True)
class Line:
    """(x, y) by ascending x, both at least 0. `style` is "bold" or "dashed"; `dots` marks every point."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    style: str = "bold"
    dots: bool = False


def colour(index: int) -> str:
    """The colour of a run."""
    return COLOURS[index % len(COLOURS)]


def plot(lines: Sequence[Line], x_name: str, y_name: str, top: float | None = None) -> str:
    """An SVG document: the lines over one another, and under them a legend in two columns.

    The vertical axis goes from 0 to `top` (None: a little above the highest point); what is above is cut off.
    """
    points = [point for line in lines for point in line.points]
    right = max((x for x, _ in points), default=0.0) or 1.0
    limit = top or max((y for _, y in points), default=0.0) * 1.05 or 1.0
    frame = _Frame(right, limit)
    rows = (len(lines) + 1) // 2
    legend = [_legend(line, index) for index, line in enumerate(lines)]
    body = [*frame.axes(x_name, y_name), frame.cut("".join(_line(line, frame) for line in lines)), *legend]
    return document(_WIDTH, _HEIGHT + rows * _ROW + 6, body, f"{y_name} over {x_name}")


def document(width: float, height: float, body: Sequence[str], label: str) -> str:
    """An SVG document on white."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(label)}" font-family="sans-serif" font-size="13" fill="#222">'
        f'<rect width="{width:g}" height="{height:g}" fill="#fff"/>{"".join(body)}</svg>\n'
    )


def text(x: float, y: float, content: str, anchor: str = "start", more: str = "") -> str:
    """A line of text; `anchor` is start, middle or end."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(content)}</text>'


@dataclass(frozen=True)
class _Frame:
    """The area of a plot: x from 0 to `right`, y from 0 to `top`."""

    right: float
    top: float

    def x(self, value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * value / self.right

    def y(self, value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - value / self.top)

    def cut(self, drawn: str) -> str:
        """What was drawn, as far as it lies in the area: an SVG in the SVG clips, and needs no name to do it."""
        place = f"{_LEFT:g} {_TOP:g} {_WIDTH - _LEFT - _RIGHT:g} {_HEIGHT - _TOP - _BOTTOM:g}"
        x, y, width, height = place.split()
        return f'<svg x="{x}" y="{y}" width="{width}" height="{height}" viewBox="{place}">{drawn}</svg>'

    def axes(self, x_name: str, y_name: str) -> list[str]:
        width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        box = f'x="{_LEFT:g}" y="{_TOP:g}" width="{width:g}" height="{height:g}"'
        parts = [f'<rect {box} fill="none" stroke="#888"/>']
        for value in ticks(self.top, 5):
            at = f"{self.y(value):.1f}"
            parts.append(f'<line x1="{_LEFT:g}" x2="{_WIDTH - _RIGHT:g}" y1="{at}" y2="{at}" stroke="#ddd"/>')
            parts.append(text(_LEFT - 7, self.y(value) + 4.5, f"{value:,.4g}", "end"))
        for value in ticks(self.right, 6):
            parts.append(text(self.x(value), _HEIGHT - _BOTTOM + 18, f"{value:,.7g}", "middle"))
        parts.append(text(_LEFT + width / 2, _HEIGHT - 10, x_name, "middle"))
        middle = f"{_TOP + height / 2:.1f}"
        parts.append(text(0, 0, y_name, "middle", f' transform="translate(16 {middle}) rotate(-90)"'))
        return parts


def _line(line: Line, frame: _Frame) -> str:
    places = [(frame.x(x), frame.y(y)) for x, y in line.points]
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    look = f'fill="none" stroke="{line.colour}" {_STYLES[line.style]}'
    dots = ""
    if line.dots or len(places) == 1:
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" fill="{line.colour}"/>' for x, y in places)
    return f'<polyline points="{joined}" stroke-linejoin="round" {look}/>{dots}'


def _legend(line: Line, index: int) -> str:
    x = _LEFT + index % 2 * (_WIDTH - _LEFT) / 2
    y = _HEIGHT + index // 2 * _ROW + 8
    sample = f'x1="{x:g}" x2="{x + 30:g}" y1="{y - 4.5:g}" y2="{y - 4.5:g}"'
    return f'<line {sample} stroke="{line.colour}" {_STYLES[line.style]}/>' + text(x + 38, y, line.name)
