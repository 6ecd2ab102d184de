"""The `longhaul` command."""

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from configs import LonghaulError, load_recipe
from launch import checkpoint as checkpoint_commands
from launch import data as data_commands
from launch.arguments import DataOption, RunsOption

console = Console(soft_wrap=True)
app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Longhaul trains ResNets on ImageNet: [bold]a run is a function of its recipe and seed, "
    "not of the cluster it ran on.[/bold]",
)

app.add_typer(data_commands.app, name="data")
app.add_typer(checkpoint_commands.app, name="checkpoint")

CacheDirOption = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir", help="Where shards of a URL are kept (each machine's LONGHAUL_CACHE, or ~/.cache/longhaul)."
    ),
]
CacheBytesOption = Annotated[
    str | None, typer.Option("--cache-bytes", help="The most they may take, as 200GB (80 % of what is free).")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
ThreadsOption = Annotated[
    int, typer.Option(min=0, help="CPU threads a worker (0: cores / workers; 1 if deterministic).")
]
WeightsOption = Annotated[str, typer.Option(help="auto (averaged ones where the recipe keeps them), plain or ema.")]


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and Ray's own log.")] = False,
) -> None:
    if debug:
        os.environ["LONGHAUL_DEBUG"] = "1"


@app.command(
    epilog="Examples:  longhaul prepare digits --out data/digits   |   "
    "longhaul prepare imagenet/ --out data/imagenet   |   "
    "longhaul prepare imagenet/ --out data/imagenet-small --max-side 500 --quality 90"
)
def prepare(
    source: Annotated[
        str,
        typer.Argument(help="'digits', or the path or URL of a data set: a folder for each class, tars, Parquet, ..."),
    ],
    out: Annotated[Path, typer.Option("--out", help="The data set's directory; it must not exist.")],
    holdout: Annotated[
        float, typer.Option(min=0.0, max=0.5, help="Share to hold out where the source has no val/ or test/.")
    ] = 0.0,
    max_side: Annotated[
        int | None, typer.Option(min=1, help="Scale images down whose longer side has more pixels.")
    ] = None,
    quality: Annotated[
        int | None, typer.Option(min=1, max=100, help="Encode every image again, at this JPEG quality.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Store pixels rather than JPEG; best with --max-side.")] = False,
    upright: Annotated[
        bool, typer.Option("--upright", help="Turn images as their EXIF orientation says (otherwise ignored).")
    ] = False,
    shuffle: Annotated[
        bool | None,
        typer.Option(
            "--shuffle/--keep-order",
            help="Store training images in a shuffled order, or in the source's (default: shuffled, but of Parquet).",
            show_default=False,
        ),
    ] = None,
    shard_mib: Annotated[int, typer.Option(min=1, max=1024, help="About the size of a shard, in MiB.")] = 128,
    jobs: Annotated[int, typer.Option(min=0, help="Processes on this machine (0: one for each core).")] = 0,
    workers: Annotated[
        int, typer.Option(min=0, help="Workers on a Ray cluster instead; --out is on storage that all machines share.")
    ] = 0,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget what an interrupted command for the same --out has done.")
    ] = False,
) -> None:
    """Write images into Arrow shards, each verified by decoding it.

    A tree with [bold]train/CLASS/*.jpg[/bold] and [bold]val/[/bold] or [bold]test/[/bold] keeps its splits; a plain
    [bold]CLASS/*.jpg[/bold] tree is all for training, but the share --holdout. Interrupted, the same command goes on
    where it was. Images are stored byte for byte but for --max-side, --quality, --raw and --upright.
    """
    from data_pipeline.ingest import Options
    from launch.commands import prepare_data

    options = Options(max_side, quality, raw, upright)
    prepare_data(console, source, out, holdout, options, shard_mib, shuffle, jobs, workers, restart)


@app.command(epilog="Examples:  longhaul recipes   |   longhaul recipes resnet50")
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this one, a name or a path.", show_default=False)] = None,
) -> None:
    """List the recipes with what to expect of them, or show one: its command, source, and every value."""
    from launch.recipes import show_recipe, show_recipes

    if name is None:
        show_recipes(console)
    else:
        show_recipe(console, name)


@app.command(
    epilog="Examples:  longhaul train digits --name demo --workers 2   |   "
    "longhaul train resnet50 seed=1 schedule.lr=0.5 --data data/imagenet --name rn50   |   "
    "torchrun --nproc-per-node 2 -m launch.cli train digits --name demo"
)
def train(
    recipe: Annotated[str, typer.Argument(help="A name (`longhaul recipes` lists them) or a path to a YAML file.")],
    name: Annotated[str, typer.Option("--name", help="The run's name; the same name again resumes it.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the recipe, as key=value.")] = None,
    data: DataOption = None,
    runs: RunsOption = Path("runs"),
    workers: Annotated[
        int,
        typer.Option("--workers", min=0, help="Training processes (0: a process for each GPU, else for each core)."),
    ] = 0,
    local: Annotated[bool, typer.Option("--local", help="Without Ray, in one process (torchrun implies it).")] = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    max_failures: Annotated[int, typer.Option(help="How often workers may be lost before giving up.")] = 100,
    allow_changes: Annotated[bool, typer.Option("--allow-changes", help="Resume although the recipe changed.")] = False,
    cache_dir: CacheDirOption = None,
    cache_bytes: CacheBytesOption = None,
    checkpoints: Annotated[
        str | None,
        typer.Option(
            "--checkpoints",
            help="A directory or URL (s3://...) under which a new run's checkpoints go, rather than into its own.",
        ),
    ] = None,
) -> None:
    """Train a recipe, or resume the run of that name from its newest valid checkpoint."""
    from launch.commands import train_run

    train_run(
        console, load_recipe(recipe, overrides or ()), data, runs / name, workers, local, device, threads,
        max_failures, allow_changes, cache_dir, cache_bytes, checkpoints,
    )  # fmt: skip


@app.command(
    "eval",
    epilog="Examples:  longhaul eval demo   |   longhaul eval demo --views flip   |   "
    "longhaul eval runs/demo/checkpoints/step-00000676 --batch-norm 100   |   longhaul eval seed0 seed1 seed2",
)
def evaluate(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="TARGET...", help="A run's name or directory, or a checkpoint's; several: an ensemble."),
    ],
    data: DataOption = None,
    runs: RunsOption = Path("runs"),
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    cache_dir: CacheDirOption = None,
    cache_bytes: CacheBytesOption = None,
    views: Annotated[
        str, typer.Option(help="How each image is seen: central, flip, ten-crop or multi-scale; scores are averaged.")
    ] = "central",
    weights: Annotated[
        str | None,
        typer.Option(
            help="plain, ema (their moving average), or auto: ema where the recipe keeps one.",
            show_default="the recipe's",
        ),
    ] = None,
    batch_norm: Annotated[
        int | None,
        typer.Option(
            "--batch-norm", min=0,
            help="Average batch-norm statistics over so many training micro-batches; 0: those that training kept.",
            show_default="the recipe's",
        ),
    ] = None,
) -> None:  # fmt: skip
    """Score a checkpoint (of a run: its newest valid one) on every held-out image, each exactly once.

    Of several, which may be different networks with different input sizes, each is scored, and then the ensemble: the
    mean of their probabilities.
    """
    from launch.evaluate import evaluate_checkpoints

    evaluate_checkpoints(
        console, targets, data, runs, device, threads, views, weights, batch_norm, cache_dir, cache_bytes
    )


@app.command(epilog="Example:  longhaul verify demo")
def verify(
    run: Annotated[str, typer.Argument(help="A run's name or directory.")],
    data: DataOption = None,
    runs: RunsOption = Path("runs"),
) -> None:
    """Prove from the ledger that every epoch used every sample exactly once, across all failures.

    Recomputes the samples, crops and flips of every step from recipe and seed, and compares them with what went
    through the input pipeline. Exits with 1 when something does not hold.
    """
    from launch.commands import verify_run

    verify_run(console, run, data, runs)


@app.command(
    epilog="Examples:  longhaul card demo-0 demo-1 --out benchmarks/results/cards/digits.json   |   "
    "longhaul card --readme README.md"
)
def card(
    names: Annotated[
        list[str] | None, typer.Argument(help="Finished runs of one recipe with different seeds.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write their card to this file.")] = None,
    readme: Annotated[Path | None, typer.Option("--readme", help="Renew the table of all cards in this file.")] = None,
    cards: Annotated[Path, typer.Option("--cards", help="Where the cards are.")] = Path("benchmarks/results/cards"),
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="The recipe of the runs (otherwise the nearest).")
    ] = None,
    machine: Annotated[
        str | None, typer.Option("--machine", help="Where they ran, in words (otherwise this machine).")
    ] = None,
    runs: RunsOption = Path("runs"),
) -> None:
    """Write a result card: scores with recipe, seeds, commit and machine; or the table of all cards into README."""
    from launch.cards import write_card, write_table

    if names and out is not None:
        write_card(console, names, out, runs, recipe, machine)
    elif names or out is not None or readme is None:
        raise LonghaulError("Give finished runs and --out FILE for a card, or --readme FILE for the table of all.")
    if readme is not None:
        write_table(console, readme, cards)


@app.command(epilog="Examples:  longhaul analyse demo   |   longhaul analyse plain20 plain56 --only curves,responses")
def analyse(
    names: Annotated[
        list[str], typer.Argument(help="Runs, by name or directory; laid over one another.", metavar="RUN...")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The directory to write into (RUN/analysis; of several runs RUNS/analysis-...)."),
    ] = None,
    only: Annotated[str | None, typer.Option("--only", help="Of curves,responses,confusion,filters (all).")] = None,
    data: DataOption = None,
    weights: WeightsOption = "auto",
    images: Annotated[int, typer.Option(min=1, help="Held-out images whose responses are measured.")] = 512,
    runs: RunsOption = Path("runs"),
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    cache_dir: CacheDirOption = None,
    cache_bytes: CacheBytesOption = None,
) -> None:
    """Draw error curves, layer responses, class confusion and filters of runs, finished or not, into one page.

    Pictures are SVG and PNG, figures CSV. Networks are those of the newest checkpoint that verifies; a run without one
    has curves.
    """
    from launch.analyse import analyse_runs

    analyse_runs(
        console, names, out, data, only, weights, images, runs, device, threads, cache_dir, cache_bytes
    )  # fmt: skip


@app.command(
    epilog="Examples:  longhaul export demo --to onnx   |   "
    "longhaul export runs/rn50/checkpoints/step-00112590 --to timm --out models/rn50"
)
def export(
    target: Annotated[str, typer.Argument(help="A run's name or directory, or a checkpoint's directory.")],
    to: Annotated[str, typer.Option("--to", help="safetensors, onnx, torchvision or timm.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The file (timm: the directory) to write (RUN/export/RUN-step-...).")
    ] = None,
    weights: WeightsOption = "auto",
    data: DataOption = None,
    images: Annotated[int, typer.Option(min=1, help="Held-out images to compare on.")] = 64,
    force: Annotated[bool, typer.Option("--force", help="Write over an export that exists.")] = False,
    runs: RunsOption = Path("runs"),
    threads: ThreadsOption = 0,
    cache_dir: CacheDirOption = None,
    cache_bytes: CacheBytesOption = None,
) -> None:
    """Write the network of a checkpoint (of a run: its newest valid one) for other programs.

    What was written is loaded again as its users would, and compared with the network on held-out images; if it does
    not compute the same, it is removed.
    """
    from launch.export import export_checkpoint

    export_checkpoint(
        console, target, to, out, weights, data, images, force, runs, threads, cache_dir, cache_bytes
    )  # fmt: skip


@app.command(
    epilog="Examples:  longhaul model   |   longhaul model resnet50 --memory 80GB   |   "
    "longhaul model resnet34 shortcut=C --layers   |   longhaul model timm:resnet50d --size 160 --optimizer lamb   |   "
    "longhaul model paper-resnet50"
)
def model(
    name: Annotated[
        str | None,
        typer.Argument(help="A network (torchvision:NAME and timm:NAME too), or a recipe; left out: all of ours."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to the recipe's model section, as stride=v1 shortcut=C.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Pixels a side (the recipe's; 32 of cifar-*, else 224).")
    ] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="(The recipe's; 10 of cifar-*, else 1000.)")] = None,
    precision: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32 (the recipe's, else bf16).")] = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd, lars or lamb (the recipe's, else sgd).")] = None,
    memory: Annotated[str | None, typer.Option(help="Of one device, as 80GB: how large may a micro-batch be?")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Every layer rather than every stage.")] = False,
) -> None:
    """Show a network's layers, parameters, multiply-adds, and the memory that training it takes."""
    from launch.model import list_models, show_model

    if name is None:
        list_models(console)
    else:
        show_model(console, name, overrides or (), size, classes, precision, optimizer, memory, layers)


@app.command(epilog="Example:  longhaul report demo")
def report(
    run: Annotated[str, typer.Argument(help="A run's name or directory.")], runs: RunsOption = Path("runs")
) -> None:
    """Write report.html: curves, throughput, failures, and what limits the run."""
    from launch.commands import report_run

    report_run(console, run, runs)


@app.command(epilog="Example:  longhaul doctor")
def doctor() -> None:
    """Say what of DALI, CUDA, NCCL, apex and Ray is there, and what will be used."""
    from launch.doctor import examine

    examine(console)


def main() -> None:
    """Entry point: errors are one sentence, without a traceback; exit code 2 for what the user can mend, else 1."""
    try:
        app()
    except LonghaulError as error:
        _fail(error, str(error), 2)
    except OSError as error:
        _fail(error, f"{error}.", 2)
    except Exception as error:
        words = " ".join(str(error).split())[:300]
        _fail(error, f"{type(error).__name__}: {words} (the same command as `longhaul --debug ...` shows where)", 1)


def _fail(error: Exception, message: str, code: int) -> NoReturn:
    if os.environ.get("LONGHAUL_DEBUG"):
        raise error
    if os.environ.get("RANK", "0") == "0":
        Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/bold red] {escape(message)}", highlight=False)
    sys.exit(code)


if __name__ == "__main__":
    main()
