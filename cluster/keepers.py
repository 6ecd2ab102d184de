"""The memory tier on Ray: an actor on every machine keeps the newest checkpoint. The driver starts them, so that they
outlive the workers and end with the run."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from trainer.checkpoints.memory import Bytes, HeapKeeper, Keeper

_NAMESPACE = "longhaul"
_LOOK_SECONDS = 2.0  # how often the driver looks for machines without a keeper
_ANSWER_SECONDS = 10.0  # for what is small
_MOVE_SECONDS = 60.0  # for a file: 7 GB over 1 Gbit/s


class RayKeeper:
    """The keeper of a machine, asked from a worker; see `trainer.checkpoints.memory.Keeper`."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.answers = True

    def put(self, checkpoint: str, file: str, data: Bytes) -> None:
        self._ask(_MOVE_SECONDS, "put", checkpoint, file, data)

    def get(self, checkpoint: str, file: str) -> Bytes:
        found: Bytes = self._ask(_MOVE_SECONDS, "get", checkpoint, file)
        return found

    def files(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = self._ask(_ANSWER_SECONDS, "files")
        return found

    def drop(self, checkpoint: str) -> None:
        self._ask(_ANSWER_SECONDS, "drop", checkpoint)

    def _ask(self, seconds: float, method: str, *arguments: Any) -> Any:
        try:
            return ray.get(getattr(self.actor, method).remote(*arguments), timeout=seconds)
        except RayTaskError as error:
            raise error.as_instanceof_cause() from None
        except RayError as error:
            # One that has ended says so at once, and Ray starts it again; one that is slow is waited for only once.
            self.answers = not isinstance(error, GetTimeoutError)
            raise OSError(f"a machine's keeper of checkpoints did not answer ({type(error).__name__})") from None


class RayKeepers:
    """All keepers of a run, from wherever they are asked; see `trainer.checkpoints.memory.Keepers`."""

    def __init__(self, run: str) -> None:
        """`run` names one start of the driver."""
        self._run = run
        self._known: dict[str, RayKeeper] = {}

    def near_first(self) -> list[Keeper]:
        machines = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])
        here = ray.get_runtime_context().get_node_id()
        ring = [m for m in machines if m >= here] + [m for m in machines if m < here]
        found = [self._keeper_of(machine) for machine in ring]
        return [keeper for keeper in found if keeper is not None and keeper.answers]

    def _keeper_of(self, machine: str) -> RayKeeper | None:
        if machine not in self._known:
            try:
                self._known[machine] = RayKeeper(ray.get_actor(_name(self._run, machine), _NAMESPACE))
            except ValueError:  # none there, or not yet
                return None
        return self._known[machine]


@contextmanager
def keepers(run: str, resource: str) -> Iterator[RayKeepers]:
    """As long as the block lasts, a keeper on every machine that has some of `resource` ("CPU", "GPU"), on those that
    join later too."""
    placed: dict[str, Any] = {}
    done = threading.Event()

    def keep_placing() -> None:
        while not done.wait(_LOOK_SECONDS):
            _place(run, resource, placed)

    _place(run, resource, placed)
    looking = threading.Thread(target=keep_placing, name="keepers", daemon=True)
    looking.start()
    try:
        yield RayKeepers(run)
    finally:
        done.set()
        looking.join()
        for actor in placed.values():
            ray.kill(actor)


def _place(run: str, resource: str, placed: dict[str, Any]) -> None:
    """Start the keepers that are missing. Ray ends an actor once the handle that its creation gave is let go of, so
    `placed` holds these."""
    alive = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get(resource)]
    for machine in alive:
        if machine not in placed:
            placed[machine] = (
                ray.remote(HeapKeeper)
                .options(
                    name=_name(run, machine),
                    namespace=_NAMESPACE,
                    num_cpus=0,
                    max_restarts=-1,  # as often as it ends; empty, then
                    scheduling_strategy=NodeAffinitySchedulingStrategy(machine, soft=False),
                )
                .remote()
            )


def _name(run: str, machine: str) -> str:
    return f"keeper-{run}-{machine}"
