"""Options that commands of several groups have, as typer declares them."""

from pathlib import Path
from typing import Annotated

import typer

RunsOption = Annotated[
    Path,
    typer.Option("--runs", envvar="LONGHAUL_RUNS", help="Where runs live; with several machines, storage they share."),
]
DataOption = Annotated[
    str | None,
    typer.Option("--data", help="The data set (made by `longhaul prepare`): a directory, or a URL (s3://...)."),
]
