"""Threads for work on images, one image a thread at a time."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch


class Threads:
    """A few threads whose torch operators use no further threads.

    Batches are shared out image by image instead: an image stays in one core's cache, and the threads of OpenMP, which
    wait for their next piece of work by spinning, take no time from those that decode.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        # The other threads of the process keep the number that they have, and new ones get it.
        before = torch.get_num_threads()
        all_started = threading.Barrier(number + 1)
        self._pool = ThreadPoolExecutor(number, "images", initializer=_use_no_further_threads)
        for _ in range(number):
            self._pool.submit(all_started.wait)
        all_started.wait()
        torch.set_num_threads(before)

    def each(self, count: int, act: Callable[[int], None]) -> None:
        """Call `act` with every number below `count`; returns when all are done."""

        def share(first: int) -> None:
            for i in range(first, count, self._number):
                act(i)

        list(self._pool.map(share, range(self._number)))


@cache
def image_threads(number: int) -> Threads:
    """Those of this process: training and every evaluation share them, so that none is left over."""
    return Threads(number)


def _use_no_further_threads() -> None:
    torch.get_num_threads()  # a thread's first call takes the process's number over, and must not come later
    torch.set_num_threads(1)
