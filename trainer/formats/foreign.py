"""Which program a training checkpoint is from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from configs import LonghaulError
from trainer.formats import deepspeed, torchvision
from trainer.formats.training import TrainingState


@dataclass(frozen=True)
class Source:
    """Another program's training checkpoint."""

    path: Path
    program: Literal["deepspeed", "torchvision"]

    def read(self, network: nn.Module, trust: bool) -> TrainingState:
        """Its state, which must be that of `network`. Raises LonghaulError where it is not, or cannot be read; `trust`
        runs what code the files ask for."""
        return (deepspeed if self.program == "deepspeed" else torchvision).read(self.path, network, trust)


def open_source(path: Path) -> Source:
    """By what lies at a path: a directory of DeepSpeed's, or a file of torchvision's references."""
    if path.is_file():
        return Source(path, "torchvision")
    if path.is_dir() and deepspeed.is_checkpoint(path):
        return Source(path, "deepspeed")
    raise LonghaulError(
        f"{path} is neither a file of torchvision's references (.pth) nor a directory of DeepSpeed's "
        "(with `latest`, or ...model_states.pt)."
    )
