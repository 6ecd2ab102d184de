"""Progress bars and tables that several commands share."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from data_pipeline.findings import Finding


def bar(console: Console) -> Progress:
    """A progress bar with speed and time left; nothing where the output is not a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(show_speed=True),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def findings_table(findings: list[Finding]) -> Table:
    """A row for each finding: yes or NO, what, and the figures."""
    table = Table(show_header=False, box=None)
    for _ in range(3):
        table.add_column(overflow="fold")
    for finding in findings:
        table.add_row("[green]yes" if finding.holds else "[bold red]NO", finding.what, finding.figures)
    return table
