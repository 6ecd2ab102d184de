"""Two killed workers under Ray: what each cost, and whether anything of the run changed.

Trains a small recipe twice with two Ray workers in deterministic mode. Of the second run one worker is SIGKILLed at a
random step, and one in the middle of a checkpoint. Figures: seconds from each kill to the next step of the run, steps
done again, and whether the final checkpoints are bit for bit equal.

    python -m benchmarks.faults [--seed 0]
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, machine, write
from data_pipeline.ingest import prepare
from data_pipeline.sources import open_source
from tests.workers import different, final_state, reached, wait_for
from trainer.rundir import RunDirectory
from trainer.verify import verify


def start(scratch: Path, name: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "launch.cli", "train", "digits", "duration=400it", "checkpoint.every=20it"),
            *(
                "log.every=1it",
                "deterministic=true",
                "--data",
                str(scratch / "digits"),
                "--runs",
                str(scratch / "runs"),
            ),
            *("--name", name, "--workers", "2", "--threads", "1", "--device", "cpu"),
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )


def kill_a_worker(run: RunDirectory, attempt: int, generator: random.Random) -> float:
    """SIGKILL one worker of `attempt`; the time at which it happened."""
    begun = next(e for e in run.events() if e["event"] == "start" and e["attempt"] == attempt)
    os.kill(generator.choice(begun["workers"])["pid"], signal.SIGKILL)
    return time.time()


def cost(run: RunDirectory, attempt: int, killed: float) -> dict[str, Any]:
    """What the loss of a worker of `attempt` cost."""
    steps = [e for e in run.events() if e["event"] == "step"]
    last = max(e["step"] for e in steps if e["attempt"] == attempt)
    following = next(e for e in steps if e["attempt"] == attempt + 1)
    return {
        "killed_after_step": last,
        "resumed_at_step": following["step"] - 1,
        "steps_done_again": last - following["step"] + 1,
        "seconds_to_next_step": round(following["time"] - killed, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    generator = random.Random(parser.parse_args().seed)
    where = machine()
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        prepare(open_source("digits", 0.0), scratch / "digits")
        assert start(scratch, "calm").wait(300) == 0
        process = start(scratch, "killed")
        run, calm = (RunDirectory(scratch / "runs" / name) for name in ("killed", "calm"))
        at = generator.randrange(30, 150)
        wait_for(lambda: reached(run, at, 1), 120)
        first = kill_a_worker(run, 1, generator)
        wait_for(lambda: reached(run, 1, 2), 120)
        wait_for(lambda: list(run.checkpoints.glob(".tmp-*-attempt2")), 60, pause=0.0005)
        second = kill_a_worker(run, 2, generator)
        assert process.wait(300) == 0
        figures = {
            "what": "two SIGKILLed workers under Ray, digits ResNet-20, checkpoint every 20 steps",
            "at_a_random_step": cost(run, 1, first),
            "during_a_checkpoint": cost(run, 2, second),
            "attempts": (run.result() or {})["attempts"],
            "verified_exactly_once": all(finding.holds for finding in verify(run)),
            "tensors_that_differ_from_the_undisturbed_run": different(final_state(run), final_state(calm)),
        }
    print(write("faults", figures, where), figures)


if __name__ == "__main__":
    main()
