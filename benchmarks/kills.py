"""Many kills of real training, at random instants and inside saves: does every resume work, and is nothing changed?

Trains ResNet-20 on the embedded digits with two workers, deterministic and with a checkpoint at every step, again and
again until the kills are used up. A third of them fall anywhere in a worker's life, from its first moment on; a third
after training has begun; a third are aimed into a save, by watching for its draft. Half kill one worker, half both.
After every kill the newest checkpoint must be valid and of one piece, none may be broken, and none that was there may
be lost. Every run must end with the bits of an undisturbed one and prove that it used every sample exactly once.

    python -m benchmarks.kills [--kills 200] [--seed 0]
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import machine, write
from data_pipeline.ingest import prepare
from data_pipeline.sources import open_source
from tests.workers import different, final_state, kill, make_job, reached, start, state_of, train, wait
from trainer.checkpoints.manifest import newest_valid
from trainer.job import Job
from trainer.rundir import RunDirectory
from trainer.verify import verify

INSTANTS = ("of a worker's life", "of training", "of a save")
WORLD_SIZE = 2


@dataclass
class Tally:
    """What became of the kills so far.

    Attributes:
        in_a_save: kills that left a draft behind.
        too_late: attempts that had ended before they were to be killed; not counted as kills.
        steps_done_again: steps that a kill took back, over all runs.
    """

    kills: int = 0
    in_a_save: int = 0
    too_late: int = 0
    runs: int = 0
    attempts: int = 0
    steps_done_again: int = 0


def small_job(path: Path, data: Path) -> Job:
    """40 steps with a checkpoint at each."""
    return make_job(path, data, "duration=40it", "checkpoint.every=1it", "checkpoint.keep_last=2")


def kill_until(num_kills: int, scratch: Path, data: Path, calm: Job, generator: random.Random) -> Tally:
    """Train runs like `calm` under kills, until there were `num_kills`; raises AssertionError for whatever changed."""
    tally = Tally()
    expected = final_state(calm.run)
    while tally.kills < num_kills:
        tally.runs += 1
        job = small_job(scratch / f"run-{tally.runs}", data)
        while job.run.result() is None and tally.kills < num_kills:
            _one_attempt(job, tally, generator)
        if job.run.result() is None:
            train(job, WORLD_SIZE)
        assert different(final_state(job.run), expected) == []
        findings = verify(job.run)
        assert all(finding.holds for finding in findings), findings
        result = job.run.result() or {}
        tally.attempts += result["attempts"]
        tally.steps_done_again += sum(event["event"] == "step" for event in job.run.events()) - result["steps"]
    return tally


def _one_attempt(job: Job, tally: Tally, generator: random.Random) -> None:
    before = newest_step(job.run)
    earlier = sum(event["event"] == "start" for event in job.run.events())
    drafts = set(job.run.checkpoints.glob(".tmp-step-*"))
    processes = start(job, WORLD_SIZE)
    instant = INSTANTS[tally.kills % 3]
    if instant == "of training":
        _wait_while(processes, lambda: not reached(job.run, 1, earlier + 1))
    if instant == "of a save":
        aimed = before + generator.randrange(1, 8)
        _wait_while(processes, lambda: not list(job.run.checkpoints.glob(f".tmp-step-{aimed:08d}-*")))
        time.sleep(generator.uniform(0, 0.02))
    else:
        time.sleep(generator.uniform(0, 1.0 if instant == "of training" else 3.0))
    if any(process.exitcode is not None for process in processes):
        tally.too_late += 1
    else:
        tally.kills += 1
    kill([generator.choice(processes)] if generator.random() < 0.5 else processes)
    wait(processes)
    tally.in_a_save += bool(set(job.run.checkpoints.glob(".tmp-step-*")) - drafts)
    assert newest_step(job.run) >= before, "a checkpoint was lost"


def _wait_while(processes: list[Any], condition: Callable[[], Any]) -> None:
    while condition() and processes[0].is_alive():
        time.sleep(0.0005)


def newest_step(run: RunDirectory) -> int:
    """The step of the newest checkpoint, 0 for none; raises AssertionError where one is broken or mixed."""
    broken: list[str] = []
    saved = newest_valid(run.store(), lambda _, why: broken.append(why))
    assert not broken, broken
    if saved is None:
        return 0
    state = state_of(saved)
    assert int(state["progress.step"]) == saved.step == len(state["ledger.steps"])
    return saved.step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="kills", help="of the file in benchmarks/results/")
    arguments = parser.parse_args()
    where = machine()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        prepare(open_source("digits", 0.0), scratch / "digits")
        calm = small_job(scratch / "calm", scratch / "digits")
        train(calm, WORLD_SIZE)
        tally = kill_until(arguments.kills, scratch, scratch / "digits", calm, random.Random(arguments.seed))
    figures = {
        "what": "two workers of digits ResNet-20 killed at random instants, a checkpoint at every step",
        **asdict(tally),
        "broken_checkpoints": 0,
        "lost_checkpoints": 0,
        "runs_whose_tensors_differ": 0,
        "runs_not_verified_exactly_once": 0,
        "seconds": round(time.monotonic() - began, 1),
    }
    print(write(arguments.name, figures, where), figures)


if __name__ == "__main__":
    main()
