"""Clipping, loss scaling, the guard, averaging and flat statistics are what torch's own do, where it has them."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from configs import load_recipe
from configs.optimisation import Gradients, LossScale
from configs.schema import Model
from trainer.averaging import Average
from trainer.checkpoints.state import State
from trainer.engines.gathering import cloned
from trainer.gradients import Guard, LossScaler, finish
from trainer.models import build_model
from trainer.statistics import Statistics

CPU = torch.device("cpu")
verdicts = st.lists(st.booleans(), max_size=60)


# --- the norm, clipping, the loss scale --------------------------------------------------------------------------


@given(st.floats(1e-3, 1e3), st.floats(-12, 12), st.integers(0, 2**31))
@settings(max_examples=50)
def test_clipping_is_torchs(most: float, magnitude: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours = [torch.randn(shape, generator=generator) * 10**magnitude for shape in ((3, 2), (5,), ())]
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in ours]
    for parameter, gradient in zip(parameters, ours, strict=True):
        parameter.grad = gradient.clone()
    theirs = nn.utils.clip_grad_norm_(parameters, most)
    assert torch.equal(finish(ours, None, most), theirs)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, ours, strict=True) if p.grad is not None)


def test_without_clipping_or_a_scale_gradients_are_not_touched() -> None:
    gradient = torch.randn(5)
    before = gradient.clone()
    assert finish([gradient], None, None) == before.norm()
    assert torch.equal(gradient, before)


def test_the_loss_scale_is_taken_out_before_the_gradient_is_measured_and_clipped() -> None:
    gradient = torch.tensor([3.0, 4.0]) * 1024
    assert finish([gradient], torch.tensor(1024.0), 1.0) == 5.0
    assert torch.allclose(gradient, torch.tensor([0.6, 0.8]))


@given(verdicts, st.integers(1, 7))
@settings(max_examples=100)
def test_the_loss_scale_moves_as_torchs_grad_scaler_moves_it(bad: list[bool], interval: int) -> None:
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=interval)
    ours = LossScaler(LossScale(initial=2.0**10, growth_steps=interval), CPU)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for each in bad:
        theirs.scale(torch.zeros(1))  # makes its tensors
        parameter.grad = torch.full((1,), float("inf") if each else 1.0)
        theirs.step(optimizer)
        theirs.update()
        ours.adjust(torch.tensor(float(each)))
        assert ours.scale is not None and float(ours.scale) == theirs.get_scale()
        assert int(ours.state["growth_tracker"]) == theirs._get_growth_tracker()


def test_without_loss_scaling_there_is_no_scale_to_save() -> None:
    scaler = LossScaler(None, CPU)
    scaler.adjust(torch.tensor(1.0))
    assert scaler.scale is None and not scaler.state


# --- the guard ---------------------------------------------------------------------------------------------------


@given(verdicts, st.integers(1, 6))
@settings(max_examples=200)
def test_the_guard_counts_what_is_skipped_and_notices_the_first_long_streak(bad: list[bool], most: int) -> None:
    guard = Guard(Gradients(max_skipped=most), CPU)
    for step, each in enumerate(bad):
        norm = torch.tensor(float("nan") if each and step % 2 else float("inf") if each else 1.0)
        assert float(guard.judge(norm, step)) == float(each)
    text = "".join("x" if each else "." for each in bad)
    assert int(guard.state["skipped"]) == text.count("x")
    assert int(guard.state["streak"]) == len(text) - len(text.rstrip("x"))
    assert int(guard.state["failing_since"]) == text.find("x" * most)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_anywhere_makes_the_norm_not_finite(value: float) -> None:
    gradients = [torch.zeros(40, 30), torch.zeros(7)]
    gradients[0][39, 29] = value
    assert not finish(gradients, None, None).isfinite()


# --- statistics --------------------------------------------------------------------------------------------------


def small_network(seed: int = 0) -> nn.Module:
    return build_model(Model(name="cifar-resnet20", shortcut="A"), 10, seed)


def test_flat_statistics_change_nothing_that_can_be_seen() -> None:
    plain, flat = small_network(), small_network()
    statistics = Statistics(flat)
    images = torch.randn(4, 3, 8, 8)
    for _ in range(2):
        assert torch.equal(plain(images), flat(images))
    ours, theirs = flat.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    statistics.track(False)
    flat(images)
    assert all(torch.equal(flat.state_dict()[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("skipped", [True, False])
def test_statistics_are_put_back_where_the_update_was_skipped_even_from_nan(skipped: bool) -> None:
    network = small_network()
    statistics = Statistics(network)
    network(torch.randn(4, 3, 8, 8))
    before = copy.deepcopy(network.state_dict())
    statistics.keep()
    network(torch.full((4, 3, 8, 8), float("nan")))
    assert network.state_dict()["bn1.running_mean"].isnan().all()
    statistics.put_back(torch.tensor(skipped))
    after = network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before) == skipped


# --- averaging ---------------------------------------------------------------------------------------------------


def averaging(*overrides: str) -> tuple[nn.Module, Average]:
    network = small_network()
    Statistics(network)
    followed: State = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    recipe = load_recipe("digits", ["ema.decay=0.9", *overrides])
    return network, Average(recipe, 1000, cloned(followed), followed)


def walk(network: nn.Module, seed: int) -> None:
    """Something like a step: all weights move, and batch norm sees a batch."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        network(torch.randn(4, 3, 8, 8, generator=generator))


def test_the_average_is_torchs_over_weights_and_statistics() -> None:
    network, average = averaging("ema.start=1it")  # theirs too begins with a copy
    theirs = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for step in range(1, 6):
        walk(network, step)
        average.follow(step)
        theirs.update_parameters(network)
    reference = theirs.module.state_dict()
    for name, tensor in average.state.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, reference[name])
        else:
            assert torch.equal(tensor, network.state_dict()[name])
    assert not torch.equal(average.state["conv1.weight"], network.state_dict()["conv1.weight"])


def test_the_average_is_a_copy_until_its_start_and_moves_only_when_it_is_due() -> None:
    network, average = averaging("ema.start=4it", "ema.every=2it")
    seen = []
    for step in range(1, 9):
        walk(network, step)
        average.follow(step)
        seen.append(average.state["conv1.weight"].clone())
        if step in (2, 4):
            assert torch.equal(seen[-1], network.state_dict()["conv1.weight"])
    assert [bool(torch.equal(a, b)) for a, b in pairwise(seen)] == [False, True] * 3 + [False]


def test_the_average_takes_no_gradient_and_shares_no_memory() -> None:
    network, average = averaging()
    own = {tensor.data_ptr() for tensor in average.state.values()}
    assert not own & {tensor.data_ptr() for tensor in network.state_dict().values()}
    assert not any(tensor.requires_grad for tensor in average.state.values())
