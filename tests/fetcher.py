"""Processes that read a whole split at a URL through one cache; apart from the tests, to start without torch."""

import multiprocessing as mp
import time
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.cache import Cache
from data_pipeline.split import Split
from tests.s3 import Proxy

_CONTEXT = mp.get_context("spawn")


def start_fetchers(
    count: int, url: str, cache: Path, proxy: Proxy, bytes_per_second: int = 0, rounds: int = 1
) -> list[Any]:
    """Start processes that begin together, once all have the index, over connections of so many bytes a second (0: no
    limit), and read the split several times over, through caches of their own in `cache` where it is more than once."""
    barrier = _CONTEXT.Barrier(count + 1)
    processes = [_CONTEXT.Process(target=_read_all, args=(url, cache, barrier, rounds)) for _ in range(count)]
    for process in processes:
        process.start()
    while barrier.n_waiting < count:
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)
    proxy.bytes_per_second = bytes_per_second
    barrier.wait()
    return processes


def _read_all(url: str, cache: Path, barrier: Any, rounds: int) -> None:
    for number in range(rounds):
        split = Split(url, "train", Cache(cache if rounds == 1 else cache / str(number)))
        if number == 0:
            barrier.wait()
        for ids in np.array_split(np.arange(len(split)), 60):
            split.images(ids)
        split.close()
