"""What every form of a trained network carries: weights by name, and what is needed to use them."""

import importlib.metadata
import json
from dataclasses import dataclass

import torch

from trainer.trained import Trained


@dataclass(frozen=True)
class Contents:
    """A network with a name for each of its classes."""

    trained: Trained
    classes: list[str]

    def weights(self) -> dict[str, torch.Tensor]:
        """By torchvision's names, on the CPU, in logical NCHW order whatever the memory format."""
        return {name: tensor.cpu().contiguous() for name, tensor in self.trained.network.state_dict().items()}

    def metadata(self) -> dict[str, str]:
        """Text by key; what is not text is JSON.

        `recipe` is the whole resolved recipe; `input` says how images are seen: those in [0, 1] (RGB), resized to the
        shorter side `eval_resize` (null: not at all), the central `size` x `size` crop of that, less `mean`, by `std`.
        """
        recipe, manifest = self.trained.recipe, self.trained.saved.manifest
        return {
            "longhaul_version": importlib.metadata.version("longhaul"),
            "model": recipe.model.name,
            "step": str(self.trained.saved.step),
            "epoch": str(manifest["epoch"]),
            "weights": "ema" if self.trained.averaged else "plain",
            "classes": json.dumps(self.classes),
            "input": recipe.input.model_dump_json(include={"size", "eval_resize", "mean", "std"}),
            "recipe": recipe.model_dump_json(),
            "recipe_sha256": self.trained.recipe_sha256(),
        }
