"""The filters of a network's first layer, as a picture."""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from configs import LonghaulError

_COLUMNS, _SIDE, _GAP = 8, 56, 4


def first_filters(network: nn.Module) -> NDArray[np.float32]:
    """The weights of the first convolution, float32 [filters, 3, height, width]; raises LonghaulError where there is
    none that sees images."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 3 and module.groups == 1:
            return module.weight.detach().float().cpu().numpy().copy()
    raise LonghaulError("The network has no convolution of the three colours: there are no filters to draw.")


def draw_filters(weights: NDArray[np.float32]) -> Image.Image:
    """A grid of the filters, [filters, 3, height, width], in RGB, row by row; each has the range from its least weight
    (0) to its greatest (255) for itself. Weights are enlarged to squares."""
    count, _, height, width = weights.shape
    least, greatest = weights.min((1, 2, 3), keepdims=True), weights.max((1, 2, 3), keepdims=True)
    scaled = (weights - least) / np.maximum(greatest - least, np.finfo(np.float32).tiny)
    pixels = np.rint(255 * scaled).astype(np.uint8).transpose(0, 2, 3, 1)
    factor = max(1, _SIDE // max(height, width))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    tall, wide = pixels.shape[1] + _GAP, pixels.shape[2] + _GAP
    rows = math.ceil(count / _COLUMNS)
    grid = Image.new("RGB", (min(count, _COLUMNS) * wide + _GAP, rows * tall + _GAP), "white")
    for index, picture in enumerate(pixels):
        row, column = divmod(index, _COLUMNS)
        grid.paste(Image.fromarray(picture), (_GAP + column * wide, _GAP + row * tall))
    return grid
