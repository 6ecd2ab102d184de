"""How images are seen in evaluation: which views of each are scored, as pure functions of its size.

* `central`: the central crop. `flip`: that and its mirror image.
* `ten-crop`: the four corners and the centre of the resized image, and their mirror images (Krizhevsky et al. 2012,
  section 4.1; torchvision's TenCrop).
* `multi-scale`: the whole image at several scales, and mirrored (He et al. 2015, section 3.4; Simonyan & Zisserman
  2014, section 3.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from configs import LonghaulError
from configs.schema import Evaluate, Input, PadCrop
from data_pipeline.augment import central, resized

ViewsName = Literal["central", "flip", "ten-crop", "multi-scale"]
VIEWS: tuple[str, ...] = get_args(ViewsName)

Boxes = list[NDArray[np.int32]]

_OF_TRAINING_ALONE = {
    name: Input.model_fields[name].default
    for name in (
        "train_size", "flip", "pca_colour", "colour_jitter", "auto_augment", "erasing", "progressive", "damaged",
    )
}  # fmt: skip


@dataclass(frozen=True)
class Views:
    """The views of each image. Equal ones give the same pixels, so that networks can share them.

    Attributes:
        config: the recipe's, less what is of training alone.
        name: one of VIEWS.
        scales: the shorter sides of `multi-scale`.
    """

    config: Input
    name: ViewsName
    scales: tuple[int, ...] = ()

    @property
    def mirrored(self) -> bool:
        """Whether the mirror image of each view is a view too."""
        return self.name != "central"

    @property
    def crops(self) -> tuple[int, ...]:
        """For each size that the images are resized to, the number of crops that are views; 0: the whole image is one.
        Empty where images are not resized: they are the only view."""
        if self.name == "multi-scale":
            return (0,) * len(self.scales)
        if self.name == "ten-crop":
            return (5,)
        return () if self.config.eval_resize is None else (1,)

    def boxes(self, sizes: NDArray[np.int32]) -> Boxes:
        """What the pipeline is told of images of these (height, width), int32 [n, 2]: for each place in `crops` the
        size to resize to, and then the (y, x) of each crop; each int32 [n, 2]."""
        if self.name == "multi-scale":
            return [resized(scale, sizes) for scale in self.scales]
        if self.name == "ten-crop":
            return five_crops(self.config, sizes)
        return [] if self.config.eval_resize is None else list(central(self.config, sizes))


def batches_of(seen: Sequence[Views], sizes: NDArray[np.int32], largest: int) -> list[NDArray[np.int64]]:
    """All samples (`sizes` has the height and width of each), as ids in batches of at most `largest` that can be seen
    in each of these ways: whole images stand only beside those of equal resized shapes."""
    ids = np.arange(len(sizes), dtype=np.int64)
    whole = [box for views in seen if 0 in views.crops for box in views.boxes(sizes)]
    groups = [ids]
    if whole:
        shapes = np.concatenate(whole, axis=1)
        order = np.lexsort((ids, *shapes.T))
        borders = np.flatnonzero((np.diff(shapes[order], axis=0) != 0).any(axis=1)) + 1
        groups = np.split(ids[order], borders)
    return [group[first : first + largest] for group in groups for first in range(0, len(group), largest)]


def choose_views(name: str, config: Input, evaluate: Evaluate) -> Views:
    """The views of that name; raises LonghaulError where there is none, or images of the recipe do not have them."""
    if name not in VIEWS:
        raise LonghaulError(f"--views {name}: it is {', '.join(VIEWS[:-1])} or {VIEWS[-1]}.")
    if config.eval_resize is None and name not in ("central", "flip"):
        raise LonghaulError(
            f"--views {name} resizes images, and the recipe has input.eval_resize: null: give --views central or flip."
        )
    return Views(_as_evaluated(config), cast(ViewsName, name), evaluate.scales if name == "multi-scale" else ())


def central_view(config: Input) -> Views:
    """The central crop, or the image as it is where the recipe does not resize."""
    return Views(_as_evaluated(config), "central")


def _as_evaluated(config: Input) -> Input:
    return config.model_copy(update={**_OF_TRAINING_ALONE, "crop": PadCrop()})


def five_crops(config: Input, sizes: NDArray[np.int32]) -> Boxes:
    """The resized size, and where the crops stand: top left, top right, bottom left, bottom right, centre."""
    targets, centre = central(config, sizes)
    last = targets - config.size
    corners = [last * np.array(corner, np.int32) for corner in ((0, 0), (0, 1), (1, 0), (1, 1))]
    return [targets, *corners, centre]
