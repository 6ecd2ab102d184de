"""The directory in which a data set grows until it is whole: `.NAME.unfinished`, beside where it will be.

lock          held by the `prepare` that is at work
plan.arrow    which image goes into which shard
data/         finished shards; renamed to NAME in the end
done/         a report for each finished shard
tmp/          what is being written
"""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from configs import LonghaulError
from data_pipeline.durable import synchronise
from data_pipeline.ingest.plan import Plan, Settings, differences, make_plan
from data_pipeline.ingest.shard import ShardReport
from data_pipeline.ingest.storage import whole_file, writing
from data_pipeline.sources import Source


class Unfinished:
    """The unfinished data set that is to become `out`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(f".{out.name}.unfinished")

    def refuse_existing(self) -> None:
        """Raise LonghaulError when `out` is there already."""
        if self.out.exists():
            if not (self.path / "data").exists():  # what is left of a `prepare` that was killed at its very end
                shutil.rmtree(self.path, ignore_errors=True)
            raise LonghaulError(f"{self.out} exists already: remove it, or give another --out.")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others out; raises LonghaulError when one is in. Where there is nothing to go on with, the directory is
        removed in the end."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LonghaulError(f"Another `prepare` is writing {self.out}: wait for it or stop it.") from None
            try:
                yield
            finally:
                if not (self.path / "plan.arrow").exists():
                    shutil.rmtree(self.path, ignore_errors=True)

    def clear(self) -> None:
        """Forget all that was done."""
        for name in ("plan.arrow", "data", "done", "tmp"):  # the plan first: nothing counts without it
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def plan(self, source: Source, settings: Settings) -> Plan:
        """The plan that is there, or a new one; raises LonghaulError when the one that is there was made otherwise."""
        shutil.rmtree(self.path / "tmp", ignore_errors=True)
        if not (self.path / "plan.arrow").exists():
            self.clear()  # what a `clear` that was killed has left
        with writing(self.path):
            for name in ("tmp", "data", "done"):
                (self.path / name).mkdir(exist_ok=True)
        if (self.path / "plan.arrow").exists():
            plan = self._read_plan()
            if changed := differences(plan.settings, settings.as_dict()):
                raise LonghaulError(
                    f"{self.path} was begun differently ({'; '.join(changed)}): "
                    f"give the same as then, or --restart to begin anew."
                )
            return plan
        plan = make_plan(source, settings)
        with writing(self.path), whole_file(self.path, "plan.arrow") as path:
            plan.write(path)
        return plan

    def _read_plan(self) -> Plan:
        try:
            return Plan.read(self.path / "plan.arrow")
        except (OSError, pa.ArrowException, ValueError, TypeError, KeyError) as error:
            raise LonghaulError(
                f"{self.path / 'plan.arrow'} cannot be read ({error}): begin anew with --restart."
            ) from None

    def reports(self) -> dict[str, ShardReport]:
        """The reports of the finished tasks, by the task's file."""
        reports = (ShardReport.from_json(path.read_text()) for path in (self.path / "done").glob("*.json"))
        return {report.task: report for report in reports if self._is_there(report)}

    def _is_there(self, report: ShardReport) -> bool:
        """Whether the shard has the size that the report promises: someone may have removed some of the files."""
        if report.shard is None:
            return True
        path = self.path / "data" / report.shard.file
        return path.is_file() and path.stat().st_size == report.shard.bytes

    def finish(self) -> None:
        """Give the data set its name."""
        data = self.path / "data"
        with writing(self.out):
            synchronise(data)
            data.rename(self.out)
            synchronise(self.out.parent)
        self.clear()
