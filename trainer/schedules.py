"""The learning rate as a pure function of the step."""

import math

from configs import Recipe
from configs.optimisation import Constant, Cosine, MultiStep, OneCycle


def total_steps(recipe: Recipe, num_samples: int) -> int:
    """The number of optimizer steps in the whole run, for a training split of `num_samples`."""
    return recipe.duration.steps(recipe.batch.size, num_samples)


def learning_rate(recipe: Recipe, num_samples: int, step: int) -> float:
    """The learning rate of optimizer step `step` (from 0)."""
    schedule = recipe.schedule
    size = recipe.batch.size
    total = total_steps(recipe, num_samples)
    warmup = schedule.warmup.steps(size, num_samples)
    if step < warmup:
        return schedule.lr * (step + 1) / warmup
    match schedule:
        case Constant():
            return schedule.lr
        case MultiStep():
            passed = sum(step >= milestone.steps(size, num_samples) for milestone in schedule.milestones)
            return schedule.lr * schedule.gamma**passed
        case Cosine():
            progress = (step - warmup) / max(total - warmup, 1)
            return schedule.end_lr + (schedule.lr - schedule.end_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        case OneCycle():
            progress = (step - warmup) / max(total - warmup, 1)
            return schedule.lr + (schedule.end_lr - schedule.lr) * progress
        case _:
            raise NotImplementedError(schedule.kind)
