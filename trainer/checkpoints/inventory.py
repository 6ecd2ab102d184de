"""What is in a checkpoint, and which a run has: the facts that `longhaul checkpoint ls` and `show` tell."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs import LonghaulError
from trainer.checkpoints.files import contents, load
from trainer.checkpoints.manifest import Saved, open_checkpoint, problem_of
from trainer.checkpoints.store import DirectoryStore, Store
from trainer.rundir import RunDirectory

GROUPS = ("model", "momentum", "optimizer", "ema", "guard", "loss_scale", "ledger", "progress")


@dataclass(frozen=True)
class Entry:
    """A checkpoint of a run.

    Attributes:
        step, epoch, num_bytes, workers: None where the manifest cannot be read.
        saved_at: seconds since 1970, where the run's events tell.
        score: share of held-out images whose top-1 prediction was correct, where the manifest has it.
        problem: why it cannot be used, in words; None where nothing was found (its files are read only if asked for).
        aside: whether it was set aside, as broken or abandoned.
    """

    name: str
    step: int | None
    epoch: float | None
    saved_at: float | None
    num_bytes: int | None
    workers: int | None
    score: float | None
    problem: str | None
    aside: bool = False


@dataclass(frozen=True)
class TensorFacts:
    """A tensor of a checkpoint; `norm` is its L2 norm."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    norm: float


def list_checkpoints(run: RunDirectory, verify: bool) -> list[Entry]:
    """Those of a run, oldest first, and then those that were set aside; `verify` reads every byte."""
    store = run.store()
    times = {Path(e["path"]).name: e["time"] for e in run.events() if e["event"] == "checkpoint"}
    entries = [_entry(store, name, times.get(name), verify) for name in store.names()]
    return entries + [_entry(store, name, None, verify=False, aside=True) for name in _aside(store)]


def group_of(name: str) -> str:
    """Which of `GROUPS` a tensor belongs to."""
    if name.startswith("optim."):
        return "momentum" if name.endswith(".momentum_buffer") else "optimizer"
    return name.partition(".")[0]


def read_state(saved: Saved, only: Iterable[str] = (), ignore: Iterable[str] = ()) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by name, whole, on the CPU; `only` and `ignore` name groups. Raises LonghaulError
    where there is no such group, or nothing is left."""
    chosen, ignored = set(only), set(ignore)
    for group in sorted(chosen | ignored):
        if group not in GROUPS:
            raise LonghaulError(f"There is no group of tensors '{group}': they are {', '.join(GROUPS)}.")
    state = {
        name: tensor
        for name, tensor in sorted(contents(saved).items())
        if (not chosen or group_of(name) in chosen) and group_of(name) not in ignored
    }
    if not state:
        raise LonghaulError(f"{saved} has no tensors of the groups that are asked for: {', '.join(sorted(chosen))}.")
    load(saved, state)
    return state


def bytes_by_group(saved: Saved) -> dict[str, tuple[int, int]]:
    """For each group its number of tensors and of bytes."""
    found: dict[str, tuple[int, int]] = {}
    for name, tensor in contents(saved).items():
        count, size = found.get(group_of(name), (0, 0))
        found[group_of(name)] = (count + 1, size + tensor.nbytes)
    return {group: found[group] for group in sorted(found, key=_place)}


def bytes_by_rank(saved: Saved) -> dict[int, int]:
    """How many bytes each rank wrote, of those that wrote tensors."""
    written: dict[int, int] = {}
    for file, mark in saved.manifest["files"].items():
        rank = re.fullmatch(r"__(\d+)_\d+\.distcp", file)
        if rank is not None:
            written[int(rank[1])] = written.get(int(rank[1]), 0) + mark["bytes"]
    return dict(sorted(written.items()))


def tensor_facts(saved: Saved) -> list[TensorFacts]:
    """Every tensor, in order of name."""
    return [
        TensorFacts(
            name,
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            tensor.nbytes,
            float(torch.linalg.vector_norm(tensor.double())),
        )
        for name, tensor in read_state(saved).items()
    ]


def num_bytes(saved: Saved) -> int:
    """The size of a checkpoint's files, without the manifest."""
    return sum(mark["bytes"] for mark in saved.manifest["files"].values())


def _place(group: str) -> float:
    return GROUPS.index(group) if group in GROUPS else math.inf


def _entry(store: Store, name: str, saved_at: float | None, verify: bool, aside: bool = False) -> Entry:
    try:
        saved = open_checkpoint(store, name)
    except LonghaulError as error:
        return Entry(name, None, None, saved_at, None, None, None, str(error), aside)
    manifest: dict[str, Any] = saved.manifest
    score = manifest.get("score")
    return Entry(
        name, saved.step, manifest["epoch"], saved_at, num_bytes(saved), manifest["world_size"],
        score and score["num_top1"] / score["num_images"], problem_of(saved) if verify else None, aside,
    )  # fmt: skip


def _aside(store: Store) -> list[str]:
    """What was set aside, where the store can list it."""
    if not isinstance(store, DirectoryStore):
        return []
    return sorted(path.name for why in ("broken", "abandoned") for path in store.path.glob(f"{why}-step-*"))
