"""The degradation problem and its cure (He et al. 2015, figure 6) on a schedule that fits a small machine.

Trains plain and residual networks of 20 and 56 layers on CIFAR-10 with the paper's hyperparameters and its schedule cut
to `--iterations` (the rate divided by 10 at one half and at three quarters, as at 32,000 and 48,000 of 64,000), each in
one process of `--threads` threads, one after the other; runs that are there go on. Writes the curves of training and
test error; `longhaul analyse` draws them.

    longhaul prepare cifar10/ --out data/cifar10
    python -m benchmarks.degradation --data data/cifar10 --runs runs/degradation
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import events, machine, write
from trainer.rundir import RunDirectory

NETWORKS = ("plain20", "resnet20", "plain56", "resnet56")


def train(network: str, data: Path, runs: Path, iterations: int, threads: int) -> None:
    """Train one network, or finish its training. With torch's momentum, not Caffe's: so it was measured."""
    if RunDirectory(runs / network).result() is not None:
        return
    command = [
        sys.executable, "-m", "launch.cli", "train", f"cifar10-{network}", "optimizer.style=torch",
        f"duration={iterations}it", f"schedule.milestones=[{iterations // 2}it,{iterations * 3 // 4}it]",
        f"evaluate.every={iterations // 8}it", "log.every=50it", f"checkpoint.every={iterations // 8}it",
        "--data", str(data), "--runs", str(runs), "--name", network, "--local", "--threads", str(threads),
    ]  # fmt: skip
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})


def curves(run: Path) -> dict[str, Any]:
    """Errors (%) over steps: of training as means over each 1/24 of the run, of the test set where it was evaluated."""
    steps = [e for e in events(run) if e["event"] == "step"]
    every = -(-len(steps) // 24)
    parts = [steps[first : first + every] for first in range(0, len(steps), every)]
    training = [(part[-1]["step"], _error(sum(e["train_top1"] for e in part) / len(part))) for part in parts]
    held_out = [(e["step"], _error(e["top1"])) for e in events(run) if e["event"] == "evaluation"]
    return {
        "training_error": training[-1][1],
        "test_error": held_out[-1][1],
        "training": training,
        "test": held_out,
        "commit": next(e["commit"] for e in events(run) if e["event"] == "start"),
        "seconds": (RunDirectory(run).result() or {}).get("seconds"),
    }


def _error(top1: float) -> float:
    return round(100 * (1 - top1), 2)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--runs", type=Path, required=True)
    options.add_argument("--iterations", type=int, default=2400)
    options.add_argument("--threads", type=int, default=1)
    given = options.parse_args()
    where = machine()
    for network in NETWORKS:
        train(network, given.data, given.runs, given.iterations, given.threads)
    figures = {network: curves(given.runs / network) for network in NETWORKS}
    for network, found in figures.items():
        print(f"{network:9} training error {found['training_error']:6.2f} %   test error {found['test_error']:6.2f} %")
    print(write("degradation", {"iterations": given.iterations, "networks": figures}, where))


if __name__ == "__main__":
    main()
