"""A shift of hue in HSV, which DALI has not (its `fn.hue` turns the plane of YIQ, another colour space).

A channel of a colour with hue h (in sixths of a turn), largest channel v and chroma c is
v - c * clamp(min(k, 4 - k), 0, 1), where k = (h + n) mod 6 and n = 5, 3, 1 for R, G, B (Smith 1978, written without
branches). On a GPU this is DALI's arithmetic; on a CPU, where each of its forty operations is a pass through memory,
one compiled loop.
"""

from typing import Any

import numpy as np
from nvidia.dali import fn, math
from nvidia.dali.plugin.numba.fn.experimental import numba_function
from nvidia.dali.types import DALIDataType

_PHASES = (5.0, 3.0, 1.0)
_SIX, _SIXTH = np.float32(6), np.float32(1 / 6)
_TO_BYTES = np.float32(255.999 / 255)  # torchvision's way from [0, 1] to bytes: times 255.999, fractions cut off


def shift_hue(images: Any, turns: Any) -> Any:
    """Images uint8 [height, width, 3] with their hue shifted by `turns` (float32, in [-0.5, 0.5])."""
    return by_arithmetic(images, turns) if images.device == "gpu" else by_loop(images, turns)


def by_arithmetic(images: Any, turns: Any) -> Any:
    """`shift_hue` in DALI's arithmetic."""
    shift = turns * 6.0 + 6.0
    if images.device == "gpu":
        shift = shift.gpu()
    pixels = fn.cast(images, dtype=DALIDataType.FLOAT)
    red, green, blue = pixels[:, :, 0:1], pixels[:, :, 1:2], pixels[:, :, 2:3]
    value = math.max(math.max(red, green), blue)
    chroma = value - math.min(math.min(red, green), blue)
    is_red = red == value
    is_green = (green == value) & (is_red ^ True)
    is_blue = (is_red | is_green) ^ True
    along = is_red * (green - blue) + is_green * (blue - red) + is_blue * (red - green)
    hue = along / math.max(chroma, 1.0) + is_green * 2.0 + is_blue * 4.0 + shift
    channels = []
    for phase in _PHASES:
        k = hue + phase
        k = k - 6.0 * math.floor(k * float(_SIXTH))
        channels.append(value - chroma * math.clamp(math.min(k, 4.0 - k), 0.0, 1.0))
    return fn.cast(fn.cat(*channels, axis=2) * float(_TO_BYTES) - 0.4999, dtype=DALIDataType.UINT8)


def by_loop(images: Any, turns: Any) -> Any:
    """`shift_hue` as a compiled loop over the pixels."""
    shifted: Any = numba_function(
        images, fn.reshape(turns, shape=[1]), run_fn=_loop, setup_fn=_same_shape, ins_ndim=[3, 1], outs_ndim=[3],
        in_types=[DALIDataType.UINT8, DALIDataType.FLOAT], out_types=[DALIDataType.UINT8], batch_processing=False,
    )  # fmt: skip
    return fn.reshape(shifted, layout="HWC")  # which a function of one's own does not pass on


def _same_shape(outs: Any, ins: Any) -> None:
    for sample in range(len(outs[0])):
        for axis in range(3):
            outs[0][sample][axis] = ins[0][sample][axis]


def _loop(out: Any, image: Any, turns: Any) -> None:
    shift = turns[0] * _SIX + _SIX
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            red, green, blue = np.float32(image[y, x, 0]), np.float32(image[y, x, 1]), np.float32(image[y, x, 2])
            value = max(red, max(green, blue))
            chroma = value - min(red, min(green, blue))
            divisor = max(chroma, np.float32(1))
            if value == red:
                hue = (green - blue) / divisor
            elif value == green:
                hue = (blue - red) / divisor + np.float32(2)
            else:
                hue = (red - green) / divisor + np.float32(4)
            for channel in range(3):
                k = hue + shift + np.float32(5 - 2 * channel)
                k = k - _SIX * np.floor(k * _SIXTH)
                share = min(max(min(k, np.float32(4) - k), np.float32(0)), np.float32(1))
                out[y, x, channel] = np.uint8((value - chroma * share) * _TO_BYTES)
