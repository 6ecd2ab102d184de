"""The process group: who we are among the workers, the device, and agreement between ranks."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from configs import LonghaulError


@dataclass(frozen=True)
class Group:
    """This worker's place.

    Attributes:
        gradients: the group that reduces gradients (NCCL on GPUs, gloo on CPUs).
        control: a gloo group for small decisions, beside the gradients.
        saving: a gloo group of the checkpoint thread's own; sharing one with training would deadlock.
    """

    rank: int
    world_size: int
    device: torch.device
    gradients: Any
    control: Any
    saving: Any

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable `value`, in order of rank, on every rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_zero(self, value: Any) -> Any:
        """Rank 0's picklable `value` on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def barrier(self) -> None:
        dist.barrier(group=self.control)


@dataclass(frozen=True)
class Rendezvous:
    """Where the workers meet: rank, number of workers, rank on this machine, and rank 0's address."""

    rank: int
    world_size: int
    local_rank: int
    master_address: str
    master_port: int

    @classmethod
    def from_environment(cls) -> "Rendezvous":
        """What torchrun sets, or a group of one where it is not there."""
        if "RANK" not in os.environ:
            return cls(0, 1, 0, "127.0.0.1", free_port())
        env = os.environ
        return cls(
            int(env["RANK"]),
            int(env["WORLD_SIZE"]),
            int(env.get("LOCAL_RANK", "0")),
            env["MASTER_ADDR"],
            int(env["MASTER_PORT"]),
        )


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def pick_device(wanted: str, local_rank: int) -> torch.device:
    """The device for `--device auto|cpu|cuda`; raises LonghaulError for a GPU that is not there."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise LonghaulError("--device cuda: no CUDA GPU is visible here; use --device cpu, or see `longhaul doctor`.")
    if local_rank >= torch.cuda.device_count():
        raise LonghaulError(
            f"--device cuda: worker {local_rank} of this machine has no GPU ({torch.cuda.device_count()} visible); "
            f"use fewer workers."
        )
    return torch.device("cuda", local_rank)


@contextmanager
def join(place: Rendezvous, device: torch.device, timeout_seconds: float) -> Iterator[Group]:
    """Form the process groups and leave them at the end."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://{place.master_address}:{place.master_port}",
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        timeout = timedelta(seconds=timeout_seconds)
        control = dist.new_group(backend="gloo", timeout=timeout)
        saving = dist.new_group(backend="gloo", timeout=timeout)
        yield Group(place.rank, place.world_size, device, dist.group.WORLD, control, saving)
    finally:
        dist.destroy_process_group()


def together(group: Group, act: Callable[[], Any]) -> Any:
    """Do something on every rank; where one fails for a reason the user can mend, all raise it, so that none waits."""
    problem, result = None, None
    try:
        result = act()
    except LonghaulError as error:
        problem = str(error) if group.world_size == 1 else f"{error} (On {socket.gethostname()}.)"
    problems = [p for p in group.gather(problem) if p is not None]
    if problems:
        raise LonghaulError(problems[0])
    return result
