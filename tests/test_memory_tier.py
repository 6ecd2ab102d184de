"""The memory tier: checkpoints in the memory of machines survive any one of them; what is lost is told, not loaded."""

import hashlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from cluster.keepers import keepers
from tests.test_updates import run_with_a_fault
from tests.workers import different, final_state, make_job, train, wait_for
from trainer.checkpoints.manifest import FORMAT, Saved, newest_valid, problem_of, render
from trainer.checkpoints.memory import HeapKeeper, Keeper, KeeperStore
from trainer.job import Job
from trainer.rundir import RunDirectory


@dataclass
class Machines:
    """Keepers in this process; `lost` ones are known to be gone, `silent` ones are not yet."""

    count: int
    here: int = 0
    lost: set[int] = field(default_factory=set)
    silent: set[int] = field(default_factory=set)
    memories: list[HeapKeeper] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.memories = self.memories or [HeapKeeper() for _ in range(self.count)]

    def seen_from(self, here: int) -> "Machines":
        return Machines(self.count, here, self.lost, self.silent, self.memories)

    def near_first(self) -> list[Keeper]:
        ring = [(self.here + i) % self.count for i in range(self.count)]
        return [Silent() if i in self.silent else self.memories[i] for i in ring if i not in self.lost]


class Silent(HeapKeeper):
    """A keeper that answers nothing."""

    def __getattribute__(self, name: str) -> object:
        raise OSError("no answer")


def fingerprint(contents: bytes) -> dict[str, Any]:
    return {"bytes": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}


def save_by_one(store: KeeperStore, step: int, size: int = 1000) -> Saved:
    """Save one file, as a single worker would."""
    draft, contents = f"step-{step:08d}-attempt1", bytes(size)
    store.begin(draft)
    with store.create(draft, "__0_0.distcp") as out:
        out.write(contents)
    manifest = {"format": FORMAT, "step": step, "files": {"__0_0.distcp": fingerprint(contents)}}
    return Saved(step, store, store.commit(draft, f"step-{step:08d}", render(manifest)), manifest)


def save(machines: Machines, copies: int, step: int, attempt: int = 1) -> Saved:
    """Save a file from each machine, as a worker on each would."""
    draft = f"step-{step:08d}-attempt{attempt}"
    first = KeeperStore(machines, copies)
    first.begin(draft)
    files = {}
    for machine in range(machines.count):
        contents = f"machine {machine} at step {step}".encode() * 100
        with KeeperStore(machines.seen_from(machine), copies).create(draft, f"__{machine}_0.distcp") as out:
            out.write(contents)
        files[f"__{machine}_0.distcp"] = fingerprint(contents)
    manifest = {"format": FORMAT, "step": step, "files": files}
    return Saved(step, first, first.commit(draft, f"step-{step:08d}", render(manifest)), manifest)


@given(count=st.integers(1, 8), copies=st.integers(1, 4), data=st.data())
def test_any_machines_fewer_than_the_copies_may_be_lost(count: int, copies: int, data: st.DataObject) -> None:
    machines = Machines(count)
    saved = save(machines, copies, step=20)
    assert problem_of(saved) is None
    most = min(copies, count) - 1
    gone = data.draw(st.sets(st.integers(0, count - 1), max_size=most))
    (machines.lost if data.draw(st.booleans()) else machines.silent).update(gone)
    here = data.draw(st.sampled_from([i for i in range(count) if i not in gone]))
    found = newest_valid(KeeperStore(machines.seen_from(here), copies))
    assert found is not None and found.step == 20 and found.manifest == saved.manifest
    assert sum(len(files) for m in machines.memories for files in m.files().values()) == count * (
        min(copies, count) + 1
    )


@given(count=st.integers(3, 8), first=st.integers(0, 7))
def test_two_neighbours_lost_are_told_and_the_older_checkpoint_is_not_taken_for_it(count: int, first: int) -> None:
    machines = Machines(count)
    save(machines, 2, step=20)
    machines.lost.update({first % count, (first + 1) % count})
    told: list[str] = []
    assert newest_valid(KeeperStore(machines, 2), lambda _, why: told.append(why)) is None
    assert told == [
        f"memory of {count - 2} machine{'s' * (count > 3)}, step-00000020-attempt1/__{first % count}_0.distcp "
        f"is missing or unreadable"
    ]


def test_only_what_was_committed_is_a_checkpoint_and_a_sweep_leaves_it_alone() -> None:
    machines = Machines(2)
    store = KeeperStore(machines, 2)
    saved = save(machines, 2, step=5)
    with store.create("step-00000010-attempt1", "__0_0.distcp") as out:
        out.write(b"half a checkpoint")
    assert store.names() == [saved.name]
    store.sweep()
    assert [list(m.files()) for m in machines.memories] == [[saved.name]] * 2
    assert problem_of(saved) is None
    store.remove(saved.name)
    assert [m.files() for m in machines.memories] == [{}, {}]


def test_a_file_that_was_sent_is_read_back_from_any_place() -> None:
    machines = Machines(1)
    store = KeeperStore(machines, 2)
    with store.create("step-00000001-attempt1", "file") as out:
        out.write(bytearray(b"0123456789"))
    with store.open("step-00000001-attempt1", "file") as file:
        file.seek(3)
        assert (file.read(2), file.tell(), file.read()) == (b"34", 5, b"56789")
    with pytest.raises(FileNotFoundError, match="is in no machine's memory"):
        store.open("step-00000001-attempt1", "other")


def test_a_silent_machine_fails_the_save_and_the_checkpoint_before_stands() -> None:
    machines = Machines(3)
    save(machines, 2, step=5)
    machines.silent.add(1)
    with pytest.raises(OSError, match="no answer"):
        save(machines, 2, step=10)
    machines.silent.clear()
    machines.lost.add(1)  # by now it is known: the next save does without
    found = newest_valid(KeeperStore(machines, 2))
    assert found is not None and found.step == 5


def kinds(run: RunDirectory, kind: str, attempt: int) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["event"] == kind and event["attempt"] == attempt]


@pytest.fixture
def ray_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray cluster of this machine, with this process as its driver."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def saves(store: KeeperStore, step: int) -> bool:
    try:
        return problem_of(save_by_one(store, step)) is None
    except OSError:
        return False


@pytest.mark.slow
def test_a_keeper_that_is_killed_starts_again_empty(ray_here: None) -> None:
    with keepers("test", "CPU") as found:
        (keeper,) = found.near_first()
        store = KeeperStore(found, 2)
        saved = save_by_one(store, 5, size=10_000_000)
        assert problem_of(saved) is None and str(saved) == "memory of 1 machine, step-00000005-attempt1"
        with pytest.raises(FileNotFoundError):
            store.open(saved.name, "other")
        assert keeper.answers  # it said that there is no such file

        os.kill(ray.get(keeper.actor.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
        wait_for(lambda: saves(store, 10))
        assert store.names() == ["step-00000010-attempt1"]  # what it had kept went with it
    with pytest.raises(OSError, match="did not answer"):  # the run is over
        keeper.files()


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> RunDirectory:
    job = make_job(tmp_path_factory.mktemp("runs") / "healthy", digits)
    train(job, 1)
    return job.run


FAULTY = ("gradients={max_skipped: 6, when_exceeded: rollback}",)


def go_back(job: Job, healthy: RunDirectory) -> dict[str, Any]:
    """Train through six updates that fail, from the 40th on; the event of going back."""
    assert run_with_a_fault(job, 40, 46) == 0
    (rollback,) = kinds(job.run, "rollback", 1)
    assert not kinds(job.run, "memory_save_failed", 1)
    assert different(final_state(job.run), final_state(healthy)) == []
    return rollback


def test_going_back_may_go_to_what_is_in_memory(digits: Path, tmp_path: Path, healthy: RunDirectory) -> None:
    overrides = ("checkpoint.every=100it", "checkpoint.memory=13it")
    rollback = go_back(make_job(tmp_path / "run", digits, *FAULTY, *overrides, keepers=Machines(1)), healthy)
    assert rollback["path"] == "memory of 1 machine, step-00000039-attempt1"


def test_going_back_does_without_what_has_the_fault_in_it(digits: Path, tmp_path: Path, healthy: RunDirectory) -> None:
    overrides = ("checkpoint.every=15it", "checkpoint.memory=2it")
    rollback = go_back(make_job(tmp_path / "run", digits, *FAULTY, *overrides, keepers=Machines(1)), healthy)
    assert rollback["step"] <= 40


def test_without_ray_one_warning_says_that_there_is_no_memory_tier(digits: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "alone", digits, "duration=6it", "checkpoint.memory=2it", "evaluate.every=100it")
    train(job, 1)
    (warning,) = kinds(job.run, "warning", 1)
    assert warning["message"].startswith("checkpoint.memory is passed over: without Ray")
    assert not kinds(job.run, "memory_save_started", 1) and job.run.store().names() == ["step-00000006"]
