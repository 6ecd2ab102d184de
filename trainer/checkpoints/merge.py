"""A whole checkpoint, weights and everything else, as one file that other programs read."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs import LonghaulError
from trainer.atomic import replacing
from trainer.checkpoints.compare import compare_states
from trainer.checkpoints.manifest import Saved
from trainer.rundir import RunDirectory

_Write = Callable[[dict[str, Tensor], dict[str, str], Path], None]
_Read = Callable[[Path], dict[str, Tensor]]


def merge(state: dict[str, Tensor], metadata: dict[str, str], out: Path, force: bool) -> None:
    """Write tensors by name, and text by key, at `out`: a .safetensors file, or a .pt file of
    {"tensors": ..., "metadata": ...} for `torch.load(weights_only=True)`.

    What was written is read again and compared bit for bit before it gets its name. Raises LonghaulError where `out`
    has another suffix, exists and is not to be overwritten (`force`), or does not hold what was written.
    """
    if out.suffix not in _FORMS:
        raise LonghaulError(f"{out}: name a file that ends in {' or '.join(_FORMS)}.")
    if out.exists() and not force:
        raise LonghaulError(f"{out} exists: give --force to write over it, or another name.")
    write, read = _FORMS[out.suffix]
    with replacing(out) as temporary:
        write(state, metadata, temporary)
        wrong = compare_states(state, read(temporary))
        if wrong:
            raise LonghaulError(f"What was written for {out} differs in {wrong[0].name}, and was removed: try again.")


def describe(run: RunDirectory, saved: Saved) -> dict[str, str]:
    """Where a checkpoint is from, as text by key."""
    return {
        "longhaul_version": importlib.metadata.version("longhaul"),
        "run": run.name,
        "step": str(saved.step),
        "epoch": str(saved.manifest["epoch"]),
        "num_classes": str(saved.manifest["num_classes"]),
        "recipe": run.recipe().model_dump_json(),
        "recipe_sha256": run.recipe_sha256(),
    }


def _write_safetensors(state: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    save_file(state, path, {"format": "pt", **metadata})


def _write_torch(state: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    torch.save({"tensors": state, "metadata": metadata}, path)


def _read_torch(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)["tensors"]


_FORMS: dict[str, tuple[_Write, _Read]] = {
    ".safetensors": (_write_safetensors, load_file),
    ".pt": (_write_torch, _read_torch),
}
