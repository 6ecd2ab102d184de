"""Scores of several networks at once are exact, and batch-norm statistics the plain average they claim to be."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

from configs import LonghaulError, Recipe, dump
from data_pipeline.ingest import prepare
from data_pipeline.loader import training_batches
from data_pipeline.order import build_order
from data_pipeline.sources import open_source
from data_pipeline.split import Split
from data_pipeline.views import central_view
from launch.cli import app
from tests.workers import in_processes, make_job, small_recipe, state_of, train
from trainer.batchnorm import exact_statistics, replaced_statistics
from trainer.checkpoints.manifest import FORMAT, MANIFEST, checkpoint_name, render
from trainer.evaluate import Member, Score, evaluate, evaluate_ensemble, log_mean
from trainer.group import Group
from trainer.job import Job
from trainer.models import build_model
from trainer.predict import Predictor, place
from trainer.rundir import RunDirectory
from trainer.schedules import total_steps
from trainer.score import How, Target, score_checkpoints
from trainer.weights import choose_checkpoint, load_network

CPU = torch.device("cpu")
NUM_HELD_OUT = 355


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "digits"
    prepare(open_source("digits", 0.0), out)
    return out


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Job]:
    """Three short runs: the second of another network and precision, the third of other pixels."""
    root = tmp_path_factory.mktemp("runs")
    differently: list[tuple[str, ...]] = [
        (),
        ("seed=1", "model.name=cifar-plain20", "precision=bf16", "evaluate.batch=40"),
        ("seed=2", "input.mean=[0.5, 0.5, 0.5]", "input.std=[0.5, 0.5, 0.5]"),
    ]
    jobs = []
    for number, changes in enumerate(differently):
        common = ("duration=25it", "precision=fp32", "checkpoint.every=25it", "evaluate.every=25it")
        jobs.append(make_job(root / f"run{number}", digits, *common, *changes))
        train(jobs[-1], 1)
    return jobs


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Group]:
    """A group of one."""
    from trainer.group import Rendezvous, join

    with join(Rendezvous.from_environment(), CPU, timeout_seconds=60) as group:
        yield group


def targets(jobs: list[Job]) -> list[Target]:
    return [Target(job.run) for job in jobs]


def loaded(job: Job) -> tuple[nn.Module, Recipe]:
    recipe = job.run.recipe()
    network = load_network(recipe, choose_checkpoint(job.run, None))
    return place(network, recipe, CPU), recipe


# --- one network -------------------------------------------------------------------------------------------------


def test_a_checkpoint_scores_what_training_reported(runs: list[Job]) -> None:
    for job in runs:
        (one,), score = score_checkpoints([Target(job.run)], how=How("cpu", 1))
        result = job.run.result()
        assert result is not None and one.score == score and not one.averaged and one.norm_batches == 0
        assert {key: result[key] for key in score.as_dict()} == score.as_dict()


def test_an_observer_sees_every_image_once_with_the_scores_that_were_counted(
    runs: list[Job], digits: Path, alone: Group
) -> None:
    network, recipe = loaded(runs[0])
    ids: list[int] = []
    correct, losses = 0, []

    def observe(seen: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        nonlocal correct
        assert seen.dtype == labels.dtype == torch.int64 and logits.shape == (len(seen), 10)
        assert np.array_equal(split.labels[seen.numpy()], labels)
        ids.extend(seen.tolist())
        correct += int((logits.argmax(1) == labels).sum())
        losses.append(float(nn.functional.cross_entropy(logits, labels, reduction="sum")))

    with closing(Split(digits, "val")) as split:
        score = evaluate(Predictor(network, recipe, CPU), split, recipe, alone, 1, observe=observe)
    assert sorted(ids) == list(range(NUM_HELD_OUT))
    assert (score.num_top1, score.loss_sum) == (correct, math.fsum(losses))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_predictions_are_made_in_the_precision_of_the_recipe_and_given_in_float32(
    precision: str, dtype: torch.dtype
) -> None:
    recipe = small_recipe(f"precision={precision}")
    network = place(build_model(recipe.model, 10, 0), recipe, CPU)
    seen = []
    network.get_submodule("layer1").register_forward_hook(lambda *called: seen.append(called[2]))
    logits = Predictor(network.train(), recipe, CPU)(torch.randn(2, 3, 8, 8))
    assert logits.dtype == torch.float32 and not logits.requires_grad and not network.training
    assert seen[0].dtype == dtype
    assert network.get_parameter("conv1.weight").is_contiguous(memory_format=torch.channels_last)


# --- ensembles ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**31))
def test_the_softmax_of_the_log_mean_is_the_mean_of_the_softmaxes(members: int, classes: int, seed: int) -> None:
    drawn = torch.randn(members, 3, classes, generator=torch.Generator().manual_seed(seed)) * 30
    mean = drawn.double().softmax(2).mean(0)
    torch.testing.assert_close(log_mean(list(drawn)).softmax(1), mean, rtol=1e-9, atol=1e-300)


def test_an_ensemble_is_the_mean_of_its_members_probabilities(runs: list[Job], digits: Path, alone: Group) -> None:
    """Each member's probabilities found by itself, and averaged in NumPy."""
    probabilities = np.zeros((NUM_HELD_OUT, 10))

    def observe(seen: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        probabilities[seen.numpy()] += logits.double().softmax(1).numpy() / len(runs)

    members = []
    with closing(Split(digits, "val")) as split:
        for job in runs:
            network, recipe = loaded(job)
            members.append(Member(Predictor(network, recipe, CPU), central_view(recipe.input)))
            evaluate(members[-1].predict, split, recipe, alone, 1, observe=observe)
        *_, found = evaluate_ensemble(members, split, 50, alone, 1)
    right = probabilities[np.arange(NUM_HELD_OUT), split.labels]
    assert found.num_top1 == int((probabilities.argmax(1) == split.labels).sum())
    assert found.num_top5 == int(((probabilities > right[:, None]).sum(1) < 5).sum())
    assert found.loss_sum == pytest.approx(-np.log(right).sum(), rel=1e-6)


def test_members_score_beside_the_ensemble_what_they_score_alone(runs: list[Job]) -> None:
    members, ensemble = score_checkpoints(targets(runs), how=How("cpu", 1))
    for job, one in zip(runs, members, strict=True):
        (_, score) = score_checkpoints([Target(job.run)], how=How("cpu", 1))
        assert (one.score.num_top1, one.score.num_top5) == (score.num_top1, score.num_top5)
        assert one.score.loss_sum == pytest.approx(score.loss_sum, rel=1e-5), "its batches may have another size"
    assert ensemble.num_images == NUM_HELD_OUT and ensemble not in [one.score for one in members]


def test_networks_that_see_the_same_pixels_share_them(runs: list[Job]) -> None:
    one, two, three = (central_view(job.run.recipe().input) for job in runs)
    assert one == two != three
    other_training = small_recipe("input.flip=true", "input.crop={kind: resized_crop}", "input.pca_colour=0.1").input
    assert central_view(other_training) == one, "what is of training alone does not count"


def _score_all(paths: list[Path], how: How) -> tuple[list[Score], Score]:
    members, ensemble = score_checkpoints([Target(RunDirectory(path)) for path in paths], how=how)
    return [one.score for one in members], ensemble


def test_ensemble_and_exact_batch_norm_have_the_same_bits_on_one_worker_and_on_two(runs: list[Job]) -> None:
    arguments = ([job.run.path for job in runs], How("cpu", 1, norm_batches=5))
    alone = _score_all(*arguments)
    assert alone != _score_all(arguments[0], How("cpu", 1)), "exact statistics change the score"
    assert in_processes(2, _score_all, *arguments) == [alone, alone]


def test_what_cannot_be_an_ensemble_is_refused(runs: list[Job], digits: Path, tmp_path: Path) -> None:
    data = tmp_path / "other"
    prepare(open_source("digits", 0.0), data, shard_bytes=100_000)
    other = make_job(tmp_path / "other-run", data, "duration=1it", "model.num_classes=12")
    train(other, 1)
    both = [Target(runs[0].run), Target(other.run)]
    with pytest.raises(LonghaulError, match=r"other-run was trained on .* whose contents differ: give --data"):
        score_checkpoints(both, None, How("cpu", 1))
    told = r"tells 12 classes apart and .*run0.* 10: an ensemble needs the same classes"
    with pytest.raises(LonghaulError, match=told):
        score_checkpoints(both, digits, How("cpu", 1))


def test_data_of_more_classes_than_the_network_has_is_refused(runs: list[Job], tmp_path: Path) -> None:
    with pytest.raises(LonghaulError, match=r"tells 10 classes apart but .* has 12: give --data"):
        score_checkpoints([Target(runs[0].run)], twelve_classes(tmp_path), How("cpu", 1))


def twelve_classes(root: Path) -> Path:
    from PIL import Image

    for number in range(24):
        path = root / "source" / ("train", "val")[number // 12] / f"{number % 12:02d}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (10 * number, 0, 0)).save(path)
    prepare(open_source(str(root / "source"), 0.0), root / "twelve")
    return root / "twelve"


# --- averaged weights --------------------------------------------------------------------------------------------


def test_averaged_weights_are_scored_where_they_are_asked_for(runs: list[Job], tmp_path: Path) -> None:
    """A checkpoint whose average is the weights of another run."""
    plain, average = runs[0].run, runs[2].run
    run = RunDirectory(tmp_path / "averaged")
    recipe = plain.recipe().model_copy(update={"ema": small_recipe("ema={decay: 0.9}").ema})
    run.path.mkdir()
    run.recipe_file.write_text(dump(recipe))
    run.events_file.write_text(plain.events_file.read_text())
    weights = {f"ema.{name[6:]}": t for name, t in newest(average).items() if name.startswith("model.")}
    write_checkpoint(run, {**newest(plain), **weights})

    def score(weights: Any) -> tuple[bool, Score]:
        (one,), _ = score_checkpoints([Target(run)], how=How("cpu", 1, weights=weights))
        return one.averaged, one.score

    assert score("plain") == (False, score_checkpoints(targets(runs[:1]), how=How("cpu", 1))[1])
    assert score("ema") == score("auto") == score(None)
    averaged, of_average = score("ema")
    network, _ = loaded(runs[2])
    assert averaged and of_average == directly(network, recipe, runs[0].data)
    with pytest.raises(LonghaulError, match="the recipe keeps none: use plain"):
        score_checkpoints(targets(runs[:1]), how=How("cpu", 1, weights="ema"))


def directly(network: nn.Module, recipe: Recipe, data: Any) -> Score:
    from trainer.group import Rendezvous, join

    with closing(Split(data, "val")) as split, join(Rendezvous.from_environment(), CPU, 60) as group:
        return evaluate(Predictor(network, recipe, CPU), split, recipe, group, 1)


def newest(run: RunDirectory) -> dict[str, torch.Tensor]:
    return state_of(choose_checkpoint(run, None))


def write_checkpoint(run: RunDirectory, state: dict[str, torch.Tensor]) -> None:
    import hashlib

    path = run.checkpoints / checkpoint_name(25)
    path.mkdir(parents=True)
    dcp.save(state, checkpoint_id=path, no_dist=True)
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in path.iterdir()
    }
    (path / MANIFEST).write_bytes(render({"format": FORMAT, "step": 25, "num_classes": 10, "files": files}))


# --- batch norm --------------------------------------------------------------------------------------------------


def micro_batches(recipe: Recipe, split: Split, count: int) -> list[torch.Tensor]:
    """The images of the first micro-batches after the last step."""
    order = build_order(recipe, [shard.rows for shard in split.shards])
    last, each = total_steps(recipe, len(split)), recipe.batch.num_micro
    work = [(last + step, micro) for step in range(-(-count // each)) for micro in range(each)][:count]
    return [batch.images.clone() for batch in training_batches(split, recipe.input, order, work, CPU, 1)]


def test_exact_statistics_are_torchs_cumulative_average(runs: list[Job], digits: Path, alone: Group) -> None:
    network, recipe = loaded(runs[0])
    with closing(Split(digits, "train")) as split:
        found = exact_statistics(network, recipe, split, alone, 1, 7)
        images = micro_batches(recipe, split, 7)
    reference, _ = loaded(runs[0])
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    with torch.no_grad():
        for each in images:
            reference(each)
    expected = {name: tensor for name, tensor in reference.state_dict().items() if "running_" in name}
    assert found.keys() == expected.keys() and len(found) == 2 * 19
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert not torch.equal(found[name], network.state_dict()[name]), "the moving average is another"


def test_the_first_layers_statistics_are_those_of_its_outputs(runs: list[Job], digits: Path, alone: Group) -> None:
    network, recipe = loaded(runs[0])
    with closing(Split(digits, "train")) as split:
        found = exact_statistics(network, recipe, split, alone, 1, 3)
        images = micro_batches(recipe, split, 3)
    with torch.no_grad():
        outputs = [network.get_submodule("conv1")(each).transpose(0, 1).flatten(1).double() for each in images]
    mean = torch.stack([each.mean(1) for each in outputs]).mean(0)
    variance = torch.stack([each.var(1, correction=1) for each in outputs]).mean(0)
    torch.testing.assert_close(found["bn1.running_mean"].double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["bn1.running_var"].double(), variance, rtol=1e-5, atol=1e-6)


def test_measuring_leaves_the_network_as_it_was(runs: list[Job], digits: Path, alone: Group) -> None:
    network, recipe = loaded(runs[0])
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    norms[3].track_running_stats = False  # as an engine has it between the micro-batches of a step
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with closing(Split(digits, "train")) as split:
        statistics = exact_statistics(network, recipe, split, alone, 1, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert [(norm.training, norm.momentum, norm.track_running_stats) for norm in norms] == [
        (False, 0.1, number != 3) for number in range(len(norms))
    ]
    with pytest.raises(KeyboardInterrupt), replaced_statistics(network, statistics):
        state = network.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in statistics.items())
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_statistics_are_of_images_as_training_ends_with_them(digits: Path, alone: Group) -> None:
    recipe = small_recipe(
        "input.crop={kind: resized_crop}", "input.eval_resize=8", "duration=4it",
        "input.progressive={start_size: 4, start: 0it, end: 4it, multiple: 2}",
    )  # fmt: skip
    network, sizes = place(build_model(recipe.model, 10, 0), recipe, CPU), []
    network.register_forward_pre_hook(lambda *called: sizes.append(tuple(called[1][0].shape)))
    with closing(Split(digits, "train")) as split:
        exact_statistics(network, recipe, split, alone, 1, 3)
    assert sizes == [(32, 3, 8, 8)] * 3


def test_dropout_is_off_while_statistics_are_measured(digits: Path, alone: Group) -> None:
    recipe = small_recipe("precision=fp32")

    def network(dropout: Callable[[], nn.Module]) -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 4, 3), dropout(), nn.BatchNorm2d(4), dropout(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
        return place(nn.Sequential(*layers), recipe, CPU)

    with closing(Split(digits, "train")) as split:
        without, with_it = (
            exact_statistics(network(kind), recipe, split, alone, 1, 2) for kind in (nn.Identity, nn.Dropout)
        )
    assert all(torch.equal(without[name], with_it[name]) for name in without)


def test_a_network_without_norms_is_told_of(digits: Path, alone: Group) -> None:
    recipe = small_recipe()
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192, track_running_stats=False), nn.Linear(192, 10))
    with closing(Split(digits, "train")) as split, pytest.raises(LonghaulError, match="no batch norm that keeps"):
        exact_statistics(network, recipe, split, alone, 1, 2)


# --- the command -------------------------------------------------------------------------------------------------


def test_the_command_shows_members_and_ensemble(runs: list[Job]) -> None:
    names = [str(job.run.path) for job in runs[:2]]
    shown = CliRunner().invoke(app, ["eval", *names, "--device", "cpu", "--threads", "1", "--batch-norm", "2"])
    assert shown.exit_code == 0, shown.exception
    assert shown.output.count("batch norm over 2 micro-batches") == 2 and "Ensemble of 2: top-1" in shown.output
    told = json.loads(shown.output[shown.output.index("{") :])
    members, ensemble = score_checkpoints(targets(runs[:2]), how=How("cpu", 1, norm_batches=2))
    assert {key: told[key] for key in ensemble.as_dict()} == ensemble.as_dict()
    assert [m["loss"] for m in told["members"]] == [m.score.as_dict()["loss"] for m in members]


def test_the_command_names_the_weights_there_are(runs: list[Job]) -> None:
    refused = CliRunner().invoke(app, ["eval", str(runs[0].run.path), "--weights", "average"])
    assert isinstance(refused.exception, LonghaulError) and "it is auto, plain or ema" in str(refused.exception)
