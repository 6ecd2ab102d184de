"""What a worker is told. Apart from `trainer.run`, so that who only passes it on need not import torch."""

from dataclasses import dataclass
from pathlib import Path

from configs import Recipe
from trainer.rundir import RunDirectory


@dataclass(frozen=True)
class Job:
    """What a worker is told. The recipe decides the result; the rest is where and how to compute it.

    Attributes:
        threads: CPU threads of this worker, for computing and for decoding (0: cores / workers on this machine,
            or 1 where the recipe is deterministic).
        timeout_seconds: how long a collective may wait for another worker.
    """

    recipe: Recipe
    data: Path
    run: RunDirectory
    device: str = "auto"
    threads: int = 0
    timeout_seconds: float = 600.0
    allow_changes: bool = False
