"""What a worker is told. Apart from `trainer.run`, so that who only passes it on need not import torch."""

from dataclasses import dataclass
from pathlib import Path

from configs import Recipe
from data_pipeline.storage import Location
from trainer.checkpoints.memory import Keepers, KeeperStore
from trainer.rundir import RunDirectory


@dataclass(frozen=True)
class Job:
    """What a worker is told. The recipe decides the result; the rest is where and how to compute it.

    Attributes:
        data: the data set's directory, or its URL.
        threads: CPU threads of this worker, for computing and for decoding (0: cores / workers on this machine,
            or 1 where the recipe is deterministic).
        timeout_seconds: how long a collective may wait for another worker.
        cache_directory, cache_bytes: see `data_pipeline.cache.Cache`; None for each machine's own default.
        checkpoints: the directory or URL under which a new run's checkpoints go, by the run's name; None: into the
            run's own directory, or where they have been going.
        keepers: the memory tier (see `trainer.checkpoints.memory`), where something outlives the workers.
    """

    recipe: Recipe
    data: Location
    run: RunDirectory
    device: str = "auto"
    threads: int = 0
    timeout_seconds: float = 600.0
    allow_changes: bool = False
    cache_directory: Path | None = None
    cache_bytes: int | None = None
    checkpoints: Location | None = None
    keepers: Keepers | None = None

    def memory(self) -> KeeperStore | None:
        """The store in machines' memory, where the recipe asks for it and there is one."""
        if self.recipe.checkpoint.memory is None or self.keepers is None:
            return None
        return KeeperStore(self.keepers, self.recipe.checkpoint.memory_copies)
