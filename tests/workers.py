"""Real training workers in processes of their own, started in a fraction of a second (torch is imported once)."""

import multiprocessing as mp
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from configs import LonghaulError, Recipe, load_recipe
from data_pipeline.storage import Location
from trainer.checkpoints.files import contents, load
from trainer.checkpoints.manifest import Saved, newest_valid
from trainer.group import free_port
from trainer.job import Job
from trainer.rundir import RunDirectory

_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["trainer.run", "torch.utils.tensorboard"])

SMALL = ("duration=80it", "checkpoint.every=15it", "evaluate.every=40it", "log.every=1it", "deterministic=true")


def small_recipe(*overrides: str) -> Recipe:
    """The digits recipe cut to 80 steps of two micro-batches, deterministic."""
    return load_recipe("digits", [*SMALL, *overrides])


def make_job(path: Path, data: Location, *overrides: str, **fields: Any) -> Job:
    """A job of `small_recipe` in the run directory `path`."""
    path.mkdir(parents=True, exist_ok=True)
    return Job(small_recipe(*overrides), data, RunDirectory(path), "cpu", threads=1, timeout_seconds=60, **fields)


def start(job: Job, world_size: int, environment: dict[str, str] | None = None) -> list[Any]:
    """Start the workers of a job, with more in their environment, and return their processes."""
    port = free_port()
    processes = [
        _CONTEXT.Process(target=_main, args=(job, rank, world_size, port, None, environment))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def wait(processes: list[Any], timeout: float = 120.0) -> list[int]:
    """Exit codes, after all have ended; what is left at the timeout is killed, which fails the test."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    assert not late, "workers did not end"
    return [process.exitcode for process in processes]


def train(job: Job, world_size: int, environment: dict[str, str] | None = None) -> None:
    """Run a job to its end."""
    assert wait(start(job, world_size, environment)) == [0] * world_size, list(job.run.events())[-3:]


def refusal(job: Job, world_size: int = 1, environment: dict[str, str] | None = None) -> str:
    """The message with which all workers refuse a job."""
    messages = _CONTEXT.Queue()
    port = free_port()
    processes = [
        _CONTEXT.Process(target=_main, args=(job, rank, world_size, port, messages, environment))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    found = {messages.get(timeout=60) for _ in processes}
    wait(processes)
    assert len(found) == 1
    return found.pop()


def scores(run: RunDirectory, views: str, world_size: int) -> list[tuple[int, int, int, float]]:
    """What each of `world_size` workers finds as the score of a run: images, top-1, top-5 and the summed loss."""
    return in_processes(world_size, _score, run, views)


def in_processes(world_size: int, act: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `act(*arguments)` returns in each of `world_size` workers that a torchrun might have started."""
    found = _CONTEXT.Queue()
    port = free_port()
    processes = [
        _CONTEXT.Process(target=_as_worker, args=(rank, world_size, port, found, act, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    result = [found.get(timeout=180) for _ in processes]
    assert wait(processes) == [0] * world_size
    return result


def wait_for(condition: Callable[[], Any], timeout: float = 90.0, pause: float = 0.002) -> Any:
    """The first true value of `condition()`."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(pause)
    raise AssertionError("it did not happen in time")


def reached(run: RunDirectory, step: int, attempt: int | None = None) -> bool:
    """Whether a step event of at least `step` has been written (in `attempt`)."""
    return any(e["event"] == "step" and e["step"] >= step and attempt in (None, e["attempt"]) for e in run.events())


def kill(processes: list[Any], number: int = signal.SIGKILL) -> None:
    """Send a signal to processes that were started here."""
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, number)


def state_of(saved: Saved) -> dict[str, torch.Tensor]:
    """Every tensor in a checkpoint, by name."""
    state = contents(saved)
    load(saved, {**state})
    return state


def final_state(run: RunDirectory) -> dict[str, torch.Tensor]:
    """Every tensor in the newest valid checkpoint of a run."""
    saved = newest_valid(run.store())
    assert saved is not None
    return state_of(saved)


def different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not bit for bit equal."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def _main(
    job: Job, rank: int, world_size: int, port: int, messages: Any = None, environment: dict[str, str] | None = None
) -> None:
    from trainer.group import Rendezvous
    from trainer.run import work

    os.environ.update({"GLOO_SOCKET_IFNAME": "lo", **(environment or {})})
    try:
        work(job, Rendezvous(rank, world_size, rank, "127.0.0.1", port), world_size)
    except LonghaulError as error:
        if messages is None:
            raise
        messages.put(str(error))


def _as_worker(
    rank: int, world_size: int, port: int, found: Any, act: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(
        GLOO_SOCKET_IFNAME="lo", RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    found.put(act(*arguments))


def _score(run: RunDirectory, views: str) -> tuple[int, int, int, float]:
    from trainer.score import How, Target, score_checkpoints

    _, score = score_checkpoints([Target(run)], how=How("cpu", 1, views))
    return score.num_images, score.num_top1, score.num_top5, score.loss_sum
