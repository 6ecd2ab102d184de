"""The memory tier on Ray: an actor on every machine keeps the newest checkpoint. The driver starts them, so that they
outlive the workers and end with the run."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
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
            # One that is gone or too slow is not waited for again; another's full object store is not its fault.
            self.answers = not isinstance(error, RayActorError | GetTimeoutError)
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
        return [keeper for machine in ring if (keeper := self._ask_for(machine)) is not None and keeper.answers]

    def _ask_for(self, machine: str) -> RayKeeper | None:
        """A machine's keeper. One that does not answer is looked up again: the driver replaces those that ended."""
        known = self._known.get(machine)
        if known is None or not known.answers:
            actor = _find(self._run, machine)
            if actor is None:
                return None
            if known is None or actor != known.actor:
                self._known[machine] = RayKeeper(actor)
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
    for node in ray.nodes():
        machine = node["NodeID"]
        if node["Alive"] and node["Resources"].get(resource) and _find(run, machine) is None:
            placed[machine] = (
                ray.remote(HeapKeeper)
                .options(
                    name=_name(run, machine),
                    namespace=_NAMESPACE,
                    num_cpus=0,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(machine, soft=False),
                )
                .remote()
            )


def _find(run: str, machine: str) -> Any | None:
    """A machine's keeper, if there is one that Ray does not know to have ended."""
    try:
        return ray.get_actor(_name(run, machine), _NAMESPACE)
    except ValueError:
        return None


def _name(run: str, machine: str) -> str:
    return f"keeper-{run}-{machine}"
