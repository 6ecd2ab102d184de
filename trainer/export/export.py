"""Writing a network in one of the forms, and comparing what was written with it before it counts."""

from dataclasses import dataclass
from pathlib import Path

import torch

from configs import LonghaulError
from data_pipeline.split import Split
from trainer.atomic import replacing
from trainer.export.contents import Contents
from trainer.export.form import Form, Predict
from trainer.trained import Trained, spread

# The largest difference of two logits, as a share of the largest logit (at least 1). Sums of float32 in another order
# differ by some 1e-6 of it; a wrong epsilon, stride or tensor by far more (docs/export.md has what was measured).
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Comparison:
    """Of the logits of what was written with the network's own, float32 on the CPU, on real images.

    Attributes:
        deviation: the largest absolute difference of two logits.
        largest: the largest absolute logit.
        same_top1: the number of images of which both take the same class for the first.
    """

    num_images: int
    deviation: float
    largest: float
    same_top1: int

    @property
    def holds(self) -> bool:
        return self.deviation <= TOLERANCE * max(1.0, self.largest)  # not of a NaN

    def __str__(self) -> str:
        allowed = TOLERANCE * max(1.0, self.largest)
        return (
            f"logits, up to {self.largest:.3g}, differ by at most {self.deviation:.2g} (tolerance {allowed:.2g}); "
            f"the same top-1 on {self.same_top1} of {self.num_images} images"
        )


def export(trained: Trained, form: Form, split: Split, out: Path, num_images: int, force: bool) -> list[str]:
    """Write `trained`, a network on the CPU, at `out`, and return what was found in comparing it, in words.

    It is written beside `out`, loaded again, compared on `num_images` images of `split`, and only then gets its name.

    Raises:
        LonghaulError: there is no such form of this network; `out` exists and is not to be overwritten (`force`), or is
            not an export; or what was written does not compute what the network does. Then nothing is left at `out`
            that was not there before.
    """
    form.require(trained.recipe.model)
    _require_place(out, form, force)
    contents = Contents(trained, trained.classes(split))
    with replacing(out) as temporary:
        form.write(contents, temporary)
        comparison = compare(trained, form.load(contents, temporary), split, num_images)
        if not comparison.holds:
            raise LonghaulError(f"What was written for {out} is not the network, and was removed: {comparison}.")
        return [str(comparison), *form.examine(contents, temporary, split, num_images)]


@torch.no_grad()
def compare(trained: Trained, predict: Predict, split: Split, num_images: int) -> Comparison:
    """`predict` beside the network itself, on `num_images` images of `split` in central view."""
    deviation, largest, same = [], [], 0
    ids = spread(len(split), num_images)
    for batch in trained.batches(split, ids):
        own, other = trained.network(trained.laid_out(batch.images)), predict(batch.images)
        deviation.append((own - other).abs().max())
        largest.append(own.abs().max())
        same += int((own.argmax(1) == other.argmax(1)).sum())
    return Comparison(len(ids), float(torch.stack(deviation).max()), float(torch.stack(largest).max()), same)


def _require_place(out: Path, form: Form, force: bool) -> None:
    if not out.exists():
        return
    if not force:
        raise LonghaulError(f"{out} exists: give --force to write over it, or another --out.")
    others = {path.name for path in out.iterdir()} - set(form.holds) if out.is_dir() else set()
    if out.is_dir() != bool(form.holds) or others:
        raise LonghaulError(f"{out} is not an export of this form, and is not written over: give another --out.")
