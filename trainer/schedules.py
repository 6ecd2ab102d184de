"""The learning rate as a pure function of the step, and of what the run has measured until then."""

import math
from collections.abc import Sequence

from configs import LonghaulError, Recipe
from configs.optimisation import Constant, Cosine, MultiStep, OneCycle, Plateau, Polynomial
from configs.section import exact
from trainer.history import History


def total_steps(recipe: Recipe, num_samples: int) -> int:
    """The number of optimizer steps in the whole run, for a training split of `num_samples`."""
    return recipe.duration.steps(recipe.batch.size, num_samples)


def learning_rate(recipe: Recipe, num_samples: int, step: int, history: History) -> float:
    """The learning rate of optimizer step `step` (from 0, up to the total). What `history` holds of later steps makes
    no difference, so that the rate of a past step can be asked for."""
    schedule = recipe.schedule
    size = recipe.batch.size
    if schedule.hold is not None and (history.released is None or step < history.released):
        return schedule.hold.lr
    warmup = schedule.warmup.steps(size, num_samples)
    if step < warmup:
        return schedule.warmup_lr + (schedule.lr - schedule.warmup_lr) * (step + 1) / warmup
    progress = (step - warmup) / max(total_steps(recipe, num_samples) - warmup, 1)
    match schedule:
        case Constant():
            return schedule.lr
        case MultiStep():
            passed = sum(step >= milestone.steps(size, num_samples) for milestone in schedule.milestones)
            return schedule.lr * schedule.gamma**passed
        case Cosine():
            return schedule.end_lr + (schedule.lr - schedule.end_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        case Polynomial():
            return schedule.end_lr + (schedule.lr - schedule.end_lr) * (1 - progress) ** schedule.power
        case OneCycle():
            return schedule.lr + (schedule.end_lr - schedule.lr) * progress
        case Plateau():
            scores = [(top1, images) for done, top1, images in history.scores if done <= step]
            drops = plateau_drops(scores, schedule.patience, schedule.threshold, schedule.drops)
            return schedule.lr * schedule.gamma**drops


def plateau_drops(scores: Sequence[tuple[int, int]], patience: int, threshold: float, drops: int) -> int:
    """How often the rate has been dropped after evaluations of (correct, images), at most `drops` times.

    It is dropped after `patience` evaluations in a row whose error is not more than `threshold` below the best, and
    again after as many more; the best is the error that was last that far below the one before. This is torch's
    ReduceLROnPlateau with an absolute threshold and a patience one lower, decided in integers.
    """
    share = exact(threshold)
    best: tuple[int, int] | None = None
    bad = dropped = 0
    for correct, images in scores:
        # correct / images - best[0] / best[1] > threshold, multiplied out.
        if best is None or (correct * best[1] - best[0] * images) * share.denominator > (
            share.numerator * images * best[1]
        ):
            best, bad = (correct, images), 0
            continue
        bad += 1
        if bad == patience:
            dropped, bad = dropped + 1, 0
    return min(dropped, drops)


def require_scores(recipe: Recipe, has_val: bool) -> None:
    """Raise LonghaulError where the schedule depends on evaluations and there is nothing to evaluate."""
    if isinstance(recipe.schedule, Plateau) and not has_val:
        raise LonghaulError(
            "schedule.kind=plateau follows the error on held-out images, and this data set holds none out: prepare it "
            "with --holdout, or choose another schedule.kind."
        )
