"""`longhaul data ...`: look at a data set."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import TaskID

from configs import LonghaulError, load_recipe

app = typer.Typer(no_args_is_help=True, help="Check a data set, or look at its samples as the network sees them.")
DirectoryArgument = Annotated[Path, typer.Argument(help="The data set's directory (made by `longhaul prepare`).")]


@app.command(
    epilog="Examples:  longhaul data check data/imagenet   |   longhaul data check data/imagenet --decode 0.01"
)
def check(
    directory: DirectoryArgument,
    decode: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the images to decode; 0 for none.")] = 1.0,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads (0: all cores).")] = 0,
) -> None:
    """Check files, index, every image's checksum, decoding and class balance; name the shard and row of what is wrong.

    Exits with 1 when something does not hold.
    """
    from data_pipeline.check import check_data
    from launch.tables import bar, findings_table

    console = Console(soft_wrap=True)
    with bar(console) as progress:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what)
            progress.update(tasks[what], completed=done, total=total)

        findings = check_data(directory, decode, threads or len(os.sched_getaffinity(0)), show)
    console.print(findings_table(findings))
    if not all(finding.holds for finding in findings):
        raise typer.Exit(1)


@app.command(epilog="Example:  longhaul data show data/imagenet --recipe resnet50 --out samples.png")
def show(
    directory: DirectoryArgument,
    recipe: Annotated[str, typer.Option("--recipe", help="Name or path of the recipe whose augmentation is shown.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the recipe, as key=value.")] = None,
    out: Annotated[Path, typer.Option("--out", help="The picture to write (PNG or JPEG).")] = Path("samples.png"),
    samples: Annotated[int, typer.Option(min=1, max=256, help="Rows: the first samples of the run.")] = 8,
    epochs: Annotated[int, typer.Option(min=1, max=32, help="Columns: each sample as seen in so many epochs.")] = 4,
) -> None:
    """Write a picture of augmented samples, each beside its original with the crop boxes."""
    from data_pipeline.show import show_samples

    if out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise LonghaulError(f"--out {out}: name a .png or .jpg file.")
    show_samples(directory, load_recipe(recipe, overrides or ()), out, samples, epochs)
    Console(soft_wrap=True).print(f"{out}", highlight=False)
