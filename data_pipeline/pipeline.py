"""The DALI pipelines: one definition each for training and evaluation, on CPU and GPU.

Random numbers never come from DALI: it is given the boxes and flips. Images leave it as uint8 NHWC; normalising is left
to the device (`loader`), where it costs next to nothing.
"""

from collections.abc import Callable
from typing import Any

from nvidia.dali import fn, pipeline_def
from nvidia.dali.types import DALIImageType, DALIInterpType

from configs.schema import Input, PadCrop

PREFETCH = 2


def training_pipeline(config: Input, source: Callable[[int], Any], **kwargs: Any) -> Any:
    """A built pipeline that gives (images uint8 [n, size, size, 3], records int64 [n, 7]).

    `source(i)` gives batch i: (JPEG bytes, anchors int32 [n, 2], shapes int32 [n, 2], flips int32 [n], records). The
    records pass through, so that what is written into the ledger has travelled with the pixels.
    """
    pipeline = _training(config=config, source=source, **kwargs)
    pipeline.build()
    return pipeline


def evaluation_pipeline(config: Input, source: Callable[[int], Any], **kwargs: Any) -> Any:
    """A built pipeline that gives (images uint8 [n, size, size, 3], ids int64 [n]); `source(i)` gives batch i:
    (JPEG bytes, sizes to resize to float32 [n, 2], anchors of the crop int32 [n, 2], ids)."""
    pipeline = _evaluation(config=config, source=source, **kwargs)
    pipeline.build()
    return pipeline


def options(batch: int, device_id: int | None, threads: int) -> dict[str, Any]:
    """The execution options both pipelines share; `device_id` None means CPU."""
    return {
        "batch_size": batch,
        "num_threads": threads,
        "device_id": device_id,
        "prefetch_queue_depth": PREFETCH,
        "exec_dynamic": True,
        "decoder": "cpu" if device_id is None else "mixed",
    }


@pipeline_def
def _training(config: Input, source: Callable[[int], Any], decoder: str) -> Any:
    jpegs, anchors, shapes, flips, records = fn.external_source(source=source, num_outputs=5, batch=True, no_copy=True)
    if isinstance(config.crop, PadCrop):
        images = fn.decoders.image(jpegs, device=decoder, output_type=DALIImageType.RGB, adjust_orientation=False)
        images = fn.slice(
            images, anchors, shapes, axes=(0, 1), normalized_anchor=False, normalized_shape=False,
            out_of_bounds_policy="pad", fill_values=[round(255 * m) for m in config.mean],
        )  # fmt: skip
    else:
        images = fn.decoders.image_slice(
            jpegs, anchors, shapes, axes=(0, 1), normalized_anchor=False, normalized_shape=False,
            device=decoder, output_type=DALIImageType.RGB, adjust_orientation=False,
        )  # fmt: skip
        images = _resize(images, size=(config.size, config.size))
    return fn.flip(images, horizontal=flips), records


@pipeline_def
def _evaluation(config: Input, source: Callable[[int], Any], decoder: str) -> Any:
    num_outputs = 2 if config.eval_resize is None else 4
    jpegs, ids, *boxes = fn.external_source(source=source, num_outputs=num_outputs, batch=True, no_copy=True)
    images = fn.decoders.image(jpegs, device=decoder, output_type=DALIImageType.RGB, adjust_orientation=False)
    if boxes:
        targets, anchors = boxes
        images = _resize(images, size=targets)
        images = fn.slice(images, start=anchors, shape=[config.size, config.size], axes=(0, 1))
    return images, ids


def _resize(images: Any, **size: Any) -> Any:
    """Training and evaluation must resize alike, or accuracy falls by points."""
    return fn.resize(images, interp_type=DALIInterpType.INTERP_LINEAR, antialias=True, **size)
