"""`longhaul checkpoint ...` as typed, on real checkpoints; and the comparison of tensors that it rests on."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from configs import LonghaulError
from tests.workers import final_state, make_job, train
from trainer.checkpoints.compare import compare_states, equal_bits, ulps
from trainer.checkpoints.inventory import bytes_by_group, bytes_by_rank, list_checkpoints, num_bytes, read_state
from trainer.checkpoints.manifest import open_checkpoint, open_valid, render
from trainer.rundir import RunDirectory

NAME = "step-00000040"
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.fixture
def copied(digits_run: RunDirectory, tmp_path: Path) -> RunDirectory:
    """A run that a test may spoil."""
    shutil.copytree(digits_run.path, tmp_path / "runs/copied")
    return RunDirectory(tmp_path / "runs/copied")


def shard_of(run: RunDirectory) -> Path:
    return run.checkpoints / NAME / "__0_0.distcp"


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_ls_tells_each_checkpoint_and_those_set_aside(cli, copied: RunDirectory) -> None:  # type: ignore[no-untyped-def]
    copied.store().set_aside(NAME, "broken")
    shutil.copytree(next(copied.checkpoints.glob("broken-*")), copied.checkpoints / NAME)
    code, output = cli("checkpoint", "ls", "copied", "--verify")
    rows = [line.split() for line in output.splitlines()]
    assert code == 0 and rows[1][:3] == [NAME, "40", "1.78"] and rows[1][-1] == "whole" and rows[1][-2].endswith("%")
    assert rows[2][0].startswith(f"broken-{NAME}") and rows[2][-2:] == ["set", "aside"]

    flip_a_byte(shard_of(copied))
    code, output = cli("checkpoint", "ls", "copied", "--verify", "--json")
    entries = json.loads(output)
    assert code == 0 and "__0_0.distcp does not have the bytes" in entries[0]["problem"]
    assert entries[0]["num_bytes"] == sum(
        p.stat().st_size for p in (copied.checkpoints / NAME).iterdir() if p.name != "manifest.json"
    )
    assert entries[0]["saved_at"] is not None, "the events tell"


def test_ls_shows_a_score_that_the_manifest_has(copied: RunDirectory) -> None:
    saved = open_checkpoint(copied.store(), NAME)
    scored = {**saved.manifest, "score": {"num_top1": 71, "num_images": 355}}
    (copied.checkpoints / NAME / "manifest.json").write_bytes(render(scored))
    (entry,) = list_checkpoints(copied, verify=False)
    assert entry.score == 0.2


def test_show_tells_what_is_in_it(cli, digits_run: RunDirectory) -> None:  # type: ignore[no-untyped-def]
    code, output = cli("checkpoint", "show", str(digits_run.checkpoints / NAME), "--tensors")
    assert code == 0
    for part in (
        "__0_0.distcp",
        "momentum",
        "num_classes",
        "model.conv1.weight",
        "16 x 3 x 3 x 3",
        "written by rank: 0:",
    ):
        assert part in output
    found = json.loads(cli("checkpoint", "show", str(digits_run.path), "--tensors", "--json")[1])
    state = final_state(digits_run)
    assert {fact["name"]: tuple(fact["shape"]) for fact in found["tensors"]} == {
        n: tuple(t.shape) for n, t in state.items()
    }
    norms = {fact["name"]: fact["norm"] for fact in found["tensors"]}
    assert norms["model.fc.weight"] == pytest.approx(float(state["model.fc.weight"].double().norm()))
    assert found["groups"]["model"] == {
        "tensors": sum(name.startswith("model.") for name in state),
        "bytes": sum(t.nbytes for name, t in state.items() if name.startswith("model.")),
    }


def test_bytes_are_told_by_rank(digits: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "two", digits, "duration=1it")
    train(job, 2)
    saved = open_valid(job.run.store(), "step-00000001")
    ranks = bytes_by_rank(saved)
    assert list(ranks) == [0, 1] and sum(ranks.values()) < num_bytes(saved)
    assert sum(size for _, size in bytes_by_group(saved).values()) <= sum(ranks.values())


def test_verify_names_the_file_and_leaves_with_1(cli, copied: RunDirectory, digits_run: RunDirectory) -> None:  # type: ignore[no-untyped-def]
    assert cli("checkpoint", "verify", "copied", str(digits_run.path), "--all")[0] == 0
    flip_a_byte(shard_of(copied))
    code, output = cli("checkpoint", "verify", str(digits_run.path), str(copied.checkpoints / NAME))
    assert code == 1 and "yes" in output and "NO" in output and f"{NAME}/__0_0.distcp" in output
    (copied.checkpoints / NAME / "manifest.json").unlink()
    code, output = cli("checkpoint", "verify", str(copied.checkpoints / NAME))
    assert code == 1 and "manifest.json is missing" in output


def test_diff_of_equal_checkpoints_is_0_and_of_different_ones_1(cli, digits: Path, digits_run: RunDirectory) -> None:  # type: ignore[no-untyped-def]
    other = make_job(Path("runs/other").absolute(), digits, "duration=2it", "seed=1")
    same = make_job(Path("runs/same").absolute(), digits, "duration=40it", "checkpoint.every=40it")
    train(same, 2)  # M = 2: the same bits on two workers
    train(other, 1)
    code, output = cli("checkpoint", "diff", str(digits_run.path), "same")
    assert code == 0 and "Equal bit for bit" in output
    code, output = cli("checkpoint", "diff", "same", "other", "--ignore", "ledger", "--json")
    found = json.loads(output)
    assert code == 1 and not found["equal"]
    names = {difference["name"] for difference in found["differences"]}
    assert "model.conv1.weight" in names and not any(name.startswith("ledger.") for name in names)
    assert cli("checkpoint", "diff", "same", "other", "--only", "guard")[0] == 0
    code, output = cli("checkpoint", "diff", "same", "other", "--only", "model")
    assert code == 1 and "model.conv1.weight" in output and "ULPs" in output and "momentum" not in output


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_merge_is_the_same_bits_and_says_where_it_is_from(cli, digits_run: RunDirectory, suffix: str) -> None:  # type: ignore[no-untyped-def]
    out = Path(f"whole{suffix}")
    arguments = ("checkpoint", "merge", str(digits_run.path), str(out))
    assert cli(*arguments)[0] == 0
    if suffix == ".pt":
        found = torch.load(out, weights_only=True)
        tensors, metadata = found["tensors"], found["metadata"]
    else:
        tensors = load_file(out)
        with safe_open(out, "pt") as file:
            metadata = file.metadata()
    assert not compare_states(tensors, final_state(digits_run))
    assert metadata["step"] == "40" and metadata["recipe_sha256"] == digits_run.recipe_sha256() != ""
    code, output = cli(*arguments, "--only", "model")
    assert code == 2 and "--force" in output
    assert cli(*arguments, "--only", "model", "--force")[0] == 0
    assert "momentum_buffer" not in out.read_bytes().decode("latin1")
    assert [path.name for path in Path().iterdir()] == [out.name], "nothing is left beside it"


def test_convert_there_and_back(cli, digits: Path, digits_run: RunDirectory) -> None:  # type: ignore[no-untyped-def]
    code, output = cli("checkpoint", "convert", str(digits_run.path), "ds", "--to", "deepspeed", "--stage", "1")
    assert code == 0 and "ZeRO stage 1 on 1 rank," in output
    back = ("checkpoint", "convert", "ds", "runs/back", "--recipe", "digits", "--data", str(digits), "duration=40it")
    code, output = cli(*back)
    assert code == 0 and "longhaul train digits duration=40it" in output and "--name back" in output
    assert cli("checkpoint", "diff", "back", str(digits_run.path), "--ignore", "ledger")[0] == 0
    code, output = cli(*back)
    assert code == 2 and "runs/back exists" in output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("ls", "ghost"), ["ghost", "no run"]),
        (("diff", "RUN", "RUN", "--only", "modle"), ["'modle'", "momentum"]),
        (("merge", "RUN", "out.zip"), ["out.zip", ".safetensors"]),
        (("convert", "RUN", "out", "--to", "tensorflow"), ["--to tensorflow", "deepspeed"]),
        (("convert", "RUN", "out.pth", "--to", "torchvision"), ["cifar-resnet20", "torchvision"]),
        (("convert", "nothing.pth", "runs/x", "--recipe", "digits", "--data", "d"), ["nothing.pth", "DeepSpeed"]),
        (("convert", "nothing.pth", "runs/x"), ["--recipe", "--data"]),
    ],
)
def test_a_mistake_is_one_sentence(cli, digits_run: RunDirectory, arguments: tuple[str, ...], named: list[str]) -> None:  # type: ignore[no-untyped-def]
    code, output = cli("checkpoint", *(str(digits_run.path) if word == "RUN" else word for word in arguments))
    assert code == 2
    (message,) = [line for line in output.splitlines() if "Error:" in line]
    assert all(part in message for part in named)


class Marker:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_malicious_index_runs_nothing(cli, copied: RunDirectory, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Of a checkpoint that somebody sent, whose manifest agrees with its files."""
    saved = open_checkpoint(copied.store(), NAME)
    index = copied.checkpoints / NAME / ".metadata"
    index.write_bytes(pickle.dumps(Marker(tmp_path / "taken")))
    marks = {path.name: _mark(path) for path in (copied.checkpoints / NAME).iterdir() if path.name != "manifest.json"}
    (copied.checkpoints / NAME / "manifest.json").write_bytes(render({**saved.manifest, "files": marks}))
    assert cli("checkpoint", "verify", "copied")[0] == 0, "these are the bytes that its author saved"
    for command in (("show", "copied"), ("diff", "copied", "copied"), ("merge", "copied", "out.pt")):
        code, output = cli("checkpoint", *command)
        assert code == 2 and ".metadata" in output and "posix.mkdir" in output
    assert not (tmp_path / "taken").exists()
    with index.open("rb") as file:
        pickle.load(file)
    assert (tmp_path / "taken").exists(), "which shows that the file was one to be afraid of"


def _mark(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_nothing_is_left_is_told(digits_run: RunDirectory) -> None:
    saved = open_checkpoint(digits_run.store(), NAME)
    with pytest.raises(LonghaulError, match="no tensors"):
        read_state(saved, only=["ema"])


@given(FLOATS, FLOATS)
def test_ulps_count_the_numbers_between(a: float, b: float) -> None:
    """By stepping: from a number to the next is one, also over zero and from one binade to the next."""
    first, second = torch.tensor([a]), torch.tensor([b])
    distance = int(ulps(first, second))
    assert (distance == 0) == (a == b) and distance == int(ulps(second, first))
    one_nearer = torch.nextafter(first, second)
    assert a == b or int(ulps(one_nearer, second)) == distance - 1


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]
)
def test_a_difference_of_one_element_is_found_and_measured(dtype: torch.dtype) -> None:
    a = torch.full((3, 4), 2).to(dtype)
    b = a.clone()
    b[1, 2] = 3
    (found,) = compare_states({"x": a}, {"x": b})
    assert (found.num_different, found.num_elements, found.largest_absolute) == (1, 12, 1.0)
    assert found.largest_relative == pytest.approx(1 / 3)
    steps = {torch.float64: 2**51, torch.float32: 2**22, torch.bfloat16: 2**6, torch.float16: 2**9}
    assert found.largest_ulps == steps.get(dtype)


def test_bits_are_compared_not_values() -> None:
    nan = torch.tensor([float("nan")])
    assert equal_bits(nan, nan.clone())
    (found,) = compare_states({"x": torch.tensor([0.0, 1.0])}, {"x": torch.tensor([-0.0, 1.0])})
    assert (found.num_different, found.largest_absolute, found.largest_ulps) == (1, 0.0, 0)
    (found,) = compare_states({"x": torch.tensor([0.0])}, {"x": nan})
    assert found.largest_absolute != found.largest_absolute


def test_names_and_forms_that_differ_are_told() -> None:
    one = {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2)}
    other = {"b": torch.zeros(3), "c": torch.zeros(2).double(), "d": torch.zeros(2)}
    found = {difference.name: difference.what for difference in compare_states(one, other)}
    assert found == {
        "a": "only in the first",
        "b": "float32 [2] and float32 [3]",
        "c": "float32 [2] and float64 [2]",
        "d": "only in the second",
    }


@pytest.mark.parametrize("command", ["ls", "show", "verify", "diff", "merge", "convert"])
def test_every_command_shows_examples(cli, command: str) -> None:  # type: ignore[no-untyped-def]
    code, output = cli("checkpoint", command, "--help")
    assert code == 0 and f"longhaul checkpoint {command}" in " ".join(output.split())
