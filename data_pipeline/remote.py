"""The shards of a split on remote storage, fetched into the cache ahead of the order in which they are read."""

import os
import random
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from itertools import cycle

from data_pipeline.cache import Cache
from data_pipeline.mapped import Mapped
from data_pipeline.shards import Shard
from data_pipeline.storage import Store

_THREADS = 8
_SEQUENTIAL = 4  # shards of a window where a split is read from its beginning to its end


class RemoteShards:
    """Maps the shards of the window being read and of the one after it, and no others.

    Reading goes forward through the windows: the first batch that needs a shard of a later one closes what lies before
    it. Views of a closed shard stay valid, as each holds the mapping that it looks into.

    Attributes:
        wait_seconds: how long batches have waited for shards so far.
    """

    def __init__(self, store: Store, shards: Sequence[Shard], cache: Cache) -> None:
        self._store, self._shards, self._cache = store, shards, cache
        ends = [0]
        for shard in shards:
            ends.append(ends[-1] + shard.rows)
        self._firsts = ends[:-1]
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="shards")
        self._lock = threading.Lock()
        self._opened: dict[int, Future[Mapped]] = {}
        self.wait_seconds = 0.0
        self.follow(cycle(sequential_windows(len(shards))))

    def follow(self, windows: Iterable[Sequence[int]]) -> None:
        """Expect batches from these windows, each a set of shards, in this order. Nothing is fetched yet."""
        with self._lock:
            self._windows: Iterator[Sequence[int]] = iter(windows)
            self._passed: Sequence[int] = ()
            self._current: Sequence[int] = ()
            self._next: Sequence[int] = next(self._windows, ())

    def batch(self, shards: Sequence[int]) -> dict[int, Mapped]:
        """The given shards, mapped, after waiting for those that are not here yet. Raises LonghaulError where one
        cannot be had."""
        began = time.monotonic()
        with self._lock:
            self._advance(set(shards))
            pending = {shard: self._open(shard) for shard in shards}
        mapped = {shard: future.result() for shard, future in pending.items()}
        with self._lock:
            wanted = {*self._current, *self._next}
            self._opened = {shard: future for shard, future in self._opened.items() if shard in wanted}
        self.wait_seconds += time.monotonic() - began
        return mapped

    def fetch(self) -> None:
        """Begin to fetch the first window and the one after it."""
        with self._lock:
            self._advance(set(self._next))

    def fetched_bytes(self) -> int:
        """Bytes of the shards that are mapped now. Raises LonghaulError where one could not be had."""
        with self._lock:
            done = [shard for shard, future in self._opened.items() if future.done() and future.result() is not None]
        return sum(self._shards[shard].bytes for shard in done)

    def forget(self, shards: Iterable[int]) -> None:
        """Drop shards whose bytes turned out to be damaged; they are fetched again when they are wanted next."""
        for shard in set(shards):
            self._cache.forget(self._shards[shard])
            with self._lock:
                self._opened.pop(shard, None)

    @property
    def traffic(self) -> dict[str, int]:
        """Sums so far, of this process: what was fetched, found in the cache, evicted, and tried again."""
        return {**asdict(self._cache.traffic), "retries": self._store.retries}

    def close(self) -> None:
        """Stop fetching. Views that were given out stay valid."""
        self._store.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._opened.clear()

    def _advance(self, shards: set[int]) -> None:
        """Go on to the window that holds those of `shards` that the current one does not; a batch may span several.
        What only the window just left holds is a late batch's, and no reason to go on."""
        missing = shards - set(self._current)
        if not missing:
            return
        while self._next and (missing - set(self._passed) or missing & set(self._next)):
            self._passed, self._current, self._next = self._current, self._next, next(self._windows, ())
            missing -= set(self._current) | set(self._passed)
        for window in (self._current, self._next):
            # In an order of this process's own, so that those of one machine share the work.
            for shard in random.Random(os.getpid()).sample(window, len(window)):
                self._open(shard)

    def _open(self, shard: int) -> Future[Mapped]:
        future = self._opened.get(shard)
        if future is None or (future.done() and future.exception() is not None):  # the store may be back
            future = self._opened[shard] = self._pool.submit(self._map, shard)
        return future

    def _map(self, number: int) -> Mapped:
        shard, first = self._shards[number], self._firsts[number]
        return self._cache.read(self._store, shard, lambda path: Mapped(path, shard.rows, first))


def sequential_windows(num_shards: int) -> list[Sequence[int]]:
    """The windows of a split that is read from its beginning to its end."""
    return [range(first, min(first + _SEQUENTIAL, num_shards)) for first in range(0, num_shards, _SEQUENTIAL)]


def two_windows_bytes(shards: Sequence[Shard], shards_per_window: int) -> int:
    """The most that two windows, the one being read and the next, can take."""
    return sum(sorted((shard.bytes for shard in shards), reverse=True)[: 2 * shards_per_window])
