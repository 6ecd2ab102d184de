"""`longhaul checkpoint ls`, `show`, `verify` and `diff`."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from configs import LonghaulError
from data_pipeline.findings import Finding
from launch.commands import find_run
from launch.options import choose_groups, find_target
from launch.tables import findings_table
from launch.view import shown_path

if TYPE_CHECKING:
    from trainer.checkpoints.compare import Difference
    from trainer.checkpoints.inventory import Entry
    from trainer.checkpoints.manifest import Saved

_MOST_SHOWN = 20  # differences
_LOG_WIDTH = 300  # characters


def show_list(console: Console, name: str, verify: bool, as_json: bool, runs: Path) -> None:
    """`longhaul checkpoint ls`."""
    from trainer.checkpoints.inventory import list_checkpoints

    run = find_run(name, runs)
    entries = list_checkpoints(run, verify)
    if as_json:
        print(json.dumps([asdict(entry) for entry in entries], indent=1))
        return
    if not entries:
        console.print(f"{run.store()} holds no checkpoint.", highlight=False)
        return
    table = _table("name", "step", "epoch", "saved", "size", "workers", "top-1", "state")
    for entry in entries:
        table.add_row(*_cells(entry, verify))
    _print(console, table)


def show_checkpoint(console: Console, target: str, tensors: bool, as_json: bool, runs: Path) -> None:
    """`longhaul checkpoint show`."""
    from trainer.checkpoints.inventory import bytes_by_group, bytes_by_rank, tensor_facts

    saved = _open(target, runs)
    groups, ranks = bytes_by_group(saved), bytes_by_rank(saved)
    facts = tensor_facts(saved) if tensors else None
    if as_json:
        found: dict[str, Any] = {
            "path": str(saved),
            "manifest": saved.manifest,
            "groups": {group: {"tensors": count, "bytes": size} for group, (count, size) in groups.items()},
            "bytes_by_rank": ranks,
            **({} if facts is None else {"tensors": [asdict(fact) for fact in facts]}),
        }
        print(json.dumps(found, indent=1))
        return
    console.print(f"{shown_path(str(saved))}", highlight=False)
    facts_table = _table("", "", header=False)
    for key, value in saved.manifest.items():
        if key != "files":
            facts_table.add_row(key, value if isinstance(value, str) else json.dumps(value))
    _print(console, facts_table)
    group_table = _table("group", "tensors", "size")
    for group, (count, size) in groups.items():
        group_table.add_row(group, f"{count:,}", _size(size))
    _print(console, group_table)
    file_table = _table("file", "size", "SHA-256")
    for file, mark in saved.manifest["files"].items():
        file_table.add_row(file, _size(mark["bytes"]), mark["sha256"])
    _print(console, file_table)
    shares = ", ".join(f"{rank}: {_size(size)}" for rank, size in ranks.items())
    console.print(f"written by rank: {shares}", highlight=False)
    if facts is not None:
        tensor_table = _table("tensor", "shape", "dtype", "size", "norm")
        for fact in facts:
            shape = " x ".join(map(str, fact.shape)) or "scalar"
            tensor_table.add_row(fact.name, shape, fact.dtype, _size(fact.num_bytes), f"{fact.norm:.6g}")
        _print(console, tensor_table)


def verify_checkpoints(console: Console, targets: list[str], every: bool, runs: Path) -> None:
    """`longhaul checkpoint verify`."""
    from trainer.checkpoints.manifest import open_valid

    findings = []
    for target in targets:
        run, chosen = find_target(target, runs)
        store = run.store()
        names = store.names() if chosen is None else [chosen]
        if not names:
            raise LonghaulError(f"{store} holds no checkpoint.")
        for name in names if every else names[-1:]:
            where = shown_path(store.locate(name))
            try:
                saved = open_valid(store, name)
                size = sum(mark["bytes"] for mark in saved.manifest["files"].values())
                findings.append(Finding(where, True, f"{_size(size)} in {len(saved.manifest['files'])} files"))
            except LonghaulError as error:
                findings.append(Finding(where, False, str(error)))
    _print(console, findings_table(findings))
    if not all(finding.holds for finding in findings):
        raise typer.Exit(1)


def show_difference(
    console: Console, first: str, second: str, only: str | None, ignore: str | None, as_json: bool, runs: Path
) -> None:
    """`longhaul checkpoint diff`."""
    from trainer.checkpoints.compare import compare_states
    from trainer.checkpoints.inventory import read_state

    chosen, ignored = choose_groups(only), choose_groups(ignore)
    one, other = (read_state(_open(target, runs), chosen, ignored) for target in (first, second))
    found = compare_states(one, other)
    if as_json:
        print(json.dumps({"equal": not found, "differences": [asdict(difference) for difference in found]}, indent=1))
    elif not found:
        size = sum(tensor.nbytes for tensor in one.values())
        console.print(f"[green]Equal[/green] bit for bit: {len(one):,} tensors, {_size(size)}.", highlight=False)
    else:
        _print(console, _difference_table(found))
        more = f" ({len(found) - _MOST_SHOWN:,} more: --json has all)" if len(found) > _MOST_SHOWN else ""
        console.print(
            f"[yellow]Different[/yellow]: {len(found):,} of {len(one.keys() | other.keys()):,} tensors{more}.",
            highlight=False,
        )
    if found:
        raise typer.Exit(1)


def _open(target: str, runs: Path) -> "Saved":
    from trainer.weights import choose_checkpoint

    run, name = find_target(target, runs)
    return choose_checkpoint(run, name)


def _difference_table(found: "list[Difference]") -> Table:
    table = _table("tensor", "elements", "absolute", "relative", "ULPs")
    for entry in found[:_MOST_SHOWN]:
        if entry.what:
            table.add_row(entry.name, entry.what, "", "", "")
            continue
        count = f"{entry.num_different:,} of {entry.num_elements:,}"
        ulps = "" if entry.largest_ulps is None else f"{entry.largest_ulps:,}"
        table.add_row(entry.name, count, f"{entry.largest_absolute:.3g}", f"{entry.largest_relative:.3g}", ulps)
    return table


def _cells(entry: "Entry", verified: bool) -> list[str]:
    state = entry.problem or ("set aside" if entry.aside else "whole" if verified else "")
    return [
        entry.name,
        _or_nothing(entry.step, ","),
        _or_nothing(entry.epoch, ".2f"),
        "" if entry.saved_at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.saved_at)),
        "" if entry.num_bytes is None else _size(entry.num_bytes),
        _or_nothing(entry.workers, ","),
        _or_nothing(entry.score, ".2%"),
        state,
    ]


def _or_nothing(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e5 else f"{num_bytes:,} bytes"


def _print(console: Console, table: Table) -> None:
    """In a log names are not broken to the width of a terminal that is not there."""
    (console if console.is_terminal else Console(file=console.file, width=_LOG_WIDTH)).print(table)


def _table(*columns: str, header: bool = True) -> Table:
    table = Table(show_header=header, box=None)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
