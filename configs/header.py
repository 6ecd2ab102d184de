"""The comment a recipe opens with: its commands, where it comes from, what to expect of it.

Commands come first, one a line, then fields, whose text goes on in indented lines:

    # longhaul train resnet50 --data data/imagenet --name rn50
    #
    # Family:   what it is listed under
    # Source:   paper or implementation, and where in it
    # Departs:  in what it does not follow its source
    # Expected: the score; where that comes from
    # Time:     measured, published or computed

A field that a file lacks is that of the file it extends.
"""

import re
from dataclasses import dataclass

from configs.load import find_recipe, lineage

FIELDS = ("Family", "Source", "Departs", "Expected", "Time")
_FIELD = re.compile(rf"({'|'.join(FIELDS)}): +(\S.*)")


@dataclass(frozen=True)
class Header:
    """The header of a recipe; "" for a field that neither the file nor what it extends has.

    Attributes:
        commands: what to type, from the data set on.
        fields: by name, each one line.
    """

    commands: tuple[str, ...]
    fields: dict[str, str]

    def __getitem__(self, field: str) -> str:
        return self.fields.get(field, "")

    def short(self, field: str) -> str:
        """A field up to its first colon or semicolon: the score without where it comes from."""
        return re.split(r"[;:] |\.$", self[field], maxsplit=1)[0]


def read_header(name: str) -> Header:
    """The header of a recipe given by name or by path; raises LonghaulError where there is none of that name."""
    fields: dict[str, str] = {}
    commands: tuple[str, ...] = ()
    for path in lineage(find_recipe(name)):
        own = parse_header(path.read_text())
        fields, commands = {**fields, **own.fields}, own.commands
    return Header(commands, fields)


def parse_header(text: str) -> Header:
    """The header in the text of one file."""
    commands: list[str] = []
    fields: dict[str, str] = {}
    current = ""
    for line in _comment(text):
        if match := _FIELD.match(line):
            current, fields[match[1]] = match[1], match[2].strip()
        elif current and line.startswith("  "):
            fields[current] += f" {line.strip()}"
        else:
            current = ""
            if line.startswith("longhaul "):
                commands.append(line.strip())
    return Header(tuple(commands), fields)


def _comment(text: str) -> list[str]:
    """The lines of the comment that `text` opens with, without their marks."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return lines
