"""Other programs' training checkpoints: what is read is what they saved, and what is written they load.

torchvision's references are not part of its package: what they do is written down here as they do it.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision.models import get_model

from configs import LonghaulError, Recipe, load_recipe
from tests.workers import different, final_state, in_processes, make_job, state_of, train
from trainer.checkpoints.compare import compare_states
from trainer.checkpoints.manifest import open_valid
from trainer.formats import deepspeed, torchvision
from trainer.formats.exporting import export_checkpoint
from trainer.formats.foreign import open_source
from trainer.formats.importing import import_run
from trainer.formats.layouts import longhaul_layout, name_state, state_dict, torchvision_layout
from trainer.formats.pickles import read_torch_file
from trainer.formats.training import TrainingState, fit
from trainer.job import Job
from trainer.models import build_model
from trainer.optim.build import parameter_groups
from trainer.rundir import RunDirectory
from trainer.verify import verify

RATE = 0.1


class Marker:
    """An object whose unpickling makes a directory: what a malicious file would do with your account."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def small_network() -> nn.Module:
    return build_model(load_recipe("digits").model, 10, 0)


def state_for(network: nn.Module, steps: int = 7) -> TrainingState:
    """Weights of a network that was trained on noise a little, and momentum."""
    generator = torch.Generator().manual_seed(1)
    momentum = {n: torch.randn(p.shape, generator=generator) for n, p in network.named_parameters()}
    return TrainingState({n: t.clone() for n, t in network.state_dict().items()}, momentum, steps=steps)


@pytest.fixture(scope="module")
def stopped(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run of 40 steps with a checkpoint in the middle."""
    job = make_job(tmp_path_factory.mktemp("runs") / "whole", digits, "duration=40it", "checkpoint.every=20it")
    train(job, 1)
    return job


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 1), (1, 2), (2, 3), (2, 8)])
def test_what_is_written_for_deepspeed_is_read_as_it_was(stage: int, ranks: int, tmp_path: Path) -> None:
    network = small_network()
    state = state_for(network)
    deepspeed.write(state, load_recipe("digits"), network, RATE, tmp_path / "ds", stage, ranks)
    found = deepspeed.read(tmp_path / "ds", network, trust=False)
    assert found.steps == 7
    assert not compare_states(found.weights, state.weights)
    assert not compare_states(found.momentum, state.momentum)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_deepspeed_goes_on_from_what_is_written_and_what_it_saves_is_read(ranks: int, tmp_path: Path) -> None:
    """DeepSpeed itself, with ZeRO stages 0 to 2, loads what was written: saved again it is the same, and after a step
    what torch.optim.SGD makes of it. Stage 3 takes its first step, without momentum."""
    network, recipe = small_network(), load_recipe("digits")
    state = state_for(network)
    for stage in (0, 1, 2):
        deepspeed.write(state, recipe, network, RATE, tmp_path / f"written{stage}", stage, ranks)
    in_processes(ranks, _go_on_with_deepspeed, tmp_path)
    for stage in (0, 1, 2):
        again = deepspeed.read(tmp_path / f"loaded{stage}", network, trust=False)
        assert not compare_states(again.weights, state.weights)
        assert not compare_states(again.momentum, state.momentum)
    for stage in (0, 1, 2, 3):
        found = deepspeed.read(tmp_path / f"stepped{stage}", network, trust=False)
        expected = _step(state if stage < 3 else TrainingState(state.weights, {}))
        assert found.steps == (8 if stage < 3 else 1)
        torch.testing.assert_close(found.weights, expected.weights, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.momentum, expected.momentum, rtol=1e-4, atol=1e-6)


def _images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8)


def _optimizer(network: nn.Module) -> torch.optim.SGD:
    groups = parameter_groups(network, 5e-4, decay_all=False)
    for group in groups:
        del group["adapt"]
    return torch.optim.SGD(groups, lr=RATE, momentum=0.9, nesterov=True)


def _step(state: TrainingState) -> TrainingState:
    """One step of torch.optim.SGD."""
    network = small_network()
    network.load_state_dict(state.weights)
    optimizer = _optimizer(network)
    for name, parameter in network.named_parameters():
        if name in state.momentum:
            optimizer.state[parameter]["momentum_buffer"] = state.momentum[name].clone()
    images, labels = _images()
    functional.cross_entropy(network(images), labels).backward()
    optimizer.step()
    momentum = {n: optimizer.state[p]["momentum_buffer"] for n, p in network.named_parameters()}
    return TrainingState(network.state_dict(), momentum)


def _go_on_with_deepspeed(directory: Path) -> None:
    """One rank: load each stage's directory, save it, take a step, save that."""
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.distributed.init_process_group("gloo")
    import deepspeed as library
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, for a minute
    images, labels = _images()
    for stage in (0, 1, 2, 3):
        network = small_network()
        config = {
            "train_micro_batch_size_per_gpu": 8,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage},
        }
        engine, *_ = library.initialize(
            model=network, optimizer=_optimizer(network), config=config, dist_init_required=False
        )
        if stage < 3:
            path, _ = engine.load_checkpoint(str(directory / f"written{stage}"))
            assert path is not None
            engine.save_checkpoint(str(directory / f"loaded{stage}"))
        engine.backward(functional.cross_entropy(engine(images), labels))
        engine.step()
        engine.save_checkpoint(str(directory / f"stepped{stage}"))
    torch.distributed.destroy_process_group()


def test_a_run_through_deepspeed_and_back_ends_where_it_would_have(stopped: Job, digits: Path, tmp_path: Path) -> None:
    saved = open_valid(stopped.run.store(), "step-00000020")
    export_checkpoint(stopped.run, saved, digits, "deepspeed", tmp_path / "ds", 1, 2, force=False)
    job = make_job(tmp_path / "back", digits, "duration=40it", "checkpoint.every=20it")
    imported, _ = import_run(open_source(tmp_path / "ds"), job.run, job.recipe, digits, trust=False)
    assert not compare_states(_without_ledger(state_of(imported)), _without_ledger(state_of(saved)))
    train(job, 1)
    assert not different(_without_ledger(final_state(job.run)), _without_ledger(final_state(stopped.run)))

    findings = verify(job.run)
    assert all(finding.holds for finding in findings)
    told = {finding.what: finding.figures for finding in findings}
    assert "from deepspeed" in told["steps before 20 were not recorded here"]
    assert told["every step saw the samples, crops and flips that recipe and seed give it"] == "20 steps"
    assert told["every whole epoch used every sample exactly once"].startswith("0 epochs"), "that before is not claimed"
    assert told["the epoch begun before that used its next samples exactly once"] == "162 of 1,442"
    assert not final_state(job.run)["ledger.steps"][:20].any()


def _without_ledger(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith("ledger.")}


@pytest.fixture(scope="module")
def shufflenet(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """An epoch, of two steps, and a step of a network that torchvision has, with an average."""
    job = make_job(
        tmp_path_factory.mktemp("runs") / "shufflenet", digits, "model={name: torchvision:shufflenet_v2_x0_5}",
        "batch={size: 721, micro: 721}", "duration=3it", "checkpoint.every=2it", "evaluate.every=3it", "precision=fp32",
        "ema={decay: 0.9}", "schedule.warmup=1it",
    )  # fmt: skip
    train(job, 1)
    return job


def test_torchvisions_references_resume_from_what_is_written(shufflenet: Job, digits: Path, tmp_path: Path) -> None:
    saved = open_valid(shufflenet.run.store(), "step-00000002")
    ours = state_of(saved)
    path = tmp_path / "checkpoint.pth"
    notes = export_checkpoint(shufflenet.run, saved, digits, "torchvision", path, 0, 1, force=False)
    assert "--norm-weight-decay 0 --bias-weight-decay 0" in notes[-1]

    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["epoch"] == 0, "the first epoch is done"
    model = get_model("shufflenet_v2_x0_5", num_classes=10)
    model.load_state_dict(checkpoint["model"])
    groups = _set_weight_decay(model, 5e-4)
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True)
    schedulers = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=1),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2),
    ]
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, schedulers, milestones=[1])
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    optimizer.load_state_dict(checkpoint["optimizer"])
    scheduler.load_state_dict(checkpoint["lr_scheduler"])
    average.load_state_dict(checkpoint["model_ema"])
    assert scheduler.last_epoch == 1
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4, 0.0, 0.0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, ours[f"model.{name}"])
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], ours[f"optim.state.{name}.momentum_buffer"])
    for name, tensor in average.module.state_dict().items():
        assert torch.equal(tensor, ours[f"ema.{name}"])


def test_our_resnets_are_torchvisions(tmp_path: Path) -> None:
    recipe = load_recipe("resnet50", ["model.name=resnet18"])
    network = build_model(recipe.model, 1000, 0)
    state = state_for(network, steps=5005)
    torchvision.write(state, recipe, network, 1_281_167, RATE, tmp_path / "c.pth")
    checkpoint = torch.load(tmp_path / "c.pth", weights_only=True)
    model = get_model("resnet18")
    model.load_state_dict(checkpoint["model"])
    optimizer = torch.optim.SGD(_set_weight_decay(model, 1e-4))
    optimizer.load_state_dict(checkpoint["optimizer"])
    for name, parameter in model.named_parameters():
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], state.momentum[name])


def test_a_run_through_torchvisions_form_and_back_is_the_same(shufflenet: Job, digits: Path, tmp_path: Path) -> None:
    saved = open_valid(shufflenet.run.store(), "step-00000002")
    path = tmp_path / "checkpoint.pth"
    export_checkpoint(shufflenet.run, saved, digits, "torchvision", path, 0, 1, force=False)
    run = RunDirectory(tmp_path / "back")
    imported, _ = import_run(open_source(path), run, shufflenet.recipe, digits, trust=False)
    assert imported.step == 2 and run.recipe() == shufflenet.recipe
    assert not compare_states(_without_ledger(state_of(imported)), _without_ledger(state_of(saved)))


def test_a_checkpoint_between_two_epochs_goes_back_to_the_first_of_them(
    shufflenet: Job, digits: Path, tmp_path: Path
) -> None:
    saved = open_valid(shufflenet.run.store(), "step-00000003")
    notes = export_checkpoint(shufflenet.run, saved, digits, "torchvision", tmp_path / "c.pth", 0, 1, force=False)
    assert torch.load(tmp_path / "c.pth", weights_only=True)["epoch"] == 0
    assert any("goes on with epoch 1" in note for note in notes)


def _set_weight_decay(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The groups of train.py --norm-weight-decay 0 --bias-weight-decay 0."""
    other, norm, bias = [], [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kept = bias if name == "bias" else norm if isinstance(module, nn.BatchNorm2d) else other
            kept.append(parameter)
    return [
        {"params": params, "weight_decay": decay} for params, decay in ((other, weight_decay), (norm, 0), (bias, 0))
    ]


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("kind", ["step", "cosine", "exponential"])
@pytest.mark.parametrize("epochs", [0, 1, 2, 3, 5])
def test_the_references_schedulers_go_on_at_the_same_rates(warmup: int, kind: str, epochs: int) -> None:
    recipe = load_recipe("digits", [f"schedule={{kind: cosine, lr: 0.2, warmup: {warmup}ep}}"])

    def make(lr: float) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.LRScheduler]:
        from torch.optim import lr_scheduler as lrs

        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
        main: Any = {
            "step": lambda: lrs.StepLR(optimizer, 2, 0.1),
            "cosine": lambda: lrs.CosineAnnealingLR(optimizer, T_max=8),
            "exponential": lambda: lrs.ExponentialLR(optimizer, 0.9),
        }[kind]()
        if warmup == 0:
            return optimizer, main
        first = lrs.LinearLR(optimizer, 0.01, total_iters=warmup)
        return optimizer, lrs.SequentialLR(optimizer, [first, main], milestones=[warmup])

    def rates(optimizer: torch.optim.SGD, scheduler: torch.optim.lr_scheduler.LRScheduler, count: int) -> list[float]:
        found = []
        for _ in range(count):
            optimizer.step()
            scheduler.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    whole = make(0.2)
    rates(*whole, epochs)
    rate = whole[0].param_groups[0]["lr"]
    resumed = make(0.2)
    resumed[0].param_groups[0]["lr"] = rate  # as the optimizer's state dict has it
    resumed[1].load_state_dict(torchvision.scheduler_state(recipe, 1442, epochs, rate, 1))
    assert rates(*resumed, 4) == pytest.approx(rates(*whole, 4))


def test_what_the_references_save_is_read(tmp_path: Path) -> None:
    """With their default, all parameters in one group, and `args` as the object that they save."""
    network = small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    images, labels = _images()
    functional.cross_entropy(network(images), labels).backward()
    optimizer.step()
    args = argparse.Namespace(model="resnet18", device="cpu")
    file = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 4, "args": args}
    torch.save(file, tmp_path / "c.pth")
    found = torchvision.read(tmp_path / "c.pth", network, trust=False)
    assert found.epochs == 5
    for name, parameter in network.named_parameters():
        assert torch.equal(found.momentum[name], optimizer.state[parameter]["momentum_buffer"])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_momentum_is_named_whatever_the_grouping(norm: bool, bias: bool) -> None:
    network = small_network()
    momentum = state_for(network).momentum
    for layout in (torchvision_layout(network, norm, bias), longhaul_layout(network, load_recipe("digits").optimizer)):  # type: ignore[arg-type]
        saved = state_dict(momentum, layout, [{}] * len(layout))
        assert not compare_states(name_state(saved, network, "x"), momentum)


def test_a_grouping_that_is_not_known_is_refused() -> None:
    network = small_network()
    names = [name for name, _ in network.named_parameters()]
    saved = state_dict(state_for(network).momentum, [names[:7], names[7:]], [{}, {}])
    with pytest.raises(LonghaulError, match=r"groups of \[7, 52\]"):
        name_state(saved, network, "x.pth, optimizer")


def test_the_state_of_another_optimizer_is_refused() -> None:
    network = small_network()
    saved = {"state": {0: {"exp_avg": torch.zeros(1)}}, "param_groups": [{"params": [0]}]}
    with pytest.raises(LonghaulError, match="another optimizer than SGD"):
        name_state(saved, network, "x.pth, optimizer")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w.pop("fc.bias"), ["no 'fc.bias'", "model"]),
        (lambda w: w.update(extra=torch.zeros(1)), ["'extra'", "has not"]),
        (lambda w: w.update({"fc.bias": torch.zeros(3)}), ["'fc.bias'", "[3]", "[10]"]),
    ],
)
def test_weights_of_another_network_are_named(change: Any, named: list[str]) -> None:
    network = small_network()
    weights = dict(network.state_dict())
    change(weights)
    with pytest.raises(LonghaulError) as refused:
        fit(weights, network, "there.pth")
    assert all(part in str(refused.value) for part in ["there.pth", *named])


@pytest.mark.parametrize(
    "overrides", [["optimizer={kind: lars}"], ["optimizer.style=caffe", "optimizer.nesterov=false"]]
)
def test_an_optimizer_without_a_counterpart_is_refused(overrides: list[str], tmp_path: Path) -> None:
    network, recipe = small_network(), load_recipe("digits", overrides)
    with pytest.raises(LonghaulError, match="optimizer"):
        deepspeed.write(state_for(network), recipe, network, RATE, tmp_path / "ds", 0, 1)
    assert not any(tmp_path.iterdir())


def test_a_rate_that_depends_on_the_past_is_refused(digits: Path, tmp_path: Path) -> None:
    recipe: Recipe = load_recipe("digits", ["schedule={kind: plateau, lr: 0.1}"])
    torch.save({}, tmp_path / "c.pth")
    with pytest.raises(LonghaulError, match=r"schedule\.kind=plateau"):
        import_run(open_source(tmp_path / "c.pth"), RunDirectory(tmp_path / "run"), recipe, digits, trust=False)


def test_a_malicious_file_runs_nothing_unless_it_is_trusted(tmp_path: Path) -> None:
    torch.save({"model": {}, "args": Marker(tmp_path / "taken")}, tmp_path / "evil.pth")
    with pytest.raises(LonghaulError, match=r"evil\.pth names posix\.mkdir.*--trust"):
        read_torch_file(tmp_path / "evil.pth", {}, trust=False)
    assert not (tmp_path / "taken").exists()
    read_torch_file(tmp_path / "evil.pth", {}, trust=True)
    assert (tmp_path / "taken").exists(), "which shows that the file was one to be afraid of"


def test_a_malicious_directory_of_deepspeeds_runs_nothing(tmp_path: Path) -> None:
    network = small_network()
    deepspeed.write(state_for(network), load_recipe("digits"), network, RATE, tmp_path / "ds", 1, 1)
    shard = tmp_path / "ds/global_step7/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({**torch.load(shard), "ds_config": Marker(tmp_path / "taken")}, shard)
    with pytest.raises(LonghaulError, match="--trust"):
        deepspeed.read(tmp_path / "ds", network, trust=False)
    assert not (tmp_path / "taken").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04 cut short"])
def test_a_file_that_is_none_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    path.write_bytes(content)
    with pytest.raises(LonghaulError, match=r"c\.pth"):
        read_torch_file(path, {}, trust=False)


def test_a_latest_that_points_elsewhere_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds/latest").write_text("../other")
    with pytest.raises(LonghaulError, match="latest names"):
        deepspeed.read(tmp_path / "ds", small_network(), trust=False)
