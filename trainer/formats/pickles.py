"""Other programs' .pt and .pth files, which are pickles, read without running what is in them."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from configs import LonghaulError


class Inert:
    """Stands for a class whose instances are not needed: takes what the instance was made from, and does nothing."""

    def __new__(cls, *arguments: Any) -> "Inert":
        del arguments
        return super().__new__(cls)


def read_torch_file(path: Path, stand_ins: Mapping[str, type], trust: bool) -> dict[str, Any]:
    """The dictionary that `torch.save` wrote, on the CPU.

    Tensors, numbers, text and containers are read, and classes that `stand_ins` names ("module.Class"), in whose place
    come the types it gives. With `trust` everything is, which runs whatever code the file asks for.

    Raises LonghaulError where the file holds anything else, or cannot be read.
    """
    try:
        if trust:
            return _require_dictionary(path, torch.load(path, map_location="cpu", weights_only=False))
        with torch.serialization.safe_globals([(kind, name) for name, kind in stand_ins.items()]):
            return _require_dictionary(path, torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise LonghaulError(f"There is no file {path}.") from None
    except pickle.UnpicklingError:
        names = _names_in(path, stand_ins)
        what = f"names {', '.join(names)}, which could run code" if names else "is more than tensors and plain values"
        raise LonghaulError(
            f"{path} {what}, and was not read: give --trust to run whatever it asks for, if you trust who made it."
        ) from None
    except (RuntimeError, ValueError, EOFError, KeyError) as error:
        raise LonghaulError(f"{path} is not a file that torch.save wrote ({_first_line(error)}).") from None


def _require_dictionary(path: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise LonghaulError(f"{path} holds a {type(value).__name__}, not the dictionary of a training checkpoint.")
    return value


def _names_in(path: Path, stand_ins: Mapping[str, type]) -> list[str]:
    """What a file names that is not read; empty where it is in torch's old form, which cannot be looked into."""
    try:
        return [name for name in get_unsafe_globals_in_checkpoint(str(path)) if name not in stand_ins]
    except (ValueError, RuntimeError):
        return []


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
