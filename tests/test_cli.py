"""The `longhaul` command as typed: what it prints, and that every mistake is one sentence and a non-zero exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = ("train", "digits", "--name", "x", "--local")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((*TRAIN, "optimizer.momentun=0.9"), ["optimizer.momentun", "did you mean 'momentum'"]),
        ((*TRAIN, "batch.micro=30"), ["batch.micro=30", "batch.size=64", "try batch.micro=32"]),
        ((*TRAIN, "duration=soon"), ["duration", "'soon'", "90ep"]),
        ((*TRAIN, "momentum"), ["'momentum'", "key=value"]),
        (("train", "digit", "--name", "x"), ["'digit'", "did you mean 'digits'"]),
        (("train", "mine.yaml", "--name", "x"), ["mine.yaml"]),
        ((*TRAIN, "--data", "nowhere"), ["nowhere", "longhaul prepare"]),
        (("train", "resnet50", "--name", "x", "--local"), ["--data"]),
        ((*TRAIN, "--device", "cuda"), ["--device cuda", "no CUDA GPU", "--device cpu"]),
        ((*TRAIN, "--device", "tpu"), ["--device tpu", "auto, cpu or cuda"]),
        ((*TRAIN, "--workers", "2"), ["--workers 2", "torchrun --nproc-per-node 2"]),
        ((*TRAIN, "model.name=resnet20"), ["'resnet20'", "cifar-resnet20"]),
        ((*TRAIN, "model.num_classes=5"), ["model.num_classes=5", "10 classes"]),
        ((*TRAIN, "input.size=32"), ["8x8", "input.size is 32"]),
        (("prepare", "nowhere", "--out", "d"), ["nowhere", "path or URL of a data set"]),
        (("verify", "ghost"), ["ghost", "no run"]),
        (("report", "ghost"), ["ghost", "no run"]),
        (("eval", "ghost"), ["ghost", "no run"]),
    ],
)
def test_a_mistake_is_one_sentence(cli, arguments: tuple[str, ...], named: list[str]) -> None:  # type: ignore[no-untyped-def]
    if "cuda" in arguments:
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a GPU here")
    code, output = cli(*arguments)
    assert code == 2
    (message,) = [line for line in output.splitlines() if "Error:" in line]
    for part in named:
        assert part.lower() in message.lower()
    assert "Traceback" not in output


def test_debug_shows_the_traceback(cli, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("LONGHAUL_DEBUG", "")  # so that what --debug sets is undone after the test
    with pytest.raises(Exception, match="There is no run"):
        cli("--debug", "verify", "ghost")


def test_from_images_to_report_in_one_process(cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, output = cli("prepare", "digits", "--out", "data/digits")
    assert code == 0 and "1,442 train, 355 val; 10 classes" in output
    assert cli("prepare", "digits", "--out", "data/digits")[0] == 2, "nothing is overwritten"

    train = ("train", "digits", "duration=20it", "--data", "data/digits", "--name", "t", "--local", "--threads", "1")
    code, output = cli(*train)
    assert code == 0, output
    assert "1 worker (" in output and "355 held-out images; 20 steps" in output and "runs/t/report.html" in output
    result = json.loads((tmp_path / "runs/t/result.json").read_text())

    assert "finished already" in cli(*train)[1]
    code, output = cli(*train, "seed=3")
    assert code == 2 and "seed: 0 -> 3" in output and "--allow-changes" in output

    code, output = cli("eval", "t", "--threads", "1")
    assert code == 0 and f"top-1 {result['top1']:.2%}" in output and "355 images" in output
    checkpoint = tmp_path / "runs/t/checkpoints/step-00000020"
    assert cli("eval", str(checkpoint), "--threads", "1")[1].split(": ", 1)[1] == output.split(": ", 1)[1]

    code, output = cli("verify", "t")
    assert code == 0 and "NO" not in output and "20 steps" in output

    shard = next(checkpoint.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    code, output = cli("eval", str(checkpoint))
    assert code == 2 and shard.name in output
    assert cli("verify", "t")[0] == 2, "no checkpoint is left that verifies"


def test_prepare_writes_quiet_lines_into_a_log(cli, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("launch.prepare._LOG_SECONDS", 0.2)  # instead of 30 s
    code, output = cli("prepare", "digits", "--out", "d")
    lines = [line for line in output.splitlines() if "of 1,797 images" in line]
    assert code == 0 and lines and all("images/s, about" in line and "left" in line for line in lines)


@pytest.mark.slow
def test_two_torchrun_processes_need_no_ray_and_write_the_embedded_data_once(tmp_path: Path) -> None:
    train = ("-m", "launch.cli", "train", "digits", "duration=4it", "--name", "t", "--runs", str(tmp_path / "runs"))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *train, "--threads", "1"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1,442 train, 355 val") == 1
    assert "2 workers" in done.stdout and "355 held-out images; 4 steps" in done.stdout


def test_verify_leaves_with_1_when_something_does_not_hold(cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert cli("train", "digits", "duration=3it", "--name", "t", "--local", "--threads", "1")[0] == 0
    recipe = tmp_path / "runs/t/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("flip: false", "flip: true"))
    code, output = cli("verify", "t")
    assert code == 1 and "NO" in output and "3 steps differ" in output


def test_doctor_says_what_will_be_used(cli) -> None:  # type: ignore[no-untyped-def]
    code, output = cli("doctor")
    assert code == 0
    for component in ("torch", "DALI", "NCCL", "apex", "Ray", "DeepSpeed"):
        assert component in output


@pytest.mark.parametrize("command", ["prepare", "recipes", "train", "eval", "verify", "card", "report", "doctor"])
def test_every_command_shows_examples(cli, command: str) -> None:  # type: ignore[no-untyped-def]
    code, output = cli(command, "--help")
    assert code == 0 and f"longhaul {command}" in " ".join(output.split())
