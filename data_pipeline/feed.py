"""What DALI is fed: the batches of a split, verified, prepared a little ahead by threads of their own."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from configs import LonghaulError
from data_pipeline.philox import uniforms
from data_pipeline.pipeline import PREFETCH
from data_pipeline.split import Split

_AHEAD = 3  # batches; checking them also brings them into memory from the disk
_TRIES, _TRIES_IN_SHARD = 1_000, 100
_SUBSTITUTE = 0xFFF0  # a purpose of `philox.uniforms`, apart from those of `augment`


@dataclass(frozen=True)
class Sound:
    """Samples whose bytes are those that were ingested.

    Attributes:
        ids: int64 [n], the samples to show; another than was asked for where that one is damaged.
        images: for each, the mapped bytes: JPEG, uint8 [bytes], or pixels, uint8 [height, width, 3].
    """

    ids: NDArray[np.int64]
    images: list[NDArray[np.uint8]]


def sound(split: Split, ids: NDArray[np.int64], damaged: Literal["fail", "substitute"]) -> Sound:
    """Check samples against their checksums. One that is damaged raises LonghaulError, or is replaced by a sound one:
    the first of a pseudo-random sequence that its id gives, so that it is the same whoever looks."""
    for _ in range(2):  # what is damaged in the cache of a remote data set is fetched again
        images = split.images(ids)
        bad = split.damaged(ids, images)
        if not bad:
            return Sound(ids, images)
    if damaged == "fail":
        raise LonghaulError(
            f"{split.where(int(ids[bad[0]]))} does not have the bytes that were written: prepare the data set "
            f"again, or set input.damaged=substitute to go on with another sample in its place."
        )
    shown = ids.copy()
    for place in bad:
        shown[place] = _substitute(split, int(ids[place]))
    return Sound(shown, split.images(shown))


def _substitute(split: Split, sample: int) -> int:
    """Of the same shard if one can be found there: of remote shards no other may be at hand."""
    shard = split.shard_of(sample)
    rows, end = split.shards[shard].rows, int(split.shard_ends[shard])
    for attempt in range(_TRIES):
        first, count = (end - rows, rows) if attempt < _TRIES_IN_SHARD else (0, len(split))
        drawn = uniforms(0, attempt, np.array([sample], np.uint64), _SUBSTITUTE)[0, 0]
        candidate = np.array([first + int(drawn * count)])
        if not split.damaged(candidate, split.images(candidate)):
            return int(candidate[0])
    raise LonghaulError(f"Hardly a sample of {split.location} has the bytes that were written: prepare it again.")


class Feed:
    """The source of a DALI pipeline: `prepare(i)` gives the samples of batch i and what else the pipeline is told.

    DALI is given views and keeps no reference to them (no_copy), so the last few batches are kept here.
    """

    def __init__(self, count: int, prepare: Callable[[int], tuple[Sound, tuple[Any, ...]]]) -> None:
        self._count, self._prepare = count, prepare
        self._next = 0
        self._coming: deque[Future[tuple[Sound, tuple[Any, ...]]]] = deque()
        self._given: deque[tuple[Sound, tuple[Any, ...]]] = deque(maxlen=PREFETCH + 4)
        self._threads = ThreadPoolExecutor(_AHEAD, "feed")

    def __call__(self, index: int) -> tuple[Any, ...]:
        """What DALI is given for batch `index`: the images first. It asks in order."""
        while self._next < min(index + 1 + _AHEAD, self._count):
            self._coming.append(self._threads.submit(self._prepare, self._next))
            self._next += 1
        if not self._coming:
            raise StopIteration
        samples, others = self._coming.popleft().result()
        self._given.append((samples, others))
        return samples.images, *others

    def recent(self) -> list[tuple[int, NDArray[np.uint8]]]:
        """(sample id, image) of the last batches."""
        return [pair for samples, _ in self._given for pair in zip(samples.ids.tolist(), samples.images, strict=True)]

    def close(self) -> None:
        """Stop preparing."""
        self._threads.shutdown(wait=True, cancel_futures=True)
