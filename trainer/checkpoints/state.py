"""The canonical state of a run: tensors by name, each whole on a rank or spread over all of them in pieces."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


@dataclass(frozen=True)
class Box:
    """A box of a tensor, and where in a piece its elements begin."""

    offsets: torch.Size
    sizes: torch.Size
    at: int

    @property
    def count(self) -> int:
        return math.prod(self.sizes)


@dataclass(frozen=True)
class Piece:
    """What one rank holds of a tensor: a run of elements of its row-major form, whatever way they are laid out.

    Every way in which an engine spreads a tensor comes to this: rows of it (FSDP2), or a stretch of all parameters laid
    end to end (ZeRO). Saved and read as boxes of the whole tensor by torch.distributed.checkpoint (DCP), whose protocol
    for such objects the methods with underscores are.

    Attributes:
        shape: of the whole tensor.
        start: the place of the first element held here in the whole tensor's row-major form.
        values: the elements, 1-D and contiguous; shares memory with the engine.
    """

    shape: torch.Size
    start: int
    values: Tensor

    def size(self) -> torch.Size:
        """The shape of the whole tensor."""
        return self.shape

    def view(self, offsets: torch.Size) -> Tensor:
        """The box that begins at `offsets`, as a view of the values."""
        box = next(box for box in boxes(self.shape, self.start, self.values.numel()) if box.offsets == offsets)
        return self.values[box.at : box.at + box.count].view(box.sizes)

    def __create_write_items__(self, name: str, itself: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.values)
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(box.offsets, box.sizes) for box in boxes(self.shape, self.start, self.values.numel())
        ]


State = dict[str, Tensor | Piece]


def boxes(shape: torch.Size, start: int, length: int) -> Iterator[Box]:
    """Boxes, each contiguous in memory, that together are the elements `start` to `start + length` of the row-major
    form of a tensor; at most 2 d - 1 of them for d dimensions."""
    at = 0
    while length > 0:
        dimension, rows = _largest(shape, start, length)
        below = math.prod(shape[dimension + 1 :])
        index = _index(shape, start)
        sizes = (1,) * dimension + (rows,) + tuple(shape[dimension + 1 :])
        yield Box(torch.Size(index), torch.Size(sizes), at)
        start, length, at = start + rows * below, length - rows * below, at + rows * below


def _largest(shape: torch.Size, start: int, length: int) -> tuple[int, int]:
    """The outermost dimension in which a box can begin at `start`, and its number of rows there."""
    for dimension in range(len(shape)):
        below = math.prod(shape[dimension + 1 :])
        if start % below == 0 and length >= below:
            left_in_row = shape[dimension] - start // below % shape[dimension]
            return dimension, min(length // below, left_in_row)
    raise AssertionError("the last dimension's rows are single elements")


def _index(shape: torch.Size, place: int) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        place, at = divmod(place, size)
        index.append(at)
    return tuple(reversed(index))


def empty_like(state: State) -> State:
    """CPU tensors and pieces of the same form, contiguous whatever the memory format: the canonical form is logical
    NCHW. Their contents are undefined. What is like a GPU's is pinned: copies then run beside the computation."""
    return {name: _on_cpu(part) for name, part in state.items()}


def copy_into(target: State, source: State) -> None:
    """Copy every tensor and piece of `source` into its like in `target`; from a GPU into pinned memory without waiting:
    the copies are done when what the current stream has been given so far is."""
    for name, part in source.items():
        values(target[name]).copy_(values(part), non_blocking=True)


def values(part: Tensor | Piece) -> Tensor:
    """The elements that are held here."""
    return part.values if isinstance(part, Piece) else part


def num_bytes(state: State) -> int:
    """What is held here, in bytes."""
    return sum(values(part).numel() * values(part).element_size() for part in state.values())


def _on_cpu(part: Tensor | Piece) -> Tensor | Piece:
    held = values(part)
    empty = torch.empty(held.shape, dtype=held.dtype, pin_memory=held.is_cuda)
    return Piece(part.shape, part.start, empty) if isinstance(part, Piece) else empty
