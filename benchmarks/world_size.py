"""How far runs on different numbers of workers differ: samples and crops (not at all), weights, with and without
`reproducible`.

Trains the digits recipe for 5 epochs with M micro-batches of 16 a step on 1 and more workers, one thread each, in
deterministic mode, and compares their checkpoints after 10 steps and at the end with those of one worker.

    python -m benchmarks.world_size
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine, write
from data_pipeline.ingest import prepare
from data_pipeline.sources import open_source
from tests.workers import different, final_state, make_job, state_of, train
from trainer.checkpoints.manifest import checkpoint_name, open_valid
from trainer.rundir import RunDirectory
from trainer.verify import verify

SETTINGS = {2: (2,), 4: (2, 3, 4), 6: (2, 3, 4)}
EARLY = 10
State = dict[str, torch.Tensor]


def distance(one: State, many: State) -> float:
    """Of all weights and batch-norm statistics together, relative to their norm."""
    weights = [name for name in one if name.startswith("model.") and one[name].is_floating_point()]
    apart = sum(float((one[n].double() - many[n].double()).square().sum()) for n in weights) ** 0.5
    return apart / sum(float(one[n].double().square().sum()) for n in weights) ** 0.5


def early_state(run: RunDirectory) -> State:
    return state_of(open_valid(run.store(), checkpoint_name(EARLY)))


def main() -> None:
    where = machine()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "digits"
        prepare(open_source("digits", 0.0), data)
        for num_micro, world_sizes in SETTINGS.items():
            for precision in ("fp32", "bf16"):
                for reproducible in ("false", "true"):
                    states, early, scores = {}, {}, {}
                    for world_size in (1, *world_sizes):
                        job = make_job(
                            Path(scratch) / f"{num_micro}-{precision}-{reproducible}-{world_size}", data,
                            f"batch.size={16 * num_micro}", "batch.micro=16", f"precision={precision}", "duration=5ep",
                            "checkpoint.every=1000ep", f"checkpoint.keep_every={EARLY}it", "evaluate.every=5ep",
                            f"reproducible={reproducible}",
                        )  # fmt: skip
                        train(job, world_size)
                        assert all(finding.holds for finding in verify(job.run))
                        states[world_size], early[world_size] = final_state(job.run), early_state(job.run)
                        scores[world_size] = (job.run.result() or {})["top1"]
                    one = states[1]
                    for world_size in world_sizes:
                        many = states[world_size]
                        row = {
                            "M": num_micro, "precision": precision, "reproducible": reproducible == "true",
                            "workers": world_size, "against_workers": 1, "steps": len(one["ledger.steps"]),
                            "same_samples_and_boxes": bool(torch.equal(one["ledger.steps"], many["ledger.steps"])),
                            "bit_identical": different(one, many) == [],
                            f"relative_distance_after_{EARLY}_steps": distance(early[1], early[world_size]),
                            "relative_distance_at_the_end": distance(one, many),
                            "top1": scores[world_size], "top1_of_one_worker": scores[1],
                        }  # fmt: skip
                        rows.append(row)
                        print(row, flush=True)
    what = "Digits, 5 epochs, on different numbers of workers, against the run of one worker"
    print(write("world-size", {"what": what, "rows": rows}, where))


if __name__ == "__main__":
    main()
