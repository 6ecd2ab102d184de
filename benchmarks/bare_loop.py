"""ResNet-50 training images/s against a bare PyTorch loop, interleaved.

Both: two processes of one thread, DistributedDataParallel over gloo, bf16 autocast where `auto` means it, channels-last
batch 32 as two micro-batches of 16 at 224. The bare loop trains on tensors made beforehand and does nothing else;
ours decodes and augments real JPEGs with DALI, keeps the ledger, logs every 5 steps and evaluates nothing.

    python -m benchmarks.bare_loop --data data/imagenet-500      (made by `longhaul prepare imagenet-500.tar ...`)
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, events, machine, write

WORKERS, MICRO, WINDOW = 2, 16, 5
# What trainer/memory.py sets, from outside: the bare loop is measured without and with it.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20)}


def bare(steps: int, out: str) -> None:
    """The loop that everybody would write first; rank 0 writes the seconds of each step into `out`."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from configs.schema import Model
    from trainer.models import build_model
    from trainer.run import has_fast_bf16

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = build_model(Model(name="resnet50"), 500, 0).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, fused=True)
    criterion = torch.nn.CrossEntropyLoss()
    images = torch.randn(MICRO, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 500, (MICRO,))
    seconds = []
    for _ in range(steps):
        began = time.monotonic()
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bf16(torch.device("cpu"))):
            loss = criterion(network(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.monotonic() - began)
    if dist.get_rank() == 0:
        Path(out).write_text(" ".join(map(str, seconds)))
    dist.destroy_process_group()


def torchrun(*arguments: str, **variables: str) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **variables}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(WORKERS), *arguments]
    subprocess.run(command, check=True, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def bare_rate(steps: int, directory: Path, **variables: str) -> float:
    out = directory / "bare.txt"
    torchrun("-m", "benchmarks.bare_loop", "--bare", str(out), "--steps", str(steps), **variables)
    seconds = [float(x) for x in out.read_text().split()][WINDOW:]
    return WORKERS * MICRO / statistics.mean(seconds)


def our_rate(steps: int, directory: Path, data: Path, name: str) -> tuple[float, list[dict[str, Any]]]:
    torchrun(
        "-m", "launch.cli", "train", "resnet50", f"duration={steps}it", f"batch.size={WORKERS * MICRO}",
        f"batch.micro={MICRO}", "schedule.lr=0.05", "schedule.warmup=5it", f"log.every={WINDOW}it",
        "checkpoint.every=100000it", "evaluate.every=100000it", "--data", str(data), "--name", name,
        "--runs", str(directory), "--threads", "1", "--device", "cpu",
    )  # fmt: skip
    steps_seen = [event for event in events(directory / name) if event["event"] == "step"]
    return WORKERS * MICRO / statistics.mean(e["step_seconds"] for e in steps_seen[1:]), steps_seen


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        bare(options.steps, options.bare)
        return
    where = machine()
    rounds = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(options.rounds):
            theirs = bare_rate(options.steps, Path(scratch))
            tuned = bare_rate(options.steps, Path(scratch), **ALLOCATOR)
            ours, seen = our_rate(options.steps, Path(scratch), options.data.absolute(), f"round{number}")
            rounds.append(
                {
                    "bare": theirs,
                    "bare_with_our_allocator_settings": tuned,
                    "longhaul": ours,
                    "ratio": ours / theirs,
                    "ratio_with_our_allocator_settings": ours / tuned,
                }
            )
            print(rounds[-1], flush=True)
    figures = {
        "what": "ResNet-50 at 224, batch 32 as 2 x 16, two workers of one thread: images/s after the first 5 steps",
        "rounds": rounds,
        **{key: spread([r[key] for r in rounds]) for key in ("ratio", "ratio_with_our_allocator_settings")},
        "data_wait_share": sum(e["data_wait_seconds"] for e in seen) / sum(e["step_seconds"] for e in seen),
        "loss_of_every_5_steps": [e["loss"] for e in seen],
    }
    print(write("bare-loop", figures, where), figures["ratio"])


if __name__ == "__main__":
    main()
