"""A run is a function of its recipe and seed: across world sizes, stops, kills and broken files."""

import signal
from pathlib import Path

import pytest
import torch

from configs import LonghaulError
from data_pipeline.ingest import prepare
from data_pipeline.sources import open_source
from tests import workers
from tests.workers import different, final_state, make_job, refusal, start, train, wait, wait_for
from trainer.job import Job
from trainer.rundir import RunDirectory
from trainer.verify import verify


@pytest.fixture(scope="module")
def undisturbed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run of two workers that nothing happened to."""
    job = make_job(tmp_path_factory.mktemp("undisturbed") / "run", digits)
    train(job, 2)
    return job


def kinds(run: RunDirectory, kind: str) -> list[dict]:
    return [event for event in run.events() if event["event"] == kind]


def assert_verified(run: RunDirectory) -> None:
    findings = verify(run)
    assert all(finding.holds for finding in findings), findings


def test_a_run_leaves_what_people_are_promised(undisturbed: Job) -> None:
    run = undisturbed.run
    steps = kinds(run, "step")
    assert [event["step"] for event in steps] == list(range(1, 81))
    assert {"epoch", "loss", "lr", "images_per_second", "data_wait_seconds"} <= steps[0].keys()
    workers_started = kinds(run, "start")[0]["workers"]
    assert [w["rank"] for w in workers_started] == [0, 1]
    assert len({w["pid"] for w in workers_started}) == 2 and all(w["host"] for w in workers_started)
    assert [event["step"] for event in kinds(run, "evaluation")] == [40, 80]
    assert [p.name for p in sorted(run.checkpoints.iterdir())] == ["step-00000060", "step-00000075", "step-00000080"]
    result = run.result()
    assert result is not None and result["num_images"] == 355 and result["steps"] == 80 and result["attempts"] == 1
    assert 0 <= result["top1"] <= result["top5"] <= 1 and result["seconds"] > 0
    assert run.recipe().precision in ("bf16", "fp32")
    assert list(run.tensorboard.glob("events.*"))
    assert_verified(run)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_worker_computes_the_bits_of_two(precision: str, digits: Path, undisturbed: Job, tmp_path: Path) -> None:
    two = undisturbed
    if undisturbed.run.recipe().precision != precision:
        two = make_job(tmp_path / "two", digits, f"precision={precision}")
        train(two, 2)
    one = make_job(tmp_path / "one", digits, f"precision={precision}")
    train(one, 1)
    assert different(final_state(one.run), final_state(two.run)) == []


def test_world_sizes_may_change_at_every_resume(digits: Path, undisturbed: Job, tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", digits)
    for attempt, world_size in enumerate((2, 1, 2), start=1):
        processes = start(job, world_size)
        if attempt < 3:
            wait_for(lambda a=attempt: workers.reached(job.run, 3, a))
            job.run.stop_file.touch()
        assert wait(processes) == [0] * world_size
    assert [event["world_size"] for event in kinds(job.run, "start")] == [2, 1, 2]
    assert len(kinds(job.run, "stopped")) == 2 and len(kinds(job.run, "resume")) == 2
    assert different(final_state(job.run), final_state(undisturbed.run)) == []
    assert_verified(job.run)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [3, 8])
def test_any_world_size_sees_the_same_samples_and_crops(world_size: int, digits: Path, tmp_path: Path) -> None:
    states = []
    for name, size in (("one", 1), ("many", world_size)):
        job = make_job(tmp_path / name, digits, "batch.micro=8", "precision=fp32", "duration=6it")
        train(job, size)
        assert_verified(job.run)
        states.append(final_state(job.run))
    one, many = states
    assert torch.equal(one["ledger.steps"], many["ledger.steps"])
    assert torch.equal(one["ledger.epochs"], many["ledger.epochs"])
    for name, tensor in one.items():
        # Sums in another order: close, not equal. Six steps at these rates stay within this.
        torch.testing.assert_close(tensor, many[name], rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_worker_ends_all_with_a_checkpoint(number: int, digits: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", digits, "duration=100000it", "checkpoint.every=100000it")
    processes = start(job, 2)
    wait_for(lambda: workers.reached(job.run, 2))
    workers.kill(processes[1:], number)
    assert wait(processes) == [0, 0]
    stopped = kinds(job.run, "stopped")[0]["step"]
    assert [p.name for p in job.run.checkpoints.iterdir()] == [f"step-{stopped:08d}"]
    assert job.run.result() is None
    assert_verified(job.run)


def test_a_flipped_byte_is_found_and_the_older_checkpoint_used(digits: Path, undisturbed: Job, tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", digits)
    processes = start(job, 2)
    wait_for(lambda: len(list(job.run.checkpoints.glob("step-*"))) >= 2)
    workers.kill(processes)
    wait(processes)
    newest = max(job.run.checkpoints.glob("step-*"))
    victim = max(newest.glob("*.distcp"), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    train(job, 2)
    (broken,) = kinds(job.run, "checkpoint_broken")
    assert victim.name in broken["reason"] and "bytes that were saved" in broken["reason"]
    assert kinds(job.run, "resume")[-1]["step"] < int(newest.name[5:])
    assert list(job.run.checkpoints.glob(f"broken-{newest.name}-*/*.distcp")), "kept for inspection"
    assert different(final_state(job.run), final_state(undisturbed.run)) == []
    assert_verified(job.run)


def test_a_full_disk_is_told_and_training_goes_on(digits: Path, small_disk: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", digits)
    job.run.checkpoints.symlink_to(small_disk)
    train(job, 2)
    failed = kinds(job.run, "checkpoint_failed")
    assert failed and "No space left" in failed[0]["reason"]
    assert [e["step"] for e in kinds(job.run, "checkpoint")] == [15]
    assert [p.name for p in small_disk.iterdir()] == ["step-00000015"], "the old one stands, nothing half-written"
    result = job.run.result()
    assert result is not None and result["steps"] == 80


def test_another_recipe_is_refused_with_the_difference(digits: Path, tmp_path: Path) -> None:
    train(make_job(tmp_path / "run", digits, "duration=2it"), 1)
    changed = make_job(tmp_path / "run", digits, "duration=3it", "schedule.lr=0.05")
    message = refusal(changed)
    assert "duration: 2it -> 3it" in message and "schedule.lr: 0.2 -> 0.05" in message and "--allow-changes" in message
    allowed = make_job(tmp_path / "run", digits, "duration=3it", "schedule.lr=0.05", allow_changes=True)
    train(allowed, 1)
    assert allowed.run.recipe().schedule.lr == 0.05


def test_other_data_is_refused(digits: Path, tmp_path: Path) -> None:
    train(make_job(tmp_path / "run", digits, "duration=1it"), 1)
    other = tmp_path / "other"
    prepare(open_source("digits", 0.0), other, shard_bytes=100_000)
    assert "was started on" in refusal(make_job(tmp_path / "run", other, "duration=1it"))


def test_too_many_workers_are_refused_by_all(digits: Path, tmp_path: Path) -> None:
    message = refusal(make_job(tmp_path / "run", digits), world_size=3)
    assert "3 workers are too many" in message and "--workers 2" in message


def test_a_finished_run_is_only_evaluated_again(digits: Path, undisturbed: Job) -> None:
    before = undisturbed.run.result()
    train(undisturbed, 1)
    after = undisturbed.run.result()
    assert before is not None and after is not None
    assert (after["top1"], after["steps"], after["attempts"]) == (before["top1"], 80, before["attempts"] + 1)


def test_evaluation_counts_are_the_same_on_any_number_of_workers(digits: Path, tmp_path: Path) -> None:
    counts = []
    for world_size in (1, 2, 3):
        job = make_job(tmp_path / str(world_size), digits, "batch.micro=8", "duration=1it", "evaluate.batch=50")
        train(job, world_size)
        counts.append(kinds(job.run, "evaluation")[-1]["num_images"])
    assert counts == [355, 355, 355]


def test_verify_finds_a_lie(digits: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", digits)
    train(job, 1)
    text = job.run.recipe_file.read_text()
    job.run.recipe_file.write_text(text.replace("seed: 0", "seed: 1"))
    assert [f.what for f in verify(job.run) if not f.holds], "another seed gives other samples"


def test_verify_needs_a_checkpoint(digits: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", digits, "duration=1it")
    train(job, 1)
    for path in job.run.checkpoints.iterdir():
        (path / "manifest.json").unlink()
    with pytest.raises(LonghaulError, match="no checkpoint that verifies"):
        verify(job.run)
