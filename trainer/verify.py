"""`longhaul verify`: proof, from a run's newest checkpoint, that every epoch used every sample exactly once."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs import LonghaulError, Recipe
from data_pipeline.augment import augment
from data_pipeline.findings import Finding
from data_pipeline.order import Order, build_order
from data_pipeline.records import training_records
from data_pipeline.split import Split
from data_pipeline.storage import Location, parse_location
from trainer.checkpoints.files import load
from trainer.checkpoints.manifest import Saved, newest_valid
from trainer.ledger import Ledger, micro_digest, sample_hashes
from trainer.rundir import RunDirectory


def verify(
    run: RunDirectory, data: Location | None = None, progress: Callable[[int, int], None] | None = None
) -> list[Finding]:
    """Check the newest checkpoint of `run` against its data set (`data`, or where the run found it).

    Raises LonghaulError where there is nothing to check. `progress(done, steps)` is called as steps are recomputed.
    """
    recipe = run.recipe()
    starts = [event for event in run.events() if event["event"] == "start"]
    if not starts:
        raise LonghaulError(f"{run.path} has no start event: nothing was trained yet.")
    split = Split(data or parse_location(starts[-1]["data"]), "train", damaged=recipe.input.damaged)
    broken: list[str] = []
    saved = newest_valid(run.store(), lambda _, why: broken.append(why))
    if saved is None:
        raise LonghaulError(f"{run.store()} holds no checkpoint that verifies{': ' + broken[0] if broken else ''}.")
    order = build_order(recipe, [shard.rows for shard in split.shards])
    ledger = read_ledger(saved, order)
    imported = saved.manifest.get("imported")
    first = 0 if imported is None else imported["step"]
    return [
        Finding(
            "every file of the newest checkpoint has its bytes",
            not broken,
            broken[0] if broken else str(saved),
        ),
        *([] if imported is None else [_name_import(imported)]),
        *_check_epochs(order, ledger, saved.step, first),
        _check_steps(recipe, order, split, ledger, progress, first),
        *_name_substitutes(ledger, split),
        _check_events(run, saved.step),
    ]


def read_ledger(saved: Saved, order: Order) -> Ledger:
    """The ledger in a checkpoint."""
    ledger = Ledger.empty(order, saved.step, saved.manifest["num_substitutes"])
    load(saved, ledger.state())
    return ledger


def _name_import(imported: dict[str, Any]) -> Finding:
    """That nothing is claimed of what another program did: for people to know, the run holds."""
    source = f"imported from {imported['from']}: {imported['file']}"
    return Finding(f"steps before {imported['step']:,} were not recorded here", True, source)


def _check_epochs(order: Order, ledger: Ledger, steps: int, first: int = 0) -> list[Finding]:
    """Whole epochs against the set of all samples, without reference to any order; those under way (with repeats there
    may be several) against the part of them that the order says was reached. Of epochs that had begun at step `first`,
    with which the ledger begins, only what came after it is checked."""
    size = order.num_samples
    counts = [(order.used(epoch, first), order.used(epoch, steps)) for epoch in range(order.epochs_touched(steps))]
    whole = [epoch for epoch, count in enumerate(counts) if count == (0, size)]
    every = np.arange(size, dtype=np.int64)
    wrong = [epoch for epoch in whole if not _used(ledger, epoch, every)]
    used = f"{len(whole)} epochs of {size:,} samples" if not wrong else f"epochs {wrong[:10]} differ"
    findings = [Finding("every whole epoch used every sample exactly once", not wrong, used)]
    begun = [epoch for epoch, (before, now) in enumerate(counts) if 0 < before < now]
    under_way = [epoch for epoch, (before, now) in enumerate(counts) if before == 0 and now < size]
    for epochs, which, part in ((begun, "begun before that", "next"), (under_way, "under way", "first")):
        if epochs:
            parts = [order.first_of(epoch, counts[epoch][1])[counts[epoch][0] :] for epoch in epochs]
            holds = all(_used(ledger, epoch, ids) for epoch, ids in zip(epochs, parts, strict=True))
            what = f"the epoch {which} used its" if len(epochs) == 1 else f"the epochs {which} used their"
            figures = " and ".join(f"{len(ids):,}" for ids in parts)
            findings.append(Finding(f"{what} {part} samples exactly once", holds, f"{figures} of {size:,}"))
    return findings


def _used(ledger: Ledger, epoch: int, ids: NDArray[np.int64]) -> bool:
    """Whether an epoch used just these samples, each once."""
    hashes = sample_hashes(np.full_like(ids, epoch), ids)
    found_count, found_sum = ledger.epochs[epoch].tolist()
    return bool(found_count == len(ids) and found_sum == int(hashes.sum(dtype=np.uint64).view(np.int64)))


def _check_steps(
    recipe: Recipe,
    order: Order,
    split: Split,
    ledger: Ledger,
    progress: Callable[[int, int], None] | None,
    first: int = 0,
) -> Finding:
    """Every step's digest, from step `first` on, against samples and crop boxes computed anew from recipe and seed."""
    recorded = ledger.steps.numpy().view(np.uint64)
    wrong = []
    substitutes = {(epoch, sample): shown for epoch, sample, shown in ledger.substitutes.tolist()}
    for step in range(first, len(recorded)):
        if step_digest(recipe, order, split, step, substitutes) != int(recorded[step]):
            wrong.append(step)
        if progress is not None:
            progress(step + 1 - first, len(recorded) - first)
    figures = f"{len(recorded) - first:,} steps" if not wrong else f"{len(wrong)} steps differ, the first is {wrong[0]}"
    return Finding("every step saw the samples, crops and flips that recipe and seed give it", not wrong, figures)


def step_digest(
    recipe: Recipe, order: Order, split: Split, step: int, substitutes: dict[tuple[int, int], int] | None = None
) -> int:
    """What the ledger must hold for a step, computed from the recipe alone; `substitutes` gives, by (epoch, sample),
    what was shown in the place of damaged samples."""
    total = 0
    for micro in range(recipe.batch.num_micro):
        epochs, ids = order.micro_batch(step, micro)
        shown = ids.copy()
        for place, key in enumerate(zip(epochs.tolist(), ids.tolist(), strict=True) if substitutes else ()):
            shown[place] = (substitutes or {}).get(key, shown[place])
        drawn = augment(recipe.input, recipe.seed, epochs, shown, split.sizes[shown])
        total += micro_digest(micro, training_records(epochs, ids, shown, drawn))
    return total % 2**64


def _name_substitutes(ledger: Ledger, split: Split) -> list[Finding]:
    """The samples that could not be shown: for people to know, the run holds."""
    found = ledger.substitutes.tolist()
    if not found:
        return []
    samples = sorted({sample for _, sample, _ in found})
    named = "; ".join(split.where(sample) for sample in samples[:3]) + ("; ..." if len(samples) > 3 else "")
    return [Finding(f"{len(found)} times another sample was shown for a damaged one", True, named)]


def _check_events(run: RunDirectory, step: int) -> Finding:
    starts = sum(event["event"] == "start" for event in run.events())
    result = run.result()
    if result is None:
        return Finding("the run goes on from here", True, f"step {step:,}, {starts} attempts so far")
    holds = result["steps"] == step
    return Finding("the result belongs to the newest checkpoint", holds, f"step {result['steps']:,}, {starts} attempts")
