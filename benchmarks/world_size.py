"""How far runs on different numbers of workers differ: samples and crops (not at all), weights (M = 2: not at all).

Trains the digits recipe with M = 2 and with M = 8 micro-batches a step on 1 and more workers, one thread each, in
deterministic mode, and compares the final checkpoints with those of one worker.

    python -m benchmarks.world_size
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine, write
from data_pipeline.ingest import prepare
from data_pipeline.sources import open_source
from tests.workers import different, final_state, make_job, train
from trainer.verify import verify

SETTINGS = {2: (2,), 8: (2, 3, 4, 8)}
PRECISIONS = ("fp32", "bf16")


def compare(one: dict[str, torch.Tensor], many: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Whether the ledgers are equal, and how far the weights are apart."""
    weights = [name for name in one if name.startswith("model.") and one[name].is_floating_point()]
    distance = sum(float((one[n] - many[n]).square().sum()) for n in weights) ** 0.5
    size = sum(float(one[n].square().sum()) for n in weights) ** 0.5
    return {
        "same_samples_and_boxes": bool(torch.equal(one["ledger.steps"], many["ledger.steps"])),
        "bit_identical": different(one, many) == [],
        "relative_distance_of_weights": distance / size,
        "largest_difference_of_a_weight": max(float((one[n] - many[n]).abs().max()) for n in weights),
    }


def main() -> None:
    where = machine()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "digits"
        prepare(open_source("digits", 0.0), data)
        for num_micro, world_sizes in SETTINGS.items():
            for precision in PRECISIONS:
                states, scores = {}, {}
                for world_size in (1, *world_sizes):
                    job = make_job(
                        Path(scratch) / f"{num_micro}-{precision}-{world_size}", data,
                        f"batch.micro={64 // num_micro}", f"precision={precision}", "duration=10ep",
                        "checkpoint.every=5ep", "evaluate.every=10ep",
                    )  # fmt: skip
                    train(job, world_size)
                    assert all(finding.holds for finding in verify(job.run))
                    states[world_size] = final_state(job.run)
                    scores[world_size] = (job.run.result() or {})["top1"]
                for world_size in world_sizes:
                    row = {
                        "M": num_micro, "precision": precision, "workers": world_size, "against_workers": 1,
                        "steps": len(states[1]["ledger.steps"]), **compare(states[1], states[world_size]),
                        "top1": scores[world_size], "top1_of_one_worker": scores[1],
                    }  # fmt: skip
                    rows.append(row)
                    print(row, flush=True)
    print(write("world-size", {"what": __doc__.splitlines()[0], "rows": rows}, where))


if __name__ == "__main__":
    main()
