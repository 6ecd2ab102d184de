"""Memory for batches on the CPU, used again once nobody holds it."""

import sys

import numpy as np
import torch
from numpy.typing import NDArray


class Buffers:
    """Gives float32 tensors out of memory that earlier ones gave up.

    An allocation of more than 32 MB goes to the kernel and back each time, and clearing its pages anew costs several
    times what normalising a batch does. A tensor made from a NumPy array holds a reference to it for as long as
    anything (a view, the autograd graph) holds the tensor's memory: that tells when it is free.
    """

    def __init__(self) -> None:
        self._arrays: list[NDArray[np.float32]] = []

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """A float32 tensor of this shape, of unknown contents."""
        for i in range(len(self._arrays)):
            if self._arrays[i].shape == shape and sys.getrefcount(self._arrays[i]) == _FREE:
                return torch.from_numpy(self._arrays[i])
        # Of another size than before: the others will hardly be asked for again.
        self._arrays = [array for array in self._arrays if array.shape == shape]
        self._arrays.append(np.empty(shape, np.float32))
        return torch.from_numpy(self._arrays[-1])


def _references_of_a_listed_array() -> int:
    arrays = [np.empty(0)]
    return sys.getrefcount(arrays[0])


_FREE = _references_of_a_listed_array()
