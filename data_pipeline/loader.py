"""Batches on the device, in an order given from outside and prefetched."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from configs import LonghaulError
from configs.schema import Input
from data_pipeline.augment import augment, central
from data_pipeline.order import Order
from data_pipeline.pipeline import PREFETCH, evaluation_pipeline, options, training_pipeline
from data_pipeline.split import Split


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        images: float32 [n, 3, size, size], normalised, on the device (channels-last strides).
        labels: int64 [n], on the device.
        records: int64 [n, 7] (epoch, sample id, y, x, height, width, flip) in training, [n, 1] (sample id) in
            evaluation, as they came out of the pipeline beside the pixels.
    """

    images: torch.Tensor
    labels: torch.Tensor
    records: NDArray[np.int64]


def training_batches(
    split: Split,
    config: Input,
    order: Order,
    work: Sequence[tuple[int, int]],
    device: torch.device,
    threads: int,
) -> Iterator[Batch]:
    """The micro-batches `work`, a sequence of (step, micro) that may be as long as the run; it is not copied."""
    check_sizes(split, config)
    ring: deque[Any] = deque(maxlen=PREFETCH + 4)  # no_copy: DALI keeps no reference to what it is given

    def source(index: int) -> Any:
        if index >= len(work):
            raise StopIteration
        epochs, ids = order.micro_batch(*work[index])
        drawn = augment(config, order.seed, epochs, ids, split.sizes[ids])
        records = np.concatenate(
            [
                epochs[:, None],
                ids[:, None],
                drawn.boxes.astype(np.int64),
                drawn.flips[:, None].astype(np.int64),
            ],
            axis=1,
        )
        anchors, shapes = np.ascontiguousarray(drawn.boxes[:, :2]), np.ascontiguousarray(drawn.boxes[:, 2:])
        given = (split.images(ids), anchors, shapes, drawn.flips, records)
        ring.append((ids, given))
        return given

    def shifts(records: NDArray[np.int64]) -> torch.Tensor | None:
        if not config.pca_colour:
            return None
        drawn = augment(config, order.seed, records[:, 0], records[:, 1], split.sizes[records[:, 1]])
        return torch.from_numpy(drawn.shifts)

    pipeline = training_pipeline(config, source, **options(order.micro_size, _device_id(device), threads))
    return _iterate(pipeline, ring, split, config, device, shifts, id_column=1)


def evaluation_batches(
    split: Split, config: Input, batches: Sequence[NDArray[np.int64]], device: torch.device, threads: int
) -> Iterator[Batch]:
    """Evaluation batches of the given sample ids; the last may be short."""
    check_sizes(split, config)
    ring: deque[Any] = deque(maxlen=PREFETCH + 4)

    def source(index: int) -> Any:
        if index >= len(batches):
            raise StopIteration
        ids = batches[index]
        boxes = () if config.eval_resize is None else central(config, split.sizes[ids])
        given = (split.images(ids), ids[:, None], *boxes)
        ring.append((ids, given))
        return given

    largest = max((len(ids) for ids in batches), default=1)
    pipeline = evaluation_pipeline(config, source, **options(largest, _device_id(device), threads))
    return _iterate(pipeline, ring, split, config, device, lambda _: None, id_column=0)


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


def _iterate(
    pipeline: Any,
    recent: Iterable[tuple[NDArray[np.int64], Any]],
    split: Split,
    config: Input,
    device: torch.device,
    shifts: Callable[[NDArray[np.int64]], torch.Tensor | None],
    id_column: int,
) -> Iterator[Batch]:
    mean = 255 * torch.tensor(config.mean, device=device).view(3, 1, 1)
    scale = 1 / (255 * torch.tensor(config.std, device=device).view(3, 1, 1))
    # On a GPU the copy below is only queued: what it reads is kept until two batches later.
    held: deque[Any] = deque(maxlen=2)
    while True:
        try:
            images, records = pipeline.run()
        except StopIteration:
            return
        except RuntimeError:  # DALI does not say which image it could not decode
            for ids, given in recent:
                for place in split.damaged(ids, given[0]):
                    sample = int(ids[place])
                    raise LonghaulError(
                        f"{split.where(sample)}: the image {split.key(sample)} does not have the bytes that were "
                        f"written: prepare the data set again."
                    ) from None
            raise
        held.append(images)
        pixels = torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2).to(device, torch.float32)
        rows = np.array(records.as_tensor())
        shift = shifts(rows)
        if shift is not None:
            pixels.add_(255 * shift.to(device)[:, :, None, None])
        pixels.sub_(mean).mul_(scale)
        labels = torch.from_numpy(split.labels[rows[:, id_column]].astype(np.int64)).to(device)
        yield Batch(pixels, labels, rows)


def _device_id(device: torch.device) -> int | None:
    if device.type == "cpu":
        return None
    return device.index if device.index is not None else torch.cuda.current_device()
