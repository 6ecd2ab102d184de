"""`longhaul card`: a card of what was measured, and README's table of all cards."""

import json
import os
import platform
import socket
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from configs import LonghaulError, read_header
from launch.commands import find_run
from launch.view import shown_path
from trainer.cards import Card, make_card, read_cards
from trainer.rundir import RunDirectory, write_atomically

BEGIN, END = "<!-- results: made by `longhaul card --readme`, do not edit -->", "<!-- end of results -->"
_NO_MATTER = ("checkpoint.", "evaluate.every=", "log.", "precision=")  # to what is expected
_PACKAGES = {"dali": "nvidia-dali-cuda130", "numpy": "numpy"}


def write_card(
    console: Console, names: Sequence[str], out: Path, runs: Path, recipe: str | None, machine: str | None
) -> None:
    """`longhaul card RUN... --out FILE`."""
    found = [find_run(name, runs) for name in names]
    versions = {"python": platform.python_version(), **{key: version(name) for key, name in _PACKAGES.items()}}
    card = make_card(found, recipe, machine or _machine_of(found), versions)
    write_atomically(out, json.dumps(card, indent=1) + "\n")
    console.print(f"{shown_path(out)}: {card['recipe']}, top-1 {score_text(card)}", highlight=False)


def write_table(console: Console, readme: Path, cards: Path) -> None:
    """`longhaul card --readme FILE`."""
    found = read_cards(cards)
    if not found:
        raise LonghaulError(f"There are no cards in {cards}: make one with `longhaul card RUN --out FILE`.")
    write_atomically(readme, with_table(readme.read_text(), results_table(found), readme))
    console.print(f"{shown_path(readme)}: {len(found)} cards", highlight=False)


def with_table(text: str, table: str, source: Path) -> str:
    """`text` with `table` between its markers; raises LonghaulError where it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise LonghaulError(f"{source} has no place for the table: write the lines {BEGIN} and {END} where it belongs.")
    return f"{before}{BEGIN}\n{table}{END}{after}"


def results_table(cards: Mapping[str, Card]) -> str:
    """The cards as a Markdown table."""
    lines = ["| recipe | top-1 | runs | expected | steps | a run took | on |", "|---|---|---|---|---|---|---|"]
    for file, card in cards.items():
        runs = card["runs"]
        minutes = sum(run["seconds"] for run in runs) / len(runs) / 60
        workers = runs[0]["workers"]
        changed = [override for override in card["overrides"] if not override.startswith(_NO_MATTER)]
        what = f"[`{card['recipe']}`](benchmarks/results/cards/{file}.json)"
        cells = (
            " ".join([what, *(f"`{override}`" for override in changed)])
            + (" (an older recipe)" if "superseded" in card else ""),
            score_text(card),
            str(len(runs)),
            "" if changed else read_header(card["recipe"]).short("Expected"),
            f"{runs[0]['steps']:,}",
            f"{minutes:.1f} min",
            f"{card['machine']}, {workers} worker{'s' if workers > 1 else ''}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def score_text(card: Card) -> str:
    """Mean top-1 and, of several runs, its standard deviation."""
    top1 = card["top1"]
    return f"{top1['mean']:.2%}" + (f" ± {100 * top1['std']:.2f}" if "std" in top1 else "")


def _machine_of(runs: Sequence[RunDirectory]) -> str:
    """This machine in words, where the runs were made on it; raises LonghaulError otherwise."""
    starts = [event for run in runs for event in run.events() if event["event"] == "start"]
    workers = [worker for start in starts for worker in start["workers"]]
    hosts = sorted({worker["host"] for worker in workers})
    if hosts != [socket.gethostname()]:
        raise LonghaulError(f"The runs were made on {', '.join(hosts)}, not here: describe that with --machine.")
    if any(worker["device"].startswith("cuda") for worker in workers):
        raise LonghaulError("The runs were made on GPUs: say how many of which with --machine.")
    return f"{_processor()}, {len(os.sched_getaffinity(0))} cores"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
