"""What computes and reduces gradients. The loop knows only the interface in `base`."""

from configs.schema import Recipe
from trainer.engines.base import Engine
from trainer.group import Group

__all__ = ["Engine", "build_engine"]


def build_engine(recipe: Recipe, num_samples: int, num_classes: int, group: Group) -> Engine:
    """The engine that the recipe names, its model initialised from the seed, for a training split of `num_samples`."""
    # Each is imported where it is used: DeepSpeed alone takes seconds.
    if recipe.engine.name == "fsdp2":
        from trainer.engines.fsdp2 import FsdpEngine as Chosen
    elif recipe.engine.name == "deepspeed":
        from trainer.engines.deepspeed import DeepSpeedEngine as Chosen  # type: ignore[assignment]
    else:
        from trainer.engines.ddp import DdpEngine as Chosen  # type: ignore[assignment]
    return Chosen(recipe, num_samples, num_classes, group)
