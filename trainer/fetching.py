"""Remote data in a run: what must fit into the cache, what is fetched before the first step, and what operators see."""

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs import LonghaulError
from data_pipeline.cache import Cache, readable
from data_pipeline.order import Order, WindowedOrder
from data_pipeline.remote import sequential_windows, two_windows_bytes
from data_pipeline.split import Split
from trainer.group import Group
from trainer.telemetry import Telemetry

_REPORT_SECONDS = 5.0


def require_room(train: Split, val: Split | None, order: Order, cache: Cache) -> None:
    """Raise LonghaulError where the cache cannot hold what `order` needs at a time."""
    held_out = 0 if val is None else two_windows_bytes(val.shards, len(sequential_windows(len(val.shards))[0]))
    indexes = sum(index.bytes for index in train.manifest.indexes.values())
    room = cache.limit - held_out - indexes
    whole = sum(shard.bytes for shard in train.shards)
    if isinstance(order, WindowedOrder):
        needed = two_windows_bytes(train.shards, order.shards_per_window)
        what = f"order.shards={order.shards_per_window} keeps two windows of the data set"
        mend = f"set order.shards to {max(room * len(train.shards) // (2 * whole), 1)} or less"
    else:
        needed = whole
        what = "order.kind=global, under which every batch needs every shard, keeps the whole training split"
        mend = "set order.kind=windowed"
    if needed > room:
        raise LonghaulError(
            f"{what} in the cache {cache.directory}: {readable(needed)} beside {readable(held_out + indexes)} of other "
            f"files, more than its limit of {readable(cache.limit)}; {mend}, or give a larger --cache-bytes."
        )


def warn_of_sorted_shards(train: Split, order: Order, telemetry: Telemetry) -> None:
    """A windowed order mixes the classes of a few shards only, so these must hold all classes."""
    if not isinstance(order, WindowedOrder) or order.shards_per_window >= len(train.shards):
        return
    known = train.manifest.shuffled
    if known is False or (known is None and is_sorted(train.labels)):
        telemetry.event(
            "warning",
            message=f"The shards of {train.manifest.name} hold few classes each, and order.kind=windowed mixes "
            f"{order.shards_per_window} of {len(train.shards)} shards at a time: batches will lack most classes. "
            f"Prepare the data set again, shuffled, or set order.kind=global.",
        )


def is_sorted(labels: NDArray[np.int32]) -> bool:
    """Whether neighbours in a data set have the same label much more often than strangers do."""
    shares = np.bincount(labels) / len(labels)
    by_chance = float((shares**2).sum())
    alike = float((labels[1:] == labels[:-1]).mean()) if len(labels) > 1 else by_chance
    return alike > (1 + by_chance) / 2


def fetch_ahead(
    train: Split, order: Order, first_step: int, last_step: int, group: Group, telemetry: Telemetry
) -> None:
    """Let shards be fetched in the order of steps [first_step, last_step); under a global order wait for all of them,
    on every machine. Called by all ranks together; does nothing where the data is a local directory."""
    if train.remote is None or first_step >= last_step:
        return
    if isinstance(order, WindowedOrder):
        train.remote.follow(order.windows(first_step, last_step))
        train.remote.fetch()
        return
    train.remote.follow([range(len(train.shards))])
    train.remote.fetch()
    total = sum(shard.bytes for shard in train.shards)
    told = 0.0
    while True:
        done = min(group.gather(train.remote.fetched_bytes()))  # no rank waits long enough to be given up
        if done == total or time.monotonic() - told >= _REPORT_SECONDS:
            told = time.monotonic()
            telemetry.event("fetching", bytes=done, total_bytes=total)
        if done == total:
            return
        time.sleep(0.5)


class FetchMeter:
    """What was fetched since the last report, on all ranks; the first report tells of all before the first step too."""

    def __init__(self, split: Split, group: Group) -> None:
        self._split, self._group = split, group
        self._before = dict.fromkeys(self._now(), 0.0)

    def report(self, steps: int) -> dict[str, float]:
        """Figures for a step event, none where the data is local; called by all ranks together. `shard_wait_seconds`
        is the slowest worker's, a step; the others are sums over all workers."""
        if self._split.remote is None:
            return {}
        now = self._now()
        since = {name: value - self._before[name] for name, value in now.items()}
        self._before = now
        every: list[dict[str, Any]] = self._group.gather(since)
        waited = max(figures.pop("wait_seconds") for figures in every)
        sums = {f"shard_{name}": sum(figures[name] for figures in every) for name in every[0]}
        return {"shard_wait_seconds": waited / steps, **sums}

    def _now(self) -> dict[str, float]:
        remote = self._split.remote
        return {} if remote is None else {"wait_seconds": remote.wait_seconds, **remote.traffic}
