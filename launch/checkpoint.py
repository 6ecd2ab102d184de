"""`longhaul checkpoint ...`: look into checkpoints, compare and convert them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from launch.arguments import DataOption, RunsOption

app = typer.Typer(
    no_args_is_help=True,
    help="Look into checkpoints: what is in one, is it whole, are two equal; merge and convert them.",
)
console = Console(soft_wrap=True)
TargetArgument = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint's directory, or a run: its newest that verifies.")
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's name or directory.")]
OnlyOption = Annotated[
    str | None,
    typer.Option(help="Only these groups, as model,momentum (of model, momentum, optimizer, ema, guard, ledger, ...)."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs: JSON on stdout.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Write over what an earlier command wrote.")]


@app.command("ls", epilog="Examples:  longhaul checkpoint ls demo   |   longhaul checkpoint ls demo --verify --json")
def list_(
    run: RunArgument,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte, and say which are whole.")] = False,
    as_json: JsonOption = False,
    runs: RunsOption = Path("runs"),
) -> None:
    """List a run's checkpoints, oldest first, and those that were set aside."""
    from launch.checkpoint_views import show_list

    show_list(console, run, verify, as_json, runs)


@app.command(
    epilog="Examples:  longhaul checkpoint show demo   |   "
    "longhaul checkpoint show runs/demo/checkpoints/step-00000676 --tensors"
)
def show(
    target: TargetArgument,
    tensors: Annotated[bool, typer.Option("--tensors", help="Every tensor with shape, dtype and L2 norm.")] = False,
    as_json: JsonOption = False,
    runs: RunsOption = Path("runs"),
) -> None:
    """Show what is in a checkpoint: facts, groups of tensors, files, and what each rank wrote."""
    from launch.checkpoint_views import show_checkpoint

    show_checkpoint(console, target, tensors, as_json, runs)


@app.command(epilog="Examples:  longhaul checkpoint verify demo   |   longhaul checkpoint verify demo other --all")
def verify(
    targets: Annotated[
        list[str], typer.Argument(metavar="CHECKPOINT...", help="A checkpoint's directory, or a run: its newest.")
    ],
    every: Annotated[bool, typer.Option("--all", help="Of a run, all of them.")] = False,
    runs: RunsOption = Path("runs"),
) -> None:
    """Read every byte of checkpoints and compare with the hashes that were saved.

    Exits with 1, naming the file, when one is not whole. What was learnt is proved by `longhaul verify`.
    """
    from launch.checkpoint_views import verify_checkpoints

    verify_checkpoints(console, targets, every, runs)


@app.command(
    epilog="Examples:  longhaul checkpoint diff demo other --only model   |   "
    "longhaul checkpoint diff demo other --ignore ledger"
)
def diff(
    first: TargetArgument,
    second: TargetArgument,
    only: OnlyOption = None,
    ignore: Annotated[str | None, typer.Option(help="Not these groups.")] = None,
    as_json: JsonOption = False,
    runs: RunsOption = Path("runs"),
) -> None:
    """Compare two checkpoints, whatever engine and number of workers saved them: equal bit for bit, or by how much not.

    Exits with 0 when they are equal and with 1 when they differ.
    """
    from launch.checkpoint_views import show_difference

    show_difference(console, first, second, only, ignore, as_json, runs)


@app.command(
    epilog="Examples:  longhaul checkpoint merge demo demo.safetensors   |   "
    "longhaul checkpoint merge demo weights.pt --only model"
)
def merge(
    target: TargetArgument,
    out: Annotated[Path, typer.Argument(help="The file to write: .safetensors, or .pt for torch.load.")],
    only: OnlyOption = None,
    force: ForceOption = False,
    runs: RunsOption = Path("runs"),
) -> None:
    """Write everything in a checkpoint, training state too, into one file; read again and compared bit for bit.

    For a network to use elsewhere see `longhaul export`.
    """
    from launch.checkpoint_convert import merge_checkpoint

    merge_checkpoint(console, target, out, only, force, runs)


@app.command(
    epilog="Examples:  longhaul checkpoint convert demo demo.pth --to torchvision   |   "
    "longhaul checkpoint convert demo ds --to deepspeed --stage 1 --ranks 8   |   "
    "longhaul checkpoint convert checkpoint.pth runs/rn50 --recipe resnet50 --data data/imagenet"
)
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A checkpoint or a run of ours; or a .pth file of torchvision's references, or DeepSpeed's directory."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="What to write: a file or a directory; to longhaul a run's directory.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the recipe, as key=value.")] = None,
    to: Annotated[str, typer.Option(help="longhaul, torchvision or deepspeed.")] = "longhaul",
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="To longhaul: the recipe with which training is to go on.")
    ] = None,
    data: DataOption = None,
    stage: Annotated[int, typer.Option(min=0, max=2, help="To deepspeed: of ZeRO.")] = 0,
    ranks: Annotated[int, typer.Option(min=1, help="To deepspeed, stages 1 and 2: how many will load it.")] = 1,
    trust: Annotated[
        bool, typer.Option("--trust", help="Run whatever code the source's files ask for: they are pickles.")
    ] = False,
    force: ForceOption = False,
    runs: RunsOption = Path("runs"),
) -> None:
    """Convert training checkpoints, weights with momentum, from and to torchvision's references and DeepSpeed.

    To longhaul a run is made that `longhaul train` of the same recipe, data and name goes on with; what happened before
    is not in its ledger, and `longhaul verify` says so.
    """
    from launch.checkpoint_convert import convert_from_longhaul, convert_to_longhaul

    if to == "longhaul":
        convert_to_longhaul(console, source, out, recipe, overrides or (), data, trust)
    else:
        convert_from_longhaul(console, source, out, to, data, stage, ranks, force, runs)
