"""`longhaul analyse`."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from configs import LonghaulError
from launch.commands import find_run
from launch.options import choose_images, choose_weights
from launch.view import shown_path
from trainer.rundir import RunDirectory


def analyse_runs(
    console: Console,
    names: Sequence[str],
    out: Path | None,
    data: str | None,
    only: str | None,
    weights: str,
    num_images: int,
    runs: Path,
    device: str,
    threads: int,
    cache_dir: Path | None,
    cache_bytes: str | None,
) -> None:
    """`longhaul analyse`."""
    import torch

    from trainer.analysis.analyse import PARTS, Analysis, analyse
    from trainer.group import pick_device
    from trainer.run import cores_each

    found = name_runs([find_run(name, runs) for name in names])
    threads = threads or cores_each(1)
    torch.set_num_threads(threads)
    images = choose_images(data, cache_dir, cache_bytes)
    analysis = Analysis(
        found, out or default_directory(found, runs), choose_parts(only, PARTS), choose_weights(weights), images,
        num_images, pick_device(device, 0), threads,
    )  # fmt: skip
    page = analyse(analysis, lambda line: console.print(escape(line), highlight=False))
    console.print(f"Analysis: {shown_path(page)}", highlight=False)


def name_runs(found: Sequence[RunDirectory]) -> dict[str, RunDirectory]:
    """Runs by the names that tell them apart: a run's own, or where two have the same its directory's too."""
    by_path = {run.path.resolve(): run for run in found}
    count = Counter(run.name for run in by_path.values())
    named: dict[str, RunDirectory] = {}
    for run in by_path.values():
        name = run.name if count[run.name] == 1 else f"{run.path.parent.name}/{run.name}"
        named[str(run.path) if name in named else name] = run
    return named


def default_directory(named: dict[str, RunDirectory], runs: Path) -> Path:
    """In the run's directory; of several runs, beside them."""
    if len(named) == 1:
        return next(iter(named.values())).path / "analysis"
    return runs / "-".join(["analysis", *(run.name for run in named.values())])


def choose_parts(only: str | None, known: Sequence[str]) -> tuple[str, ...]:
    """`--only a,b` as its parts; none means all."""
    parts = tuple(part.strip() for part in (only or "").split(",") if part.strip())
    for part in parts:
        if part not in known:
            raise LonghaulError(f"--only {part}: it is one or more of {', '.join(known)}, with commas between them.")
    return parts
