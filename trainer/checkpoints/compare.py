"""Whether two checkpoints are equal, bit for bit, and where they are not by how much."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """What differs under one name.

    Attributes:
        what: "only in the first", "only in the second", or a form of the two (shape, dtype) where these differ;
            "" where values do, and then:
        num_different: elements that have other bits, of `num_elements`.
        largest_absolute: the largest |a - b|; NaN where one of the two is.
        largest_relative: the largest |a - b| / max(|a|, |b|).
        largest_ulps: the largest number of representable values from a to b; None where they are integers.
    """

    name: str
    what: str
    num_elements: int = 0
    num_different: int = 0
    largest_absolute: float = 0.0
    largest_relative: float = 0.0
    largest_ulps: int | None = None


def compare_states(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[Difference]:
    """What differs between two states, in order of name; nothing where they are equal bit for bit."""
    found = []
    for name in sorted(first.keys() | second.keys()):
        if name not in second:
            found.append(Difference(name, "only in the first"))
        elif name not in first:
            found.append(Difference(name, "only in the second"))
        elif _form(first[name]) != _form(second[name]):
            found.append(Difference(name, f"{_form(first[name])} and {_form(second[name])}"))
        elif not equal_bits(first[name], second[name]):
            found.append(_difference(name, first[name], second[name]))
    return found


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype and shape have the same bits: NaN equals itself, 0.0 does not equal -0.0."""
    return torch.equal(_bits(a), _bits(b))


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many representable values lie from each element of `a` to that of `b`, int64 (modulo 2**64 for float64);
    floating point of one dtype and shape. 0.0 and -0.0 are the same value."""
    return (_ordered(a) - _ordered(b)).abs()


def _difference(name: str, a: Tensor, b: Tensor) -> Difference:
    absolute = (a.double() - b.double()).abs()
    relative = absolute / torch.maximum(a.double().abs(), b.double().abs())
    return Difference(
        name=name,
        what="",
        num_elements=a.numel(),
        num_different=int((_bits(a) != _bits(b)).sum()),
        largest_absolute=float(absolute.max()),
        # 0 / 0 is no difference, unless a NaN was compared
        largest_relative=float(torch.where(absolute == 0, 0.0, relative).max()),
        largest_ulps=int(ulps(a, b).max()) if a.is_floating_point() else None,
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_BITS[tensor.element_size()])


def _ordered(tensor: Tensor) -> Tensor:
    """The bits of floating-point numbers as integers in the same order as the numbers."""
    bits = _bits(tensor)
    magnitude = (bits & torch.iinfo(bits.dtype).max).long()
    return torch.where(bits < 0, -magnitude, magnitude)


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
