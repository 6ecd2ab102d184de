"""Make a data set: plan, have the shards written, conclude."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from configs import LonghaulError
from data_pipeline.durable import synchronise
from data_pipeline.ingest.plan import SHARD_BYTES, Plan, Settings
from data_pipeline.ingest.processes import in_this_process
from data_pipeline.ingest.shard import Executor, PixelSums, ShardReport, WriteShard
from data_pipeline.ingest.storage import writing
from data_pipeline.ingest.unfinished import Unfinished
from data_pipeline.ingest.verify import Options
from data_pipeline.shards import INDEX_SCHEMA, SCHEMA, Manifest, Shard, map_batch, write_batch
from data_pipeline.sources import Source


def prepare(
    source: Source,
    out: Path,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
    options: Options | None = None,
    shuffle: bool | None = None,
    identity: dict[str, Any] | None = None,
    restart: bool = False,
    executor: Executor = in_this_process,
    say: Callable[[str], None] | None = None,
) -> Manifest:
    """Write `source` as a data set into the new directory `out`, or go on where an earlier call was interrupted.

    The same source and options give the same bytes, whoever writes the shards and however often it was interrupted.
    Images that cannot be used are left out and named, with the reason, in the manifest's `quarantined` and in
    `quarantine.tsv`. `out` appears only when it is whole.

    Args:
        shard_bytes: the size of a shard, estimated from the sizes of the images in the source.
        progress: called as `progress(done, total)` with numbers of images, at first and as they are done.
        shuffle: store the training images in a pseudo-random order, always the same, rather than in the source's; None:
            unless the source is `sequential`.
        identity: what the source was opened with, to be compared when an earlier call is continued (`fingerprint`).
        restart: forget what an earlier call has done.
        executor: who writes the shards.
        say: told in a sentence what is going on.

    Raises:
        LonghaulError: `out` exists; another process is writing it; it was begun with other options; no training image
            could be decoded; the disk is full; the source cannot be read. What is finished is kept.
    """
    options = options or Options()
    if shuffle is None:
        shuffle = not source.sequential
        if source.sequential and say is not None:
            say("The source's order is kept, for reading it in another takes many times longer; --shuffle does so.")
    settings = Settings(source.name, options, shard_bytes, shuffle, identity or {})
    unfinished = Unfinished(out.absolute())
    unfinished.refuse_existing()
    with unfinished.locked():
        unfinished.refuse_existing()  # by the one that held the lock until now
        if restart:
            unfinished.clear()
        plan = unfinished.plan(source, settings)
        reports = unfinished.reports()
        tasks = [task for task in plan.tasks if task.file not in reports]
        done_before = sum(report.images for report in reports.values())
        if reports and say is not None:
            say(f"Going on: {len(reports):,} of {len(plan.tasks):,} shards are finished already.")

        def show(done: int) -> None:
            if progress is not None:
                progress(done_before + done, plan.rows.num_rows)

        show(0)
        for report in executor(WriteShard(unfinished.path, plan.id, source, options), tasks, show):
            reports[report.task] = report
        return _conclude(unfinished, plan, [reports[task.file] for task in plan.tasks], settings)


def _conclude(unfinished: Unfinished, plan: Plan, reports: list[ShardReport], settings: Settings) -> Manifest:
    splits: dict[str, list[Shard]] = {}
    for task, report in zip(plan.tasks, reports, strict=True):
        if report.shard is not None:
            splits.setdefault(task.split, []).append(report.shard)
    quarantined = [entry for report in reports for entry in report.quarantined]
    if "train" not in splits:
        unfinished.clear()
        raise LonghaulError(
            f"No image of '{settings.source}' could be decoded; nothing was written. "
            f"The first: {quarantined[0]['key']}: {quarantined[0]['reason']}."
        )
    mean, std = sum((report.sums for report in reports), PixelSums()).mean_and_std()
    data = unfinished.path / "data"
    with writing(unfinished.path):
        manifest = Manifest(
            name=settings.source,
            classes=plan.classes,
            splits=splits,
            indexes={split: _write_index(data, split, shards) for split, shards in splits.items()},
            mean=mean,
            std=std,
            source=settings.source,
            encoding="raw" if settings.options.raw else "jpeg",
            options=settings.recorded(),
            source_bytes=sum(report.source_bytes for report in reports),
            quarantined=quarantined,
            shuffled=settings.shuffled or None,
        )
        _write_quarantine(data / "quarantine.tsv", quarantined)
        manifest.write(data)
        for path in data.iterdir():
            synchronise(path)
    unfinished.finish()
    return manifest


def quarantine_counts(manifest: Manifest) -> dict[str, int]:
    """How many images were left out for each kind of reason, the most frequent first."""
    return dict(Counter(entry["kind"] for entry in manifest.quarantined).most_common())


def _write_index(directory: Path, split: str, shards: list[Shard]) -> Shard:
    batches = [map_batch(directory / shard.file, SCHEMA, shard.rows).select(INDEX_SCHEMA.names) for shard in shards]
    whole = pa.Table.from_batches(batches, INDEX_SCHEMA).combine_chunks().to_batches()[0]
    return write_batch(directory / f"{split}.index.arrow", whole)


def _write_quarantine(path: Path, quarantined: list[dict[str, str]]) -> None:
    """One line an image: kind, key, reason; tabs and line breaks in names become spaces."""
    if quarantined:
        lines = [["kind", "key", "reason"], *([e["kind"], e["key"], e["reason"]] for e in quarantined)]
        path.write_text("".join("\t".join(" ".join(part.split()) for part in line) + "\n" for line in lines))
