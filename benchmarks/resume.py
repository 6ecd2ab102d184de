"""From the command to the first update after a resume, broken down.

Two workers of one thread under torchrun on one machine train a network at 224 on real JPEGs for three updates, which
are saved; then the same command goes on for one more, several times. Times are rank 0's, in seconds since torchrun was
started, with a warm page cache.

    python -m benchmarks.resume --data data/imagenet-500 [--rounds 5]
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, machine, write

NETWORKS = {"resnet50": 8, "resnet152": 4}  # micro-batch of each worker
PHASES = {
    "_open_data": "data sets and order",
    "_build": "network and engine",
    "checkpoint_to_resume": "choose and verify the checkpoint",
    "_announce": "events, recipe, TensorBoard",
    "load": "read the state",
    "import_state": "take it over",
    "_load": "first micro-batch",
    "_forward_backward": "forward and backward",
    "_update": "update",
}


def worker(out: Path, arguments: list[str]) -> None:
    """What torchrun starts: the `longhaul` command with a clock in it."""
    marks: list[tuple[str, float, float]] = []
    began_imports = time.time()

    def timed(owner: Any, name: str) -> None:
        act: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(act)
        def with_clock(*args: Any, **kwargs: Any) -> Any:
            began = time.time()
            try:
                return act(*args, **kwargs)
            finally:
                if not any(mark == name for mark, _, _ in marks):
                    marks.append((name, began, time.time()))

        setattr(owner, name, with_clock)

    from launch.cli import main as longhaul
    from trainer import run
    from trainer.engines.base import Engine
    from trainer.loop import Loop

    imported = time.time()
    for owner, names in (
        (run, ("_open_data", "_build", "checkpoint_to_resume", "load")),
        (run._Worker, ("_announce",)),
        (Engine, ("import_state",)),
        (Loop, ("_load", "_forward_backward", "_update")),
    ):
        for name in names:
            timed(owner, name)
    sys.argv = ["longhaul", *arguments]
    try:
        longhaul()
    finally:
        if os.environ["RANK"] == "0":
            out.write_text(json.dumps({"imports": (began_imports, imported), "marks": marks}))


def once(network: str, directory: Path, data: Path, steps: int) -> dict[str, float]:
    micro = NETWORKS[network]
    out = directory / "clock.json"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "-m", "benchmarks.resume", "--worker", str(out),
        "train", "resnet50", f"model.name={network}", f"duration={steps}it", f"batch.size={2 * micro}",
        f"batch.micro={micro}", "schedule={kind: constant, lr: 0.01}", "checkpoint.every=1000it",
        "evaluate.every=1000it", "log.every=1it", "precision=bf16", "--allow-changes", "--data", str(data),
        "--name", network, "--runs", str(directory), "--threads", "1", "--device", "cpu",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    began = time.time()
    subprocess.run(command, check=True, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    found = json.loads(out.read_text())
    rows = {"torchrun": found["imports"][0] - began, "imports": found["imports"][1] - found["imports"][0]}
    rows |= {PHASES[name]: end - start for name, start, end in found["marks"] if name in PHASES}
    total = max(end for name, _, end in found["marks"] if name == "_update") - began
    rows["rendezvous and the rest"] = total - sum(rows.values())
    return {**rows, "total to the first update": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    if options.worker:
        worker(options.worker, sys.argv[sys.argv.index("--worker") + 2 :])
        return
    assert not rest, rest
    where = machine()
    networks: dict[str, Any] = {}
    for network in NETWORKS:
        with tempfile.TemporaryDirectory(dir=ROOT.parent) as scratch:
            once(network, Path(scratch), options.data.absolute(), 3)
            rounds = [once(network, Path(scratch), options.data.absolute(), 4 + i) for i in range(options.rounds)]
        networks[network] = {
            "median_seconds": {row: statistics.median(one[row] for one in rounds) for row in rounds[0]},
            "totals": [one["total to the first update"] for one in rounds],
        }
        print(network, json.dumps(networks[network], indent=1), flush=True)
    print(write("resume", {"what": __doc__.splitlines()[0], "networks": networks}, where))


if __name__ == "__main__":
    main()
