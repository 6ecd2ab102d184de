"""`longhaul checkpoint merge` and `convert`."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from configs import LonghaulError, load_recipe
from data_pipeline.storage import parse_location
from launch.options import choose_groups, find_target
from launch.view import shown_path
from trainer.rundir import RunDirectory


def merge_checkpoint(console: Console, target: str, out: Path, only: str | None, force: bool, runs: Path) -> None:
    """`longhaul checkpoint merge`."""
    from trainer.checkpoints.inventory import read_state
    from trainer.checkpoints.merge import describe, merge
    from trainer.weights import choose_checkpoint

    run, name = find_target(target, runs)
    saved = choose_checkpoint(run, name)
    state = read_state(saved, choose_groups(only))
    merge(state, describe(run, saved), out, force)
    _say(console, "Merged", out, [f"{len(state)} tensors of {shown_path(str(saved))}, read again: the same bits."])


def convert_to_longhaul(
    console: Console,
    source: str,
    out: Path,
    recipe: str | None,
    overrides: Sequence[str],
    data: str | None,
    trust: bool,
) -> None:
    """`longhaul checkpoint convert --to longhaul`."""
    from trainer.formats.foreign import open_source
    from trainer.formats.importing import import_run

    if recipe is None or data is None:
        raise LonghaulError(
            "--to longhaul needs --recipe and --data, with which training is to go on; checkpoints of ours are "
            "converted with --to torchvision or --to deepspeed."
        )
    found, location = open_source(Path(source)), parse_location(data)
    run = RunDirectory(out.absolute())
    saved, notes = import_run(found, run, load_recipe(recipe, overrides), location, trust)
    command = " ".join(
        ["longhaul train", recipe, *overrides, f"--data {data} --runs {shown_path(run.path.parent)} --name {run.name}"]
    )
    notes.append(f"From {found.program}'s {source}, to step {saved.step:,}; earlier steps are not in the ledger.")
    _say(console, "Converted", out, [*notes, f"Go on with: {command}"])


def convert_from_longhaul(
    console: Console,
    source: str,
    out: Path,
    to: str,
    data: str | None,
    stage: int,
    ranks: int,
    force: bool,
    runs: Path,
) -> None:
    """`longhaul checkpoint convert --to torchvision|deepspeed`."""
    from trainer.formats.exporting import export_checkpoint
    from trainer.weights import choose_checkpoint

    if to not in ("torchvision", "deepspeed"):
        raise LonghaulError(f"--to {to}: it is longhaul, torchvision or deepspeed.")
    run, name = find_target(source, runs)
    location = parse_location(data) if data is not None else run.data()
    notes = export_checkpoint(run, choose_checkpoint(run, name), location, to, out.absolute(), stage, ranks, force)
    _say(console, "Converted", out, notes)


def _say(console: Console, what: str, out: Path, lines: Sequence[str]) -> None:
    console.print(f"[bold green]{what}:[/bold green] {escape(shown_path(out))}", highlight=False)
    for line in lines:
        console.print(escape(line), highlight=False)
