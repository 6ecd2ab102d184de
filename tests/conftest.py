"""Fixtures that several test files share."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from data_pipeline.ingest import prepare
from data_pipeline.sources import open_source
from launch.cli import main
from tests.workers import make_job, train
from trainer.rundir import RunDirectory

# No deadline: the first example pays for imports, and machines differ. The same examples every time, so that a red
# test stays red until it is mended.
settings.register_profile("longhaul", deadline=None, derandomize=True)
settings.load_profile("longhaul")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def digits_run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A finished run on digits, of 40 steps; to be read only."""
    job = make_job(tmp_path_factory.mktemp("runs") / "digits", digits, "duration=40it", "checkpoint.every=40it")
    train(job, 1)
    return job.run


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that the input pipelines and the models run on."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible here")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded data set, prepared; read only."""
    out = tmp_path_factory.mktemp("data") / "digits"
    prepare(open_source("digits", 0.0), out)
    return out


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of 3 MB, or so many as are asked for: a checkpoint of ResNet-20 (2.3 MB) fits once."""
    size = getattr(request, "param", "3m")
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path]).returncode:
        pytest.skip("mounting a small file system needs root")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def longhaul(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    """Run the command in this process; its exit code, and what it printed on both streams."""
    monkeypatch.setattr(sys, "argv", ["longhaul", *arguments])
    try:
        main()
        code = 0
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    """`cli(*arguments)` runs the command in an empty directory: (exit code, what it printed)."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: longhaul(capsys, monkeypatch, *arguments)
