"""`longhaul recipes`: which there are, and what is in one."""

import re
import textwrap
from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from configs import Header, dump, list_recipes, load_recipe, read_header
from configs.header import FIELDS

_WIDE = 180  # columns of text in which there is room for where a recipe comes from


def show_recipes(console: Console) -> None:
    """A line for each built-in recipe, under the family that it belongs to."""
    if not console.is_terminal:
        console = Console(file=console.file, soft_wrap=True, width=400)  # a line stays a line
    families: dict[str, dict[str, Header]] = {}
    for name in sorted(list_recipes(), key=_by_number):
        header = read_header(name)
        families.setdefault(header["Family"], {})[name] = header
    for family, headers in families.items():
        console.print(f"\n[bold]{escape(family)}[/bold]", highlight=False)
        console.print(_table(headers, wide=console.width >= _WIDE))
    console.print("\n`longhaul recipes NAME` shows one: its command, its source, and every value.", highlight=False)


def _table(headers: Mapping[str, Header], wide: bool) -> Table:
    table = Table(show_header=True, box=None, header_style="dim", pad_edge=False)
    for title in ("recipe", "model", "length", "batch"):
        table.add_column(title, no_wrap=True)
    for title in ("expected", *(("description", "source") if wide else ())):
        table.add_column(title, overflow="fold")
    for name, header in headers.items():
        recipe = load_recipe(name)
        batch = f"{recipe.batch.num_micro} x {recipe.batch.micro}"
        cells = [name, recipe.model.name, str(recipe.duration), batch, header.short("Expected")]
        table.add_row(*map(escape, [*cells, *([recipe.description, header.short("Source")] if wide else [])]))
    return table


def _by_number(name: str) -> list[tuple[str, int]]:
    """A key by which resnet50 comes before resnet101."""
    return [(word, int(number or 0)) for word, number in re.findall(r"([^0-9]*)([0-9]*)", name)]


def show_recipe(console: Console, name: str) -> None:
    """One recipe: what its header says, and its values with every default written out."""
    recipe = load_recipe(name)
    console.print(escape(_comment(read_header(name)) + dump(recipe)), highlight=False, end="")


def _comment(header: Header) -> str:
    """The header as a comment, so that with the values below it it makes a recipe file."""
    lines = [f"# {command}" for command in header.commands] + ["#"]
    for name in FIELDS:
        lines += textwrap.wrap(
            header[name], 120, initial_indent=f"# {name + ':':<10}", subsequent_indent="#           "
        )
    return "\n".join(lines) + "\n"
