"""The DALI pipelines: one definition each for training and evaluation, on CPU and GPU.

Random numbers never come from DALI: it is given the boxes and flips. Images leave it as uint8 NHWC; normalising is left
to the device (`loader`), where it costs next to nothing.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType

from configs.schema import Input, PadCrop
from data_pipeline.distort import num_inputs
from data_pipeline.photometric import distort
from data_pipeline.resize import Resizer
from data_pipeline.threads import Threads

PREFETCH = 2


def training_pipeline(config: Input, source: Callable[[int], Any], **kwargs: Any) -> Any:
    """A built pipeline that gives (images uint8 [n, size, size, 3], records int64 [n, columns]).

    `source(i)` gives batch i: (images as the data set holds them, anchors int32 [n, 2], shapes int32 [n, 2], flips
    int32 [n], records), where the crop is resized (sizes int32 [n, 2]), and what `distort.distortion_inputs` gives. The
    records pass through, so that what is written into the ledger has travelled with the pixels.
    """
    # Only then: conditionals make DALI rewrite this module's source.
    conditional = num_inputs(config) > 0
    pipeline = _training(config=config, source=source, enable_conditionals=conditional, **kwargs)
    pipeline.build()
    return pipeline


def region_pipeline(source: Callable[[int], Any], **kwargs: Any) -> Any:
    """A built pipeline that gives what lies in the crop boxes, at its own size: (images uint8 [height, width, 3] each,
    flips, sizes, records), the last three as `source` gives them; see `training_pipeline`."""
    pipeline = _regions(source=source, **kwargs)
    pipeline.build()
    return pipeline


def evaluation_pipeline(config: Input, crops: tuple[int, ...], source: Callable[[int], Any], **kwargs: Any) -> Any:
    """A built pipeline that gives (each view uint8 [n, height, width, 3], ids int64 [n, 1]).

    `source(i)` gives batch i: (images as the data set holds them, ids) and what `views.Views.boxes` gives. For each
    number in `crops` the images are resized once, and as many views cut out of them; 0 keeps them whole.
    """
    pipeline = _evaluation(config=config, crops=crops, source=source, **kwargs)
    pipeline.build()
    return pipeline


def options(batch: int, device_id: int | None, threads: int, encoding: str, workers: Threads | None) -> dict[str, Any]:
    """The execution options both pipelines share. On the CPU `device_id` is None, and `workers` resize."""
    return {
        "batch_size": batch,
        "num_threads": threads,
        "device_id": device_id,
        "prefetch_queue_depth": PREFETCH,
        "exec_dynamic": True,
        "encoding": encoding,
        "resizer": None if workers is None else Resizer(workers),
    }


def decoded_shapes(jpegs: list[NDArray[np.uint8]], threads: int) -> list[tuple[int, ...] | None]:
    """(height, width, 3) of each JPEG as DALI decodes it on the CPU, None where it cannot."""
    try:
        return _decode(jpegs, threads)
    except RuntimeError:  # DALI does not say which: halve until it is alone
        if len(jpegs) == 1:
            return [None]
        middle = len(jpegs) // 2
        return decoded_shapes(jpegs[:middle], threads) + decoded_shapes(jpegs[middle:], threads)


def _decode(jpegs: list[NDArray[np.uint8]], threads: int) -> list[tuple[int, ...] | None]:
    pipeline = _decode_only(jpegs, batch_size=len(jpegs), num_threads=threads, device_id=None, exec_dynamic=True)
    pipeline.build()
    (images,) = pipeline.run()
    return list(images.shape())


@pipeline_def
def _decode_only(jpegs: list[NDArray[np.uint8]]) -> Any:
    encoded = fn.external_source(source=lambda: jpegs, batch=True, no_copy=True)
    return fn.decoders.image(encoded, device="cpu", output_type=DALIImageType.RGB, adjust_orientation=False)


@pipeline_def
def _regions(source: Callable[[int], Any], encoding: str, resizer: Resizer | None) -> Any:
    encoded, anchors, shapes, flips, records, sizes = fn.external_source(
        source=source, num_outputs=6, batch=True, no_copy=True
    )
    return _decoded_region(encoded, anchors, shapes, encoding, resizer), flips, sizes, records


@pipeline_def
def _training(config: Input, source: Callable[[int], Any], encoding: str, resizer: Resizer | None) -> Any:
    resizes = not isinstance(config.crop, PadCrop)
    num_outputs = 5 + resizes + num_inputs(config)
    encoded, anchors, shapes, flips, records, *others = fn.external_source(
        source=source, num_outputs=num_outputs, batch=True, no_copy=True
    )
    if not resizes:
        images = fn.slice(
            _decoded(encoded, encoding, resizer), anchors, shapes, axes=(0, 1),
            normalized_anchor=False, normalized_shape=False,
            out_of_bounds_policy="pad", fill_values=[round(255 * m) for m in config.mean],
        )  # fmt: skip
        images = fn.flip(images, horizontal=flips)
    else:
        region = _decoded_region(encoded, anchors, shapes, encoding, resizer)
        images = _resized(region, others.pop(0), flips, resizer)
    return distort(config, images, others), records


@pipeline_def
def _evaluation(
    config: Input, crops: tuple[int, ...], source: Callable[[int], Any], encoding: str, resizer: Resizer | None
) -> Any:
    num_outputs = 2 + len(crops) + sum(crops)
    encoded, ids, *boxes = fn.external_source(source=source, num_outputs=num_outputs, batch=True, no_copy=True)
    images = _decoded(encoded, encoding, resizer)
    shape = [config.size, config.size]
    views = []
    for count in crops:
        sizes, *anchors = [boxes.pop(0) for _ in range(1 + count)]
        resized = _resized(images, sizes, None, resizer)
        views += [fn.slice(resized, start=anchor, shape=shape, axes=(0, 1)) for anchor in anchors] or [resized]
    return *(views or [images]), ids


def _decoded(encoded: Any, encoding: str, resizer: Resizer | None) -> Any:
    if encoding == "raw":
        return encoded if resizer is not None else encoded.gpu()
    return fn.decoders.image(encoded, **_decoding(resizer))


def _decoded_region(encoded: Any, anchors: Any, shapes: Any, encoding: str, resizer: Resizer | None) -> Any:
    """Only the region: what lies below it is not decoded, what lies beside it hardly."""
    slicing: dict[str, Any] = {"axes": (0, 1), "normalized_anchor": False, "normalized_shape": False}
    if encoding == "raw":
        return fn.slice(_decoded(encoded, encoding, resizer), anchors, shapes, **slicing)
    return fn.decoders.image_slice(encoded, anchors, shapes, **slicing, **_decoding(resizer))


def _decoding(resizer: Resizer | None) -> dict[str, Any]:
    device = "mixed" if resizer is None else "cpu"
    return {"device": device, "output_type": DALIImageType.RGB, "adjust_orientation": False}


def _resized(images: Any, sizes: Any, flips: Any, resizer: Resizer | None) -> Any:
    """Antialiased, in training and evaluation alike, or accuracy falls by points. `flips` None: nothing is mirrored."""
    if resizer is not None:
        given = () if flips is None else (flips,)
        rows = fn.python_function(images, sizes, *given, function=resizer, batch_processing=True)
        return fn.reshape(rows, shape=fn.cat(sizes, np.array([3], np.int32)))
    size = fn.cast(sizes, dtype=DALIDataType.FLOAT)
    images = fn.resize(images, size=size, interp_type=DALIInterpType.INTERP_LINEAR, antialias=True)
    return images if flips is None else fn.flip(images, horizontal=flips)
