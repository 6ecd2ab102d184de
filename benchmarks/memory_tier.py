"""A worker killed under Ray, once with checkpoints on the disk, once with the same interval in memory: what each cost.

Trains twice with two Ray workers in deterministic mode and SIGKILLs one of them at the same random step. Figures of
each: the state's size, how long training stood still for a save, how long a save took behind the steps, seconds from
the kill to the next step of the run, steps done again, and whether the final checkpoints are bit for bit equal.

    python -m benchmarks.memory_tier [--seed 0] [--every 10it] [--steps 200] [key=value ...]
    python -m benchmarks.memory_tier --steps 40 --every 5it model.name=resnet50 model.shortcut=B precision=fp32
"""

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, machine, write
from benchmarks.faults import cost, kill_a_worker
from data_pipeline.ingest import prepare
from data_pipeline.sources import open_source
from tests.workers import different, final_state, reached, wait_for
from trainer.rundir import RunDirectory
from trainer.verify import verify

NEVER = "1000000it"
KINDS = {"disk": ("checkpoint_started", "checkpoint"), "memory": ("memory_save_started", "memory_save")}


def start(scratch: Path, tier: str, every: str, steps: int, overrides: list[str]) -> subprocess.Popen[bytes]:
    intervals = {"disk": f"checkpoint.every={every}", "memory": f"checkpoint.every={NEVER}"}
    memory = [f"checkpoint.memory={every}"] if tier == "memory" else []
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "launch.cli", "train", "digits", f"duration={steps}it", "deterministic=true"),
            *("log.every=1it", "evaluate.every=1000ep", intervals[tier], *memory, *overrides),
            *("--data", str(scratch / "digits"), "--runs", str(scratch / "runs"), "--name", tier),
            *("--workers", "2", "--threads", "1", "--device", "cpu"),
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )


def measure(run: RunDirectory, process: subprocess.Popen[bytes], at: int, tier: str) -> dict[str, Any]:
    """Kill a worker after step `at`, wait for the end of the run, and say what it cost."""
    wait_for(lambda: reached(run, at, 1), 600)
    killed = kill_a_worker(run, 1, random.Random(at))
    assert process.wait(600) == 0
    started, saved = ([e for e in run.events() if e["event"] == kind and e["step"] > 1] for kind in KINDS[tier])
    return {
        **cost(run, 1, killed),
        "num_saves": len(saved),
        "median_stall_seconds": statistics.median(e["stall_seconds"] for e in started),
        "median_save_seconds": statistics.median(e["seconds"] for e in saved),
        "resumed_from": next(e["path"] for e in run.events() if e["event"] == "resume").replace(str(run.path), ""),
        "verified_exactly_once": all(finding.holds for finding in verify(run)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", default="10it")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("overrides", nargs="*", help="changes to the recipe, key=value")
    options = parser.parse_args()
    at = random.Random(options.seed).randrange(options.steps // 4, options.steps // 2)
    where = machine()
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        prepare(open_source("digits", 0.0), scratch / "digits")
        runs = {tier: RunDirectory(scratch / "runs" / tier) for tier in KINDS}
        figures: dict[str, Any] = {
            "what": f"a SIGKILLed worker of two under Ray, a save every {options.every}, digits {options.overrides}"
        }
        for tier, run in runs.items():
            process = start(scratch, tier, options.every, options.steps, options.overrides)
            figures[tier] = measure(run, process, at, tier)
        states = [final_state(run) for run in runs.values()]
        figures["state_bytes"] = sum(part.numel() * part.element_size() for part in states[0].values())
        figures["tensors_that_differ"] = different(*states)
    print(write("memory-tier", figures, where), figures)


if __name__ == "__main__":
    main()
