"""Training on Ray: starts the workers, forms their rendezvous, and starts them again after a failure."""

import logging
import os
import time
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.backend import BackendConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer  # the public path is still V1: pin Ray

from cluster.keepers import keepers
from configs import LonghaulError
from trainer.job import Job
from trainer.rundir import Events, RunDirectory


@dataclass(frozen=True)
class Placement:
    """How a job is spread over the cluster.

    Attributes:
        num_workers: training processes, one GPU or one CPU each.
        max_failures: how often the workers may be lost before the run is given up.
        verbose: whether Ray's own log lines are shown.
    """

    num_workers: int
    max_failures: int = 100
    verbose: bool = False


def connect(verbose: bool) -> None:
    """Join the Ray cluster that RAY_ADDRESS or a running `ray start` names, or start one of this machine alone."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # decided here, or a stray ~/.ray/auth_token decides
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # an actor more to start, and nothing listens yet
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what Ray will do anyway; unset, it warns
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default of 15 lets anything else on the machine go first
    ray.init(
        include_dashboard=False,  # of a cluster of its own; one that runs already has what it was started with
        log_to_driver=verbose,
        logging_level=logging.INFO if verbose else logging.ERROR,
    )


def train_on_ray(job: Job, placement: Placement) -> None:
    """Run the job to its end on the connected cluster. How it ended stands in the run's events.

    Raises LonghaulError when the cluster is too small, or when the workers were lost too often.
    """
    use_gpu = _uses_gpus(job, placement.num_workers)
    name = f"attempts-{time.time_ns()}"  # of its own: Ray must not resume for us
    if job.recipe.checkpoint.memory is None:
        _fit(job, placement, use_gpu, name)
    else:
        with keepers(name, "GPU" if use_gpu else "CPU") as found:
            _fit(replace(job, keepers=found), placement, use_gpu, name)


def _fit(job: Job, placement: Placement, use_gpu: bool, name: str) -> None:
    """Start workers, and again after each failure, until the run has ended."""
    trainer = DataParallelTrainer(
        _worker,
        train_loop_config={"job": job},
        # A backend of Ray's own would form the process group, and a failure there would not be retried.
        backend_config=BackendConfig(),
        scaling_config=ScalingConfig(
            num_workers=placement.num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": 1, "GPU": 1} if use_gpu else {"CPU": 1},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(job.run.path / "ray"),
            failure_config=FailureConfig(max_failures=placement.max_failures),
            callbacks=[_NoteFailures(job.run)],  # type: ignore[list-item]  # Ray's annotation names the V1 class
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        last = str(error).strip().splitlines()[-1]
        raise LonghaulError(
            f"The workers were lost more than {placement.max_failures} times; the last time: {last}. "
            f"The same command goes on from the newest checkpoint; --debug shows all."
        ) from error


def count_workers(job: Job, wanted: int) -> int:
    """`wanted`, or where that is 0 one worker for each GPU, else each CPU, of the cluster, as far as there is work."""
    if wanted:
        return wanted
    resources = ray.cluster_resources()
    gpus = 0 if job.device == "cpu" else int(resources.get("GPU", 0))
    return max(1, min(gpus or int(resources.get("CPU", 0)), job.recipe.batch.num_micro))


def _uses_gpus(job: Job, num_workers: int) -> bool:
    """Whether workers get a GPU each; raises LonghaulError where the cluster cannot ever hold them."""
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    if job.device == "cuda" and gpus < num_workers:
        raise LonghaulError(
            f"--device cuda with --workers {num_workers}: the cluster has {gpus} GPUs; "
            f"use --device cpu or fewer workers."
        )
    use_gpu = job.device == "cuda" or (job.device == "auto" and gpus >= num_workers)
    if not use_gpu and cpus < num_workers:
        raise LonghaulError(f"--workers {num_workers}: the cluster has {cpus} CPUs, and each worker needs one.")
    return use_gpu


def _worker(config: dict[str, Any]) -> None:
    """What each Ray worker runs; started again, in a new process, after every failure."""
    from trainer.group import Rendezvous, free_port  # here, so that the driver need not import torch and DALI
    from trainer.run import work

    job: Job = config["job"]
    context = ray.train.get_context()
    here = f"{ray.util.get_node_ip_address()}:{free_port()}"
    host, port = broadcast_from_rank_zero(here).rsplit(":", 1)
    place = Rendezvous(context.get_world_rank(), context.get_world_size(), context.get_local_rank(), host, int(port))
    try:
        work(job, place, context.get_local_world_size())
    except LonghaulError as error:
        # The user has to mend it, so it is no failure to retry. Told through Ray: the run directory may be the trouble.
        ray.train.report({"mend": str(error)})


class _NoteFailures(UserCallback):
    """Writes what the workers cannot write themselves into the run's events; called in Ray's controller."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        del run_context, checkpoint
        events = Events(self._run)
        events.write("error", message=metrics[0]["mend"])
        events.close()

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        del run_context
        events = Events(self._run)
        for rank, error in worker_exceptions.items():
            events.write("worker_failure", rank=rank, error=_first_words(error))
        events.close()


def _first_words(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:500]
