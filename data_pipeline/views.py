"""How images are seen in evaluation: which views of each are scored, as pure functions of its size.

* `central`: the central crop. `flip`: that and its mirror image.
* `ten-crop`: the four corners and the centre of the resized image, and their mirror images (Krizhevsky et al. 2012,
  section 4.1; torchvision's TenCrop).
* `multi-scale`: the whole image at several scales, and mirrored (He et al. 2015, section 3.4; Simonyan & Zisserman
  2014, section 3.2).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from configs import LonghaulError
from configs.schema import Evaluate, Input
from data_pipeline.augment import central, resized

ViewsName = Literal["central", "flip", "ten-crop", "multi-scale"]
VIEWS: tuple[str, ...] = get_args(ViewsName)

Boxes = list[NDArray[np.int32]]


@dataclass(frozen=True)
class Views:
    """The views of each image.

    Attributes:
        crops: for each size that the images are resized to, the number of crops that are views; 0: the whole image is
            one. Empty where images are not resized: they are the only view.
        boxes: (height, width) of n images, int32 [n, 2], to what the pipeline is told: for each place in `crops` the
            size to resize to, and then the (y, x) of each crop; each int32 [n, 2].
        mirrored: whether the mirror image of each view is a view too.
    """

    crops: tuple[int, ...]
    boxes: Callable[[NDArray[np.int32]], Boxes]
    mirrored: bool

    def batches(self, sizes: NDArray[np.int32], ids: NDArray[np.int64], largest: int) -> list[NDArray[np.int64]]:
        """Sample ids in batches of at most `largest`; whole images only beside those of equal resized shapes."""
        groups = [ids]
        if 0 in self.crops:
            shapes = np.concatenate(self.boxes(sizes[ids]), axis=1)
            order = np.lexsort((ids, *shapes.T))
            borders = np.flatnonzero((np.diff(shapes[order], axis=0) != 0).any(axis=1)) + 1
            groups = np.split(ids[order], borders)
        return [group[first : first + largest] for group in groups for first in range(0, len(group), largest)]


def choose_views(name: str, config: Input, evaluate: Evaluate) -> Views:
    """The views of that name; raises LonghaulError where there is none, or images of the recipe do not have them."""
    if name not in VIEWS:
        raise LonghaulError(f"--views {name}: it is {', '.join(VIEWS[:-1])} or {VIEWS[-1]}.")
    mirrored = name != "central"
    if name in ("central", "flip"):
        return central_view(config, mirrored)
    if config.eval_resize is None:
        raise LonghaulError(
            f"--views {name} resizes images, and the recipe has input.eval_resize: null: give --views central or flip."
        )
    if name == "ten-crop":
        return Views((5,), lambda sizes: five_crops(config, sizes), mirrored)
    scales = evaluate.scales
    return Views((0,) * len(scales), lambda sizes: [resized(scale, sizes) for scale in scales], mirrored)


def central_view(config: Input, mirrored: bool = False) -> Views:
    """The central crop, or the image as it is where the recipe does not resize."""
    if config.eval_resize is None:
        return Views((), lambda _: [], mirrored)
    return Views((1,), lambda sizes: list(central(config, sizes)), mirrored)


def five_crops(config: Input, sizes: NDArray[np.int32]) -> Boxes:
    """The resized size, and where the crops stand: top left, top right, bottom left, bottom right, centre."""
    targets, centre = central(config, sizes)
    last = targets - config.size
    corners = [last * np.array(corner, np.int32) for corner in ((0, 0), (0, 1), (1, 0), (1, 1))]
    return [targets, *corners, centre]
