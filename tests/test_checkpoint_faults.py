"""Saving when the storage fails: training goes on, it is told, and what was there before stands."""

import os
import random
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pytest
import torch
import torch.distributed as dist

from benchmarks.kills import kill_until, small_job
from configs import LonghaulError
from launch.options import find_target
from tests import workers
from tests.s3 import Proxy, serve
from tests.workers import different, final_state, in_processes, make_job, start, state_of, train, wait, wait_for
from trainer.checkpoints.manifest import Broken, newest_valid, open_valid
from trainer.checkpoints.objects import ObjectStore
from trainer.checkpoints.saver import Checkpointer
from trainer.checkpoints.store import MANIFEST, DirectoryStore
from trainer.group import Rendezvous, join
from trainer.rundir import RunDirectory, settle_location
from trainer.verify import verify


def kinds(run: RunDirectory, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["event"] == kind]


@pytest.mark.slow
def test_kills_at_random_instants_lose_and_change_nothing(digits: Path, tmp_path: Path) -> None:
    calm = small_job(tmp_path / "calm", digits)
    train(calm, 2)
    tally = kill_until(6, tmp_path, digits, calm, random.Random(5))
    assert tally.in_a_save >= 1


@pytest.mark.parametrize("small_disk", ["12m"], indirect=True)
def test_a_disk_that_is_full_under_the_whole_run(digits: Path, small_disk: Path) -> None:
    """Checkpoints, events and TensorBoard: nothing can be written for a while."""
    job = make_job(small_disk / "run", digits, "checkpoint.every=1it", "checkpoint.keep_last=1")
    processes = start(job, 1)
    wait_for(lambda: kinds(job.run, "checkpoint"))
    filler = (small_disk / "filler").open("wb", buffering=0)
    with pytest.raises(OSError, match="No space left"):
        while True:
            filler.write(bytes(4096))
    filler.close()
    time.sleep(1.0)
    (small_disk / "filler").unlink()
    assert wait(processes) == [0]
    assert [event["step"] for event in kinds(job.run, "step")] == list(range(1, 81)), "told late, but told"
    assert any("No space left on device" in event["reason"] for event in kinds(job.run, "checkpoint_failed"))
    saved = newest_valid(job.run.store(), lambda _, why: pytest.fail(why))
    assert saved is not None and saved.step == 80


# --- one rank's storage --------------------------------------------------------------------------------------------


class Faulty(DirectoryStore):
    """A directory whose `begin` fails, or in which writing the first checkpoint hangs for a while."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.begin_fails = False
        self.hang_seconds = 0.0

    def begin(self, draft: str) -> None:
        if self.begin_fails:
            raise PermissionError("the directory is read-only")
        super().begin(draft)

    def create(self, draft: str, file: str) -> BinaryIO:
        if draft == "step-00000001-attempt1":
            time.sleep(self.hang_seconds)
        return super().create(draft, file)


class Saving:
    """A worker's checkpointer, and what rank 0 was told."""

    def __init__(self, path: Path, patience: float = 300.0) -> None:
        self.place = Rendezvous.from_environment()
        self.joined = join(self.place, torch.device("cpu"), 60)
        self.group = self.joined.__enter__()
        self.store = Faulty(path)
        self.told: list[tuple[int, str]] = []
        self.checkpointer = Checkpointer(
            self.store, self.group, 1, lambda store: store.names()[:-2],
            lambda saved, _: self.told.append((saved.step, "saved")),
            lambda _, step, why: self.told.append((step, why)), patience_seconds=patience,
        )  # fmt: skip

    def save(self, step: int) -> None:
        state = {name: torch.full((250_000,), float(step)) for name in ("x", "y")}  # one is written by each rank
        self.checkpointer.save(step, state, {})

    def end(self) -> list[tuple[int, str]]:
        self.checkpointer.close()
        self.joined.__exit__(None, None, None)
        return self.told


def save_with_one_full_disk(small: Path, large: Path) -> list[tuple[int, str]]:
    rank = int(os.environ["RANK"])
    saving = Saving((small if rank == 1 else large) / "checkpoints")
    if rank == 1:
        (small / "filler").write_bytes(bytes(2_500_000))
    for step in (1, 2, 3):
        if rank == 1:
            saving.store.begin(f"step-{step:08d}-attempt1")  # its disk is its own
        if rank == 1 and step == 3:
            (small / "filler").unlink()
        saving.save(step)
        saving.checkpointer.wait()
    return saving.end()


def test_a_disk_that_is_full_on_one_machine_only(small_disk: Path, tmp_path: Path) -> None:
    _, told = sorted(in_processes(2, save_with_one_full_disk, small_disk, tmp_path), key=len)
    assert [step for step, _ in told] == [1, 2, 3]
    assert all(why == "worker 1: [Errno 28] No space left on device" for _, why in told[:2]), told
    assert told[2] == (3, "saved")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"], "nothing half-written"


def save_where_nothing_can_be_begun(path: Path) -> list[tuple[int, str]]:
    saving = Saving(path)
    saving.save(1)
    saving.checkpointer.wait()
    saving.store.begin_fails = True
    saving.save(2)
    saving.checkpointer.wait()
    saving.store.begin_fails = False
    saving.save(3)
    return saving.end()


def test_a_draft_that_cannot_be_begun_fails_on_all_ranks(tmp_path: Path) -> None:
    nothing, told = sorted(in_processes(2, save_where_nothing_can_be_begun, tmp_path), key=len)
    assert told == [(1, "saved"), (2, "the directory is read-only"), (3, "saved")]  # fmt: skip
    assert nothing == []
    assert DirectoryStore(tmp_path).names() == ["step-00000001", "step-00000003"]


def save_while_one_hangs(path: Path, timeout: float) -> tuple[list[tuple[int, str]], bool]:
    saving = Saving(path, patience=0.3)
    saving.checkpointer._ranks = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    if saving.place.rank == 1:
        saving.store.hang_seconds = 4.0
    for step in (1, 2, 3):
        saving.save(step)
    hangs = not open_valid_names(saving.store)
    time.sleep(4.0)
    saving.checkpointer.wait()
    saving.group.barrier()
    saving.save(4)
    return saving.end(), hangs


def open_valid_names(store: DirectoryStore) -> list[str]:
    return [open_valid(store, name).name for name in store.names()]


@pytest.mark.parametrize("timeout", [60.0, 1.5])
def test_a_write_that_hangs_holds_training_up_only_once(timeout: float, tmp_path: Path) -> None:
    """For less than the ranks wait for each other, and for longer: then they get a new group."""
    _, (told, hangs) = sorted(in_processes(2, save_while_one_hangs, tmp_path, timeout), key=lambda found: len(found[0]))
    assert hangs, "what was due was not waited for"
    assert {(2, f"an earlier save to {tmp_path} still hangs"), (3, f"an earlier save to {tmp_path} still hangs")} <= {
        *told
    }
    first = next(why for step, why in told if step == 1)
    assert first == "saved" if timeout == 60.0 else "imed out" in first or "imeout" in first, told
    assert told[-1] == (4, "saved")
    names = open_valid_names(DirectoryStore(tmp_path))
    assert names == (["step-00000001", "step-00000004"] if timeout == 60.0 else ["step-00000004"])


# --- a store by URL ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Proxy, dict[str, str]]]:
    with pytest.MonkeyPatch.context() as patch, serve() as (proxy, environment):
        environment |= {"AWS_MAX_ATTEMPTS": "2"}
        for name, value in environment.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield proxy, environment


@pytest.fixture
def url(server: tuple[Proxy, dict[str, str]], request: pytest.FixtureRequest) -> str:
    return f"s3://bucket/{request.node.name}"


def put(store: ObjectStore, draft: str, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        with store.create(draft, name) as out:
            out.write(data)


def test_a_manifest_makes_a_draft_a_checkpoint(url: str) -> None:
    store = ObjectStore(url)
    assert store.names() == []
    store.begin("step-00000005-attempt1")
    put(store, "step-00000005-attempt1", {"a": b"first", "b": bytes(20_000_000)})  # in parts
    assert store.names() == []
    assert store.commit("step-00000005-attempt1", "step-00000005", b"{}") == "step-00000005-attempt1"
    assert ObjectStore(url).names() == ["step-00000005-attempt1"]
    with store.open("step-00000005-attempt1", "b") as file:
        file.seek(19_999_999)
        assert file.read() == b"\0"
    with store.open("step-00000005-attempt1", "a") as file:
        assert file.read() == b"first"
    store.remove("step-00000005-attempt1")
    assert store.names() == [] and not store._listing()


def test_an_upload_that_fails_leaves_no_object(url: str, server: tuple[Proxy, dict[str, str]]) -> None:
    store = ObjectStore(url)
    with pytest.raises(RuntimeError), store.create("step-00000001-attempt1", "a") as out:
        out.write(b"half")
        raise RuntimeError
    assert not store._listing()
    proxy, _ = server
    out = store.create("step-00000001-attempt1", "a")
    out.write(b"all of it")
    proxy.stop()
    try:
        with pytest.raises(OSError, match=r"s3://bucket/.*/step-00000001-attempt1/a: Could not connect"):
            out.close()
        with pytest.raises(OSError, match="Could not connect"):
            store.names()
    finally:
        proxy.start()
    assert not store._listing()


def test_sweeping_leaves_checkpoints_and_what_was_set_aside(url: str) -> None:
    store = ObjectStore(url)
    for name in ("step-00000001-attempt1", "step-00000002-attempt1", "step-00000003-attempt1"):
        put(store, name, {"a": b"x"})
    store.commit("step-00000001-attempt1", "", b"{}")
    store.commit("step-00000002-attempt1", "", b"{}")
    assert store.set_aside("step-00000002-attempt1", "broken") == f"{url}/step-00000002-attempt1"
    store.sweep()
    assert store.names() == ["step-00000001-attempt1"]
    assert dict(store._listing()) == {
        "step-00000001-attempt1": ["a", MANIFEST],
        "step-00000002-attempt1": ["a", f"broken-{MANIFEST}"],
    }


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_under_a_url(
    url: str, server: tuple[Proxy, dict[str, str]], digits: Path, tmp_path: Path
) -> None:
    """Saved by two workers, one of which is killed, with the newest damaged; resumed by one; the bits of a calm run."""
    _, environment = server
    calm = make_job(tmp_path / "calm", digits)
    train(calm, 2)
    job = make_job(tmp_path / "run", digits, "checkpoint.every=5it", checkpoints=url)
    processes = start(job, 2, environment)
    wait_for(lambda: len(kinds(job.run, "checkpoint")) >= 4)
    workers.kill(processes)
    wait(processes)
    store = job.run.store()
    assert str(store) == f"{url}/run" and not job.run.checkpoints.exists()
    store = ObjectStore(f"{url}/run")
    newest = store.names()[-1]
    store._files.pipe_file(store._path("step-00000099-attempt1", "__0_0.distcp"), b"left behind")
    damaged = bytearray(store._files.cat_file(store._path(newest, "__0_0.distcp")))
    damaged[1000] ^= 1
    store._files.pipe_file(store._path(newest, "__0_0.distcp"), bytes(damaged))
    train(job, 1, environment)
    (broken,) = kinds(job.run, "checkpoint_broken")
    assert broken["path"] == f"{url}/run/{newest}" and "__0_0.distcp does not have the bytes" in broken["reason"]
    assert kinds(job.run, "resume")[0]["step"] == int(newest[5:13]) - 5
    assert f"broken-{MANIFEST}" in store._listing()[newest]
    assert "step-00000099-attempt1" not in store._listing()
    assert different(final_state(job.run), final_state(calm.run)) == []
    assert all(finding.holds for finding in verify(job.run))
    assert find_target(f"{url}/run/{store.names()[-1]}", tmp_path) == (job.run, store.names()[-1])
    with pytest.raises(LonghaulError, match=r"keeps its checkpoints in s3://.*/run, not in /elsewhere/run: leave out"):
        settle_location(job.run, Path("/elsewhere"), record=True)


@pytest.mark.slow
def test_a_server_that_dies_during_saves_stops_no_training(
    url: str, server: tuple[Proxy, dict[str, str]], digits: Path, tmp_path: Path
) -> None:
    proxy, environment = server
    job = make_job(tmp_path / "run", digits, "duration=2000it", "checkpoint.every=5it", checkpoints=url)
    processes = start(job, 2, environment)
    wait_for(lambda: len(kinds(job.run, "checkpoint")) >= 1)
    proxy.stop()
    failed = wait_for(lambda: kinds(job.run, "checkpoint_failed"))
    assert "Could not connect" in failed[0]["reason"] and f"{url}/run" in failed[0]["reason"]
    assert workers.reached(job.run, failed[0]["step"] + 1) or all(process.is_alive() for process in processes)
    proxy.start()
    number = len(kinds(job.run, "checkpoint"))
    wait_for(lambda: len(kinds(job.run, "checkpoint")) > number)
    job.run.stop_file.touch()
    assert wait(processes) == [0, 0]
    saved = newest_valid(job.run.store(), lambda _, why: pytest.fail(why))
    assert saved is not None and saved.step == kinds(job.run, "stopped")[0]["step"]
    assert int(state_of(saved)["progress.step"]) == saved.step


def test_a_bucket_that_is_not_there_is_refused_at_the_start(
    server: tuple[Proxy, dict[str, str]], digits: Path, tmp_path: Path
) -> None:
    job = make_job(tmp_path / "run", digits, checkpoints="s3://no-bucket/x")
    message = workers.refusal(job, 1, server[1])
    assert "checkpoints in s3://no-bucket/x/run cannot be listed (there is no s3://no-bucket/x/run)" in message


def test_a_broken_object_is_told_from_a_server_that_does_not_answer(
    url: str, server: tuple[Proxy, dict[str, str]]
) -> None:
    store = ObjectStore(url)
    put(store, "step-00000001-attempt1", {"a": b"x"})
    store.commit("step-00000001-attempt1", "", b"not a manifest")
    with pytest.raises(Broken):
        open_valid(store, "step-00000001-attempt1")
    server[0].stop()
    try:
        with pytest.raises(
            LonghaulError, match=r"cannot be read \(.*Could not connect.*\): check the storage"
        ) as found:
            open_valid(store, "step-00000001-attempt1")
    finally:
        server[0].start()
    assert not isinstance(found.value, Broken)


def test_a_protocol_that_is_none_is_refused() -> None:
    with pytest.raises(LonghaulError, match=r"--checkpoints nonsense://x: Protocol not known: nonsense"):
        ObjectStore("nonsense://x")


def test_a_location_is_recorded_once(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "r")
    run.path.mkdir()
    settle_location(run, Path("/big"), record=False)
    assert run.checkpoint_location() == run.checkpoints
    settle_location(run, Path("/big"), record=True)
    assert run.checkpoint_location() == Path("/big/r") and str(run.store()) == "/big/r"
    run.recipe_file.write_text("seed: 0\n")
    settle_location(run, None, record=True)
    settle_location(run, Path("/big"), record=True)
    assert run.checkpoint_location() == Path("/big/r")
