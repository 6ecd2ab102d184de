"""Which checkpoints stay: the newest, the best, and one at every multiple of a length."""

from collections.abc import Iterable
from dataclasses import dataclass

from configs import Duration, LonghaulError, Recipe
from trainer.checkpoints.manifest import open_checkpoint
from trainer.checkpoints.store import Store
from trainer.progress import multiples


@dataclass(frozen=True)
class Kept:
    """A checkpoint as retention sees it: `score` is the share of held-out images whose top-1 prediction was correct,
    None where it was not evaluated at this very step."""

    name: str
    step: int
    score: float | None = None


def superfluous(
    checkpoints: Iterable[Kept],
    keep_last: int,
    keep_best: int,
    keep_every: Duration | None,
    batch_size: int,
    num_samples: int,
) -> list[str]:
    """The names to remove of `checkpoints`, which are given oldest first. A pure function.

    What stays: the newest `keep_last`; the `keep_best` with the highest score, of equal ones the newer; and of those
    between two multiples of `keep_every` the first, which is the one at the multiple if that could be saved. Of several
    of one step the newest stands for the step.
    """
    checkpoints = list(checkpoints)
    by_step = {checkpoint.step: checkpoint for checkpoint in checkpoints}
    steps = sorted(by_step)
    stay = set(steps[-keep_last:])
    scored = [(kept.score, step) for step, kept in by_step.items() if kept.score is not None]
    stay.update(step for _, step in sorted(scored, reverse=True)[:keep_best])
    if keep_every is not None:
        first: dict[int, int] = {}
        for step in steps:
            first.setdefault(multiples(keep_every, step, batch_size, num_samples), step)
        stay.update(step for multiple, step in first.items() if multiple > 0)
    names = {by_step[step].name for step in stay}
    return [checkpoint.name for checkpoint in checkpoints if checkpoint.name not in names]


class Retention:
    """`superfluous` for a store and a recipe; a checkpoint's manifest is read once.

    A checkpoint whose manifest cannot be read counts for nothing and stays: it may be a storage's passing trouble, and
    if not, the next start sets it aside.
    """

    def __init__(self, recipe: Recipe, num_samples: int) -> None:
        """`num_samples`: of the training split."""
        self._recipe, self._num_samples = recipe, num_samples
        self._known: dict[str, Kept] = {}

    def __call__(self, store: Store) -> list[str]:
        """The names of the checkpoints to remove; none while the storage does not answer."""
        try:
            names = store.names()
        except OSError:
            return []
        found = (self._look_up(store, name) for name in names)
        config, batch_size = self._recipe.checkpoint, self._recipe.batch.size
        return superfluous(
            [kept for kept in found if kept is not None],
            config.keep_last, config.keep_best, config.keep_every, batch_size, self._num_samples,
        )  # fmt: skip

    def _look_up(self, store: Store, name: str) -> Kept | None:
        if name not in self._known:
            try:
                saved = open_checkpoint(store, name)
            except LonghaulError:
                return None
            score = saved.manifest.get("score")
            share = None if score is None else score["num_top1"] / score["num_images"]
            self._known[name] = Kept(name, saved.step, share)
        return self._known[name]
