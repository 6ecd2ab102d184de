"""The main job as a user runs it, through `longhaul` and Ray, with workers killed and Ctrl-C pressed."""

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.ingest import prepare
from data_pipeline.sources import open_source
from tests.workers import SMALL, different, final_state, make_job, reached, train, wait_for
from trainer.rundir import RunDirectory
from trainer.verify import verify

# Generous: on a busy machine Ray's own processes alone take a minute to start.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

OVERRIDES = (*SMALL, "duration=300it", "checkpoint.every=15it")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "digits"
    prepare(open_source("digits", 0.0), out)
    return out


def command(data: Path, runs: Path, name: str) -> list[str]:
    return [
        *(sys.executable, "-m", "launch.cli", "train", "digits", *OVERRIDES, "checkpoint.memory=5it"),
        *(
            "--data",
            str(data),
            "--runs",
            str(runs),
            "--name",
            name,
            "--workers",
            "2",
            "--threads",
            "1",
            "--device",
            "cpu",
        ),
    ]


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen]]:
    """Processes to be ended, whatever happens, when the test is over."""
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            process.terminate()
            process.wait(120)


def popen(arguments: list[str], started: list[subprocess.Popen]) -> subprocess.Popen:
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A suite that was started in the background ignores Ctrl-C, and what it starts would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    started.append(process)
    return process


def pids(run: RunDirectory, attempt: int) -> list[int]:
    """Process ids of the workers of an attempt, once they have taken a step."""
    if not reached(run, 1, attempt):
        return []
    return [w["pid"] for e in run.events() if e["event"] == "start" and e["attempt"] == attempt for w in e["workers"]]


def test_killed_workers_change_nothing(data: Path, tmp_path: Path, started: list[subprocess.Popen]) -> None:
    """One worker is killed at a random step, another in the middle of a checkpoint; the run ends by itself, goes on
    from the newest copy, in memory mostly, every sample was used exactly once, and the weights are bit for bit those of
    a run that nothing happened to."""
    generator = random.Random(11)
    run = RunDirectory(tmp_path / "runs" / "killed")
    process = popen(command(data, tmp_path / "runs", "killed"), started)

    at = generator.randrange(20, 240)
    wait_for(lambda: reached(run, at, 1), 240)
    os.kill(generator.choice(pids(run, 1)), signal.SIGKILL)

    victims = wait_for(lambda: pids(run, 2), 240)
    wait_for(lambda: list(run.checkpoints.glob(".tmp-*-attempt2")), 60, pause=0.0005)
    os.kill(generator.choice(victims), signal.SIGKILL)

    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    result = run.result()
    assert result is not None and result["attempts"] == 3 and result["steps"] == 300
    assert output.count("was lost") >= 2 and "Resumed at step" in output
    for attempt in (1, 2):
        saved = [e for e in run.events() if e["event"] in ("checkpoint", "memory_save") and e["attempt"] == attempt]
        (resumed,) = [e for e in run.events() if e["event"] == "resume" and e["attempt"] == attempt + 1]
        assert resumed["step"] >= max((e["step"] for e in saved), default=1)
        assert resumed["step"] % 15 == 0 or resumed["path"].startswith("memory of 1 machine, step-")
    assert all(finding.holds for finding in verify(run))

    calm = make_job(tmp_path / "calm", data, *OVERRIDES)
    train(calm, 2)
    assert different(final_state(run), final_state(calm.run)) == []


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(
    data: Path, tmp_path: Path, started: list[subprocess.Popen]
) -> None:
    run = RunDirectory(tmp_path / "runs" / "stopped")
    arguments = command(data, tmp_path / "runs", "stopped")
    process = popen(arguments, started)
    wait_for(lambda: reached(run, 20), 240)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 130, output
    stopped = next(e["step"] for e in run.events() if e["event"] == "stopped")
    assert f"Stopped at step {stopped}; the checkpoint is saved." in output
    assert "Go on with the same command:" in output and "--name stopped" in output
    assert (run.checkpoints / f"step-{stopped:08d}" / "manifest.json").is_file()

    again = popen(arguments, started)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert f"Resumed at step {stopped}" in output
    assert re.search(r"stopped: top-1 \d+\.\d\d%, top-5 \d+\.\d\d% of 355 held-out images; 300 steps", output)
    assert run.report_file.is_file() and f"Report: {run.report_file}" in output.replace("\n", "")
    assert all(finding.holds for finding in verify(run))


def test_mistakes_that_only_the_workers_see_are_one_sentence(
    data: Path, tmp_path: Path, started: list[subprocess.Popen]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in data.iterdir():
        (broken / path.name).write_bytes(
            path.read_bytes()[:-1000] if path.name.startswith("train-") else path.read_bytes()
        )
    process = popen(command(broken, tmp_path / "runs", "broken"), started)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    assert "Traceback" not in output
    assert "Error: The shard" in output and "train-00000.arrow" in output and "prepare the data set again" in output
