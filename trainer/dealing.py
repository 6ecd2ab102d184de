"""Who computes which micro-batch: the only thing about a step that the cluster decides. Pure functions."""

from collections.abc import Sequence


def deal(num_micro: int, world_size: int, rank: int) -> range:
    """The micro-batches of `rank`: contiguous, the first ranks one more where it does not divide.

    Rank 0 always has micro-batch 0, whose batch-norm statistics count.
    """
    if not 0 <= rank < world_size <= num_micro:
        raise ValueError(f"cannot deal {num_micro} micro-batches to rank {rank} of {world_size}")
    share, more = divmod(num_micro, world_size)
    first = rank * share + min(rank, more)
    return range(first, first + share + (rank < more))


class Work(Sequence[tuple[int, int]]):
    """The (step, micro-batch) pairs that a rank computes from `first_step` to `last_step`, made when asked for."""

    def __init__(self, first_step: int, last_step: int, micros: range) -> None:
        self._first, self._micros = first_step, micros
        self._length = max(last_step - first_step, 0) * len(micros)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # slices are not needed
        if not 0 <= index < self._length:
            raise IndexError(index)
        step, micro = divmod(index, len(self._micros))
        return self._first + step, self._micros[micro]
