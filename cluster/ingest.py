"""Ingest on Ray: the shards of a plan as tasks of one CPU each, on whichever machines have room."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from configs import LonghaulError
from data_pipeline.ingest import Executor, ShardReport, WriteShard
from data_pipeline.ingest.plan import Task

_MAX_RETRIES = 10  # of a shard whose machine or process was lost

# In a Ray worker: what its tasks share, by the plan's id, so that what a source has read of its archive is kept.
_known: dict[str, WriteShard] = {}


def on_ray(num_workers: int) -> Executor:
    """An executor on the connected cluster, with `num_workers` tasks at a time; raises LonghaulError where it has
    fewer CPUs. The data set's directory must be on storage that all machines share."""
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if cpus < num_workers:
        raise LonghaulError(f"--workers {num_workers}: the cluster has {cpus} CPUs, and each worker needs one.")

    def run(work: WriteShard, tasks: Sequence[Task], progress: Callable[[int], None]) -> Iterator[ShardReport]:
        shared = [ray.put(work)]  # in a list Ray passes the reference on
        waiting = iter(tasks)
        running: dict[Any, Task] = {}
        finished = 0
        try:
            while True:
                while len(running) < num_workers and (task := next(waiting, None)) is not None:
                    running[_write.remote(work.plan_id, shared, task)] = task
                if not running:
                    return
                ready, _ = ray.wait(list(running))
                for reference in ready:
                    task = running.pop(reference)
                    report = _result(reference, task)
                    finished += report.images
                    progress(finished)
                    yield report
        finally:
            for reference in running:
                ray.cancel(reference, force=True)

    return run


@ray.remote(num_cpus=1, max_retries=_MAX_RETRIES)
def _write(plan_id: str, shared: list[Any], task: Task) -> ShardReport:
    if plan_id not in _known:
        _known[plan_id] = ray.get(shared[0])
    return _known[plan_id](task, lambda _: None)


def _result(reference: Any, task: Task) -> ShardReport:
    try:
        report: ShardReport = ray.get(reference)
        return report
    except RayTaskError as error:
        if isinstance(error.cause, LonghaulError):
            raise LonghaulError(str(error.cause)) from None
        raise
    except RayError as error:
        raise LonghaulError(
            f"The Ray worker that wrote {task.file} was lost {_MAX_RETRIES + 1} times ({type(error).__name__}); "
            f"what is finished is kept, and the same command goes on."
        ) from error
