"""What the commands of `longhaul` do."""

import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from configs import LonghaulError, Recipe
from data_pipeline.cache import parse_bytes
from data_pipeline.shards import Manifest
from data_pipeline.split import read_manifest
from data_pipeline.storage import Location, parse_location
from launch.prepare import prepare_data
from launch.tables import bar, findings_table
from launch.view import View, interrupt, shown_path, typed_command
from trainer.job import Job
from trainer.rundir import RunDirectory, settle_location, settle_recipe


def train_run(
    console: Console,
    recipe: Recipe,
    data: str | None,
    path: Path,
    workers: int,
    local: bool,
    device: str,
    threads: int,
    max_failures: int,
    allow_changes: bool,
    cache_dir: Path | None,
    cache_bytes: str | None,
    checkpoints: str | None,
) -> None:
    """`longhaul train`."""
    if device not in ("auto", "cpu", "cuda"):
        raise LonghaulError(f"--device {device}: it is auto, cpu or cuda.")
    run = RunDirectory(path.absolute())
    recipe = settle_recipe(run, recipe, allow_changes)
    base = None if checkpoints is None else parse_location(checkpoints)
    settle_location(run, base, record=False)  # the workers do that; what they would refuse is refused now
    location = _find_data(console, recipe, data, run)
    manifest, _ = read_manifest(location)
    if _is_finished(run, recipe, manifest) and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        console.print("The run is finished already.")
        _show_result(console, run)
        return
    run.path.mkdir(parents=True, exist_ok=True)

    job = Job(
        recipe, location, run, device, threads, allow_changes=allow_changes, checkpoints=base,
        **cache_options(cache_dir, cache_bytes),
    )  # fmt: skip
    if local or {"TORCHELASTIC_RUN_ID", "CROSS_RANK"} & os.environ.keys():  # set by torchrun, or DeepSpeed's launcher
        _train_here(console, job, workers)
    else:
        _train_on_ray(console, job, workers, max_failures)


def cache_options(directory: Path | None, limit: str | None) -> dict[str, Any]:
    """--cache-dir and --cache-bytes as the keyword arguments that stand for them everywhere."""
    return {
        "cache_directory": directory and directory.absolute(),
        "cache_bytes": None if limit is None else parse_bytes(limit),
    }


def _find_data(console: Console, recipe: Recipe, data: str | None, run: RunDirectory) -> Location:
    """--data, or the embedded data set, written beside the runs where the recipe asks for it."""
    if data is not None:
        return parse_location(data)
    if recipe.data != "digits":
        raise LonghaulError("--data is missing: give the data set's directory (see `longhaul prepare --help`) or URL.")
    embedded = run.path.parent / ".data" / "digits"
    if os.environ.get("RANK", "0") != "0":  # of torchrun's processes one writes; it appears when it is whole
        _wait_until_there(embedded)
    elif not embedded.exists():
        console.print(f"Writing the embedded digits into {shown_path(embedded)}")
        prepare_data(console, "digits", embedded)
    return embedded


def _wait_until_there(path: Path, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise LonghaulError(f"{path}, which rank 0 was to write, did not appear within {seconds:.0f} s.")
        time.sleep(0.1)


def _is_finished(run: RunDirectory, recipe: Recipe, manifest: Manifest) -> bool:
    from trainer.schedules import total_steps

    result = run.result()
    return result is not None and result["steps"] >= total_steps(recipe, manifest.num_samples("train"))


def _train_here(console: Console, job: Job, workers: int) -> None:
    from trainer.group import Rendezvous
    from trainer.run import work

    place = Rendezvous.from_environment()
    if workers not in (0, place.world_size):
        raise LonghaulError(f"--workers {workers} without Ray: let torchrun start them: {_under_torchrun(workers)}")
    view = View(job.run, console)
    done = threading.Event()
    watching = threading.Thread(target=view.follow, args=(lambda: not done.is_set(),), daemon=True)
    if place.rank == 0:
        watching.start()
    try:
        work(job, place, int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))))
    finally:
        done.set()
        if place.rank == 0:
            watching.join(timeout=5)
    if place.rank == 0:
        _conclude(console, job.run, view)


def _train_on_ray(console: Console, job: Job, workers: int, max_failures: int) -> None:
    with console.status("Starting Ray ..."):
        from cluster.runner import Placement, connect, count_workers, train_on_ray

        verbose = bool(os.environ.get("LONGHAUL_DEBUG"))
        connect(verbose)
    placement = Placement(count_workers(job, workers), max_failures, verbose)
    console.print(f"Starting {placement.num_workers} training processes on Ray ...")
    view = View(job.run, console)
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            train_on_ray(job, placement)
        except BaseException as error:
            failure.append(error)

    fitting = threading.Thread(target=fit, daemon=True)
    signal.signal(signal.SIGTERM, interrupt)
    fitting.start()
    try:
        view.follow(fitting.is_alive)
    except KeyboardInterrupt:
        console.print("Stopping: saving a checkpoint. Ctrl-C again leaves at once, without it.")
        view.follow(lambda: fitting.is_alive() and _keep_asking(job.run))
        job.run.stop_file.unlink(missing_ok=True)
    if failure:
        raise failure[0]
    _conclude(console, job.run, view)


def _keep_asking(run: RunDirectory) -> bool:
    """Renew the stop file: workers that were only starting when it was written have removed it as an old one."""
    run.stop_file.touch()
    return True


def _conclude(console: Console, run: RunDirectory, view: View) -> None:
    """Say how it ended, write the report, and leave with the right exit code."""
    if view.errors:
        raise LonghaulError(view.errors[0])
    from trainer.report import write_report

    report = write_report(run)
    if view.last.get("event") != "finished":
        console.print(f"Go on with the same command: {typed_command()}", highlight=False)
        raise typer.Exit(130)
    _show_result(console, run)
    console.print(f"Report: {shown_path(report)}", highlight=False)


def _under_torchrun(workers: int) -> str:
    """What was typed, as a torchrun command. --local is implied there, and would be taken for an option of torchrun."""
    arguments = [a for a in sys.argv[1:] if a != "--local" and not a.startswith("--workers=")]
    if "--workers" in arguments:
        at = arguments.index("--workers")
        del arguments[at : at + 2]
    return f"torchrun --nproc-per-node {workers} -m launch.cli {shlex.join(arguments)}"


def _show_result(console: Console, run: RunDirectory) -> None:
    result = run.result() or {}
    if result.get("top1") is None:
        score = "nothing was held out to evaluate"
    else:
        score = f"top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%} of {result['num_images']:,} held-out images"
    console.print(
        f"[bold green]{run.name}:[/bold green] {score}; {result['steps']:,} steps, {result['seconds']:.1f} s, "
        f"attempts: {result['attempts']}",
        highlight=False,
    )


def find_run(name: str, runs: Path) -> RunDirectory:
    """A run by its name in `runs`, or by its directory."""
    direct = Path(name)
    path = direct if (direct / "recipe.yaml").is_file() else runs / name
    return RunDirectory(path.absolute()).require()


def verify_run(console: Console, name: str, data: str | None, runs: Path) -> None:
    """`longhaul verify`."""
    from trainer.verify import verify

    run = find_run(name, runs)
    with bar(console) as progress:
        task = progress.add_task("steps", total=None)
        findings = verify(
            run, data and parse_location(data), lambda done, total: progress.update(task, completed=done, total=total)
        )
    console.print(findings_table(findings))
    if not all(finding.holds for finding in findings):
        raise typer.Exit(1)


def report_run(console: Console, name: str, runs: Path) -> None:
    """`longhaul report`."""
    from trainer.report import write_report

    console.print(shown_path(write_report(find_run(name, runs))), highlight=False)
