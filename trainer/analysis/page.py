"""The page of an analysis: one self-contained HTML file, and the files that it shows beside it."""

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.atomic import replacing
from trainer.rundir import write_atomically

_TEMPLATE = Path(__file__).with_name("page.html")


@dataclass
class Page:
    """Collects what was found, writing each file as it comes."""

    directory: Path
    files: list[str] = field(default_factory=list)
    _body: list[str] = field(default_factory=list)

    def heading(self, title: str, level: int = 2) -> None:
        self._body.append(f"<h{level}>{escape(title)}</h{level}>")

    def note(self, words: str) -> None:
        self._body.append(f'<p class="soft">{escape(words)}</p>')

    def picture(self, name: str, svg: str) -> None:
        """Write an SVG file and show it."""
        self.text(name, svg)
        self._body.append(f"<figure>{svg}</figure>")

    def image(self, name: str, image: Image.Image) -> None:
        """Write a PNG file and show it."""
        held = io.BytesIO()
        image.save(held, "PNG")
        self._write(name, lambda path: path.write_bytes(held.getvalue()))
        data = base64.b64encode(held.getvalue()).decode()
        self._body.append(f'<figure><img alt="{escape(name)}" src="data:image/png;base64,{data}"></figure>')

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Show a table: text, numbers, and shares as per cent."""
        head = "".join(f"<th>{escape(name)}</th>" for name in columns)
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows)
        self._body.append(f'<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>')

    def text(self, name: str, content: str) -> None:
        """Write a file that is not shown."""
        write_atomically(self.directory / name, content)
        self.files.append(name)

    def array(self, name: str, values: NDArray[np.generic]) -> None:
        """Write a .npy file that is not shown."""
        self._write(name, lambda path: np.save(path, values))

    def write(self, title: str) -> Path:
        """Write index.html and return its path."""
        path = self.directory / "index.html"
        body = "\n".join([f"<h1>{escape(title)}</h1>", *self._body])
        write_atomically(path, Template(_TEMPLATE.read_text()).substitute(title=escape(title), body=body))
        return path

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        with replacing(self.directory / name) as temporary:
            write(temporary)
        self.files.append(name)


def _cell(value: object) -> str:
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    if value is None:
        return "<td></td>"
    return f'<td class="number">{value:,}</td>' if isinstance(value, int) else f'<td class="number">{value:.2%}</td>'
