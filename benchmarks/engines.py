"""Seconds a step with each engine, and with the reproducible sum, as ratios to DDP; interleaved in one run.

Two processes of one thread train ResNet-50 at 128 in bf16 on tensors made beforehand, each engine a few steps in turn,
for several rounds; M = 2 micro-batches a step (one each) and M = 8 (four each).

    python -m benchmarks.engines [--rounds 5]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, machine, write

MICRO, STEPS = 8, 3
ARMS = {
    "ddp": ("engine=ddp", "deterministic=false"),
    "ddp deterministic": ("engine=ddp",),
    "ddp reproducible": ("reproducible=true",),
    "ddp reduce=bf16": ("engine.reduce=bf16", "deterministic=false"),
    "fsdp2": ("engine=fsdp2", "deterministic=false"),
    "zero0": ("engine=deepspeed", "engine.zero_stage=0", "deterministic=false"),
    "zero1": ("engine=deepspeed", "engine.zero_stage=1", "deterministic=false"),
    "zero2": ("engine=deepspeed", "engine.zero_stage=2", "deterministic=false"),
    "zero3": ("engine=deepspeed", "engine.zero_stage=3", "deterministic=false"),
}


def measure(rounds: int, out: Path) -> None:
    """One rank's part; rank 0 writes the seconds of each arm's rounds."""
    import torch

    from tests.workers import small_recipe
    from trainer.dealing import deal
    from trainer.engines import build_engine
    from trainer.group import Rendezvous, join
    from trainer.memory import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(1)
    found: dict[str, dict[str, list[float]]] = {}
    with join(Rendezvous.from_environment(), torch.device("cpu"), 600) as group:
        images = torch.randn(MICRO, 3, 128, 128).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, 1000, (MICRO,))
        for num_micro in (2, 8):
            engines: dict[str, Any] = {}
            for arm, overrides in ARMS.items():
                recipe = small_recipe(
                    "model.name=resnet50", f"batch.size={num_micro * MICRO}", f"batch.micro={MICRO}", "input.size=128",
                    "precision=bf16", *overrides,
                )  # fmt: skip
                engines[arm] = build_engine(recipe, 100_000, 1000, group)
            seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
            for round_number in range(rounds + 1):
                for arm, engine in engines.items():
                    group.barrier()
                    began = time.monotonic()
                    for step in range(STEPS if round_number else 1):
                        for micro in deal(num_micro, group.world_size, group.rank):
                            engine.forward_backward(images, labels, step, micro)
                        engine.update(step, 0.01)
                    group.barrier()
                    if round_number:  # the first makes buffers
                        seconds[arm].append((time.monotonic() - began) / STEPS)
            found[f"M={num_micro}"] = seconds
            engines.clear()
        if group.rank == 0:
            out.write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.rounds, options.measure)
        return
    where = machine()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "found.json"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "benchmarks.engines"]
        subprocess.run(
            [*command, "--rounds", str(options.rounds), "--measure", str(out)], check=True, cwd=ROOT, env=env
        )
        found = json.loads(out.read_text())
    ratios = {
        case: {
            arm: {
                "seconds_a_step": statistics.median(rounds),
                "ratio_to_ddp": statistics.median(a / b for a, b in zip(rounds, arms["ddp"], strict=True)),
                "ratios": [a / b for a, b in zip(rounds, arms["ddp"], strict=True)],
            }
            for arm, rounds in arms.items()
        }
        for case, arms in found.items()
    }
    print(json.dumps(ratios, indent=1))
    print(write("engines", {"what": __doc__.splitlines()[0], "rounds": options.rounds, "cases": ratios}, where))


if __name__ == "__main__":
    main()
