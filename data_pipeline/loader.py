"""Batches on the device, in an order given from outside and prefetched."""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from configs import LonghaulError
from configs.schema import Input, PadCrop
from data_pipeline.augment import augment
from data_pipeline.direct import Regions, direct_batches, is_direct, raw_regions
from data_pipeline.distort import distortion_inputs
from data_pipeline.erasing import erase
from data_pipeline.feed import Feed, Sound, sound
from data_pipeline.normalise import Normaliser
from data_pipeline.pipeline import decoded_shapes, evaluation_pipeline, options, region_pipeline, training_pipeline
from data_pipeline.records import EPOCH, SHOWN, training_records
from data_pipeline.resolution import size_at
from data_pipeline.split import Split
from data_pipeline.threads import Threads, image_threads
from data_pipeline.views import Views, central_view


class Stream(Protocol):
    """The order of samples, as the loader needs it (`data_pipeline.order`)."""

    @property
    def seed(self) -> int: ...

    @property
    def num_samples(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def micro_size(self) -> int: ...

    def micro_batch(self, step: int, micro: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(epochs, sample ids) of a micro-batch, each int64 [micro_size]."""
        ...


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        images: float32 [n, 3, height, width], normalised, on the device (channels-last strides).
        labels: int64 [n], on the device; after mixing float32 [n, classes], each row a distribution.
        records: int64 [n, 8] in training (`data_pipeline.records`), [n, 1] (sample id) in evaluation, as they came out
            of the pipeline beside the pixels.
        others: further views of the same samples, in evaluation; each like `images`, but for height and width.
    """

    images: torch.Tensor
    labels: torch.Tensor
    records: NDArray[np.int64]
    others: tuple[torch.Tensor, ...] = ()


def training_batches(
    split: Split,
    config: Input,
    order: Stream,
    work: Sequence[tuple[int, int]],
    device: torch.device,
    threads: int,
) -> Iterator[Batch]:
    """The micro-batches `work`, a sequence of (step, micro) that may be as long as the run; it is not copied."""
    check_sizes(split, config)

    def prepare(index: int) -> tuple[Sound, tuple[Any, ...]]:
        step, micro = work[index]
        epochs, ids = order.micro_batch(step, micro)
        show = sound(split, ids, config.damaged)
        drawn = augment(config, order.seed, epochs, show.ids, split.sizes[show.ids])
        records = training_records(epochs, ids, show.ids, drawn)
        anchors, shapes = np.ascontiguousarray(drawn.boxes[:, :2]), np.ascontiguousarray(drawn.boxes[:, 2:])
        size = size_at(config, order.batch_size, order.num_samples, step)
        sizes = () if isinstance(config.crop, PadCrop) else (np.full_like(shapes, size),)
        distortions = distortion_inputs(config, order.seed, epochs, show.ids, size)
        return show, (anchors, shapes, drawn.flips, records, *sizes, *distortions)

    def shifts(records: NDArray[np.int64]) -> NDArray[np.float32] | None:
        if not config.pca_colour:
            return None
        shown = records[:, SHOWN]
        return augment(config, order.seed, records[:, EPOCH], shown, split.sizes[shown]).shifts

    def decoded() -> Iterator[tuple[torch.Tensor, NDArray[np.int64]]]:
        feed = Feed(len(work), prepare)
        pipeline = training_pipeline(config, feed, **pipeline_options)
        normalise = Normaliser(config, workers)
        for images, records in _run(pipeline, feed, split):
            yield normalise(_dense(images).to(device), shifts(records)), records

    def decoded_regions() -> Generator[Regions, None, None]:
        feed = Feed(len(work), prepare)
        for images, flips, sizes, records in _run(region_pipeline(feed, **pipeline_options), feed, split):
            yield Regions([np.asarray(image) for image in images], _host(flips), records, _host(sizes))

    workers = image_threads(threads) if device.type == "cpu" else None
    pipeline_options = _options(split, order.micro_size, device, threads, workers)
    if workers is None or not is_direct(config):
        batches = decoded()
    else:
        regions = raw_regions(len(work), prepare) if split.manifest.encoding == "raw" else decoded_regions()
        batches = direct_batches(regions, config, workers, shifts)
    for pixels, records in batches:
        erase(config, order.seed, pixels, records[:, EPOCH], records[:, SHOWN])
        yield Batch(pixels, _labels(split, records[:, SHOWN], device), records)


def evaluation_batches(
    split: Split,
    config: Input,
    batches: Sequence[NDArray[np.int64]],
    device: torch.device,
    threads: int,
    views: Views | None = None,
) -> Iterator[Batch]:
    """Evaluation batches of the given sample ids, seen as `views` has it (None: the central crop); any may be short."""
    check_sizes(split, config)
    views = views or central_view(config)

    def prepare(index: int) -> tuple[Sound, tuple[Any, ...]]:
        ids = batches[index]
        return sound(split, ids, "fail"), (ids[:, None], *views.boxes(split.sizes[ids]))

    feed = Feed(len(batches), prepare)
    largest = max((len(ids) for ids in batches), default=1)
    workers = image_threads(threads) if device.type == "cpu" else None
    pipeline = evaluation_pipeline(config, views.crops, feed, **_options(split, largest, device, threads, workers))
    normalise = Normaliser(config, workers)
    for *seen, records in _run(pipeline, feed, split):
        images, *others = [normalise(_dense(view).to(device)) for view in seen]
        yield Batch(images, _labels(split, records[:, 0], device), records, tuple(others))


def check_sizes(split: Split, config: Input) -> None:
    """Raise LonghaulError where images do not fit a recipe that never resizes them."""
    if config.eval_resize is None:
        wrong = np.flatnonzero((split.sizes != config.size).any(axis=1))
        if wrong.size:
            height, width = split.sizes[wrong[0]]
            raise LonghaulError(
                f"{split.key(int(wrong[0]))} is {width}x{height} but input.size is {config.size} and the recipe does "
                f"not resize: set input.size, or use a recipe with resized_crop and eval_resize."
            )


def _run(pipeline: Any, feed: Feed, split: Split) -> Iterator[Any]:
    """The outputs of each batch as DALI gives them, but for the last, the records: int64 [n, columns]."""
    # On a GPU what follows is only queued: what it reads is kept until two batches later.
    held: deque[Any] = deque(maxlen=2)
    try:
        while True:
            try:
                *outputs, records = pipeline.run()
            except StopIteration:
                return
            except RuntimeError:  # DALI does not say which image it could not decode
                _name_undecodable(feed, split)
                raise
            held.append(outputs)
            yield *outputs, _host(records)
    finally:
        feed.close()


def _dense(images: Any) -> torch.Tensor:
    """Images of one size as a tensor, uint8 [n, height, width, 3], where they are."""
    return torch.from_dlpack(images.as_tensor())


def _host(values: Any) -> NDArray[Any]:
    return np.array(values.as_tensor())


def _name_undecodable(feed: Feed, split: Split) -> None:
    given = feed.recent()
    shapes = decoded_shapes([image for _, image in given], threads=1)
    for (sample, _), shape in zip(given, shapes, strict=True):
        if shape is not None:
            continue
        raise LonghaulError(
            f"{split.where(sample)} has the bytes that were written, but DALI cannot decode it: "
            f"leave the image out and prepare the data set again."
        ) from None


def _labels(split: Split, ids: NDArray[np.int64], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(split.labels[ids].astype(np.int64)).to(device)


def _options(split: Split, largest: int, device: torch.device, threads: int, workers: Threads | None) -> dict[str, Any]:
    return options(largest, _device_id(device), threads, split.manifest.encoding, workers)


def _device_id(device: torch.device) -> int | None:
    if device.type == "cpu":
        return None
    return device.index if device.index is not None else torch.cuda.current_device()
