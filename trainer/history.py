"""What a run has measured of itself, where its learning rate depends on it. A part of every checkpoint."""

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from configs import LonghaulError, Recipe
from configs.optimisation import Hold
from configs.section import exact

_Count = Annotated[int, Field(ge=0, strict=True)]


@dataclass
class History:
    """Counts, all of them integers, so that a resumed run decides exactly as the uninterrupted one.

    `scores`: for each evaluation of the held-out split the updates done until then, the images whose top-1 prediction
    was correct, and the images. `window`: training samples correct and seen in the hold's window under way.
    `released`: the updates done when the hold ended, which is the index of the first update after it.
    """

    scores: list[tuple[_Count, _Count, _Count]] = field(default_factory=list)
    window: tuple[_Count, _Count] = (0, 0)
    released: _Count | None = None

    __pydantic_config__ = ConfigDict(extra="forbid")

    def evaluated(self, step: int, num_top1: int, num_images: int) -> None:
        """Note an evaluation after `step` updates. A second one at the same step, after a resume, does not count: the
        first has already been acted on."""
        if not self.scores or self.scores[-1][0] < step:
            self.scores.append((step, num_top1, num_images))

    def trained(self, hold: Hold, batch_size: int, num_samples: int, step: int, num_correct: int) -> None:
        """Note an update of the hold: after `step` updates, `num_correct` samples of the last one's batch, on all
        workers together, were predicted correctly. A whole window with a low enough error ends the hold."""
        correct, seen = self.window[0] + num_correct, self.window[1] + batch_size
        self.window = (correct, seen)
        if seen < hold.window.steps(batch_size, num_samples) * batch_size:
            return
        self.window = (0, 0)
        if seen - correct < exact(hold.train_error) * seen:
            self.released = step

    def holding(self, recipe: Recipe) -> bool:
        """Whether the next update belongs to the hold."""
        return recipe.schedule.hold is not None and self.released is None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it back equal."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> "History":
        """Raises LonghaulError for anything that `as_dict` does not write."""
        try:
            history = _ADAPTER.validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(["history", *map(str, first["loc"])])
            raise LonghaulError(f"{key} in the checkpoint cannot be used ({first['msg']}): {_MEND}.") from None
        steps = [step for step, _, _ in history.scores]
        if steps != sorted(set(steps)) or any(correct > images for _, correct, images in history.scores):
            raise LonghaulError(f"history.scores in the checkpoint contradicts itself: {_MEND}.")
        return history


_ADAPTER = TypeAdapter(History)
_MEND = "resume from another checkpoint"
