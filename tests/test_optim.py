"""Optimizers are the published ones: what decays, what is adapted, how far a hundred steps stray from others'; and
they keep to one protocol of state and of skipped steps."""

import sys
from collections.abc import Iterator
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.optimisers import COMPARISONS, STEPS, deviations
from configs import LonghaulError, load_recipe
from configs.optimisation import Lamb, Lars, Optimizer, Sgd
from configs.schema import Model
from trainer.models import build_model
from trainer.optim import build_optimizer

SMALL = Model(name="cifar-resnet20", shortcut="B")
CONFIGS: dict[str, Optimizer] = {
    "sgd": Sgd(nesterov=True),
    "sgd-no-momentum": Sgd(momentum=0.0),
    "caffe": Sgd(style="caffe"),
    "caffe-nesterov": Sgd(style="caffe", nesterov=True),
    "caffe-no-momentum": Sgd(style="caffe", momentum=0.0),
    "lars": Lars(),
    "lars-caffe": Lars(style="caffe", decay_norm_and_bias=True),
    "lamb": Lamb(),
}
STATE = {"sgd-no-momentum": set(), "caffe-no-momentum": set(), "lamb": {"step", "exp_avg", "exp_avg_sq"}}
EVERY = pytest.mark.parametrize("kind", CONFIGS)


class Tiny(nn.Module):
    """Two weights of one value each, which are adapted, and a bias."""

    def __init__(self, first: float, second: float, bias: float = 0.0) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(1, 1, bias=False), nn.Linear(1, 1)
        for parameter, value in zip(self.parameters(), (first, second, bias), strict=True):
            nn.init.constant_(parameter, value)

    def values(self) -> list[float]:
        return [parameter.item() for parameter in self.parameters()]


def update(model: nn.Module, optimizer: torch.optim.Optimizer, gradients: list[float], lr: float) -> None:
    """One step with given gradients, one value a parameter."""
    for parameter, value in zip(model.parameters(), gradients, strict=True):
        parameter.grad = torch.full_like(parameter, value)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


def backward(model: nn.Module, seed: int) -> None:
    model.zero_grad()
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    model(images).logsumexp(1).sum().backward()


# --- what decays and is adapted ----------------------------------------------------------------------------------


def groups_of(config: Optimizer, model: nn.Module) -> dict[str, tuple[float, bool]]:
    """The weight decay of every parameter, and whether it is adapted, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(config, model).param_groups
    found = [(names[id(p)], (group["weight_decay"], group["adapt"])) for group in groups for p in group["params"]]
    assert len(found) == len(set(found)) == len(names)  # each once
    return dict(found)


@pytest.mark.parametrize("config", [Sgd(weight_decay=5e-4), Lars(weight_decay=5e-4), Lamb(weight_decay=5e-4)])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "cifar-resnet20"])
def test_batch_norm_and_biases_do_not_decay_and_the_shortcuts_batch_norm_is_one(name: str, config: Optimizer) -> None:
    with torch.device("meta"):
        model = build_model(Model(name=name), 10, 0)
    groups = groups_of(config, model)
    assert [key for key in groups if "downsample.1" in key]
    for key, value in groups.items():
        is_convolution = model.get_parameter(key).ndim > 1
        assert value == ((5e-4, True) if is_convolution else (0.0, False)), key
    assert groups["fc.weight"] == (5e-4, True) and groups["fc.bias"] == (0.0, False)


@pytest.mark.parametrize("kind", [Sgd, Lars, Lamb])
def test_everything_decays_where_the_recipe_asks_but_only_weights_are_adapted(kind: type[Sgd | Lars | Lamb]) -> None:
    model = build_model(SMALL, 10, 0)
    groups = groups_of(kind(weight_decay=1e-4, decay_norm_and_bias=True), model)
    assert {decay for decay, _ in groups.values()} == {1e-4}
    assert {key for key, (_, adapt) in groups.items() if adapt} == {
        key for key, parameter in model.named_parameters() if parameter.ndim > 1
    }


class Odd(nn.Module):
    """Parameters that are neither a layer's weight nor a bias, and norms that batch norm is not."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.layer_scale = nn.Parameter(torch.zeros(4, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(4))
        self.position_embedding = nn.Parameter(torch.zeros(1, 5, 4))
        self.frozen = nn.Parameter(torch.zeros(5, 4), requires_grad=False)
        self.norms = nn.ModuleList([nn.LayerNorm([4, 2]), nn.GroupNorm(2, 4), nn.RMSNorm([4, 2]), nn.InstanceNorm1d(4)])
        self.activation = nn.PReLU(4)
        self.head = nn.Linear(4, 1)  # its weight is a vector, and a weight


def test_vectors_that_are_no_weights_do_not_decay_and_norms_of_any_shape_do_not() -> None:
    model = Odd()
    groups = build_optimizer(Sgd(), model).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for group in groups if group["adapt"] for p in group["params"]} == {
        "position_embedding",
        "head.weight",
    }
    assert "frozen" not in {names[id(p)] for group in groups for p in group["params"]}


@pytest.mark.parametrize("name", ["resnetv2_50", "convnext_atto", "efficientnet_b0"])
def test_networks_of_timm_are_split_as_timm_splits_them(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    theirs = timm.optim.param_groups_weight_decay(model, 0.1)
    expected = {id(p) for group in theirs if group["weight_decay"] for p in group["params"]}
    groups = build_optimizer(Sgd(), model).param_groups
    assert {id(p) for group in groups if group["adapt"] for p in group["params"]} == expected


def test_layer_scale_of_torchvisions_convnext_does_not_decay() -> None:
    with torch.device("meta"):
        model = torchvision.models.convnext_tiny()
    groups = groups_of(Sgd(), model)
    scales = [key for key in groups if key.endswith("layer_scale")]
    assert scales and all(groups[key] == (0.0, False) for key in scales)


# --- arithmetic --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_hundred_steps_stay_with_other_implementations(name: str) -> None:
    # In float64; measured at 4e-11 and below. Plain SGD needs no more than to pass the first drop of the rate.
    steps = 35 if name.startswith("sgd") else STEPS
    assert max(deviations(COMPARISONS[name], steps).values()) < 1e-9


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.01, 0.1, 1.0]), st.floats(-2, 2)), max_size=8), st.booleans())
def test_caffes_momentum_keeps_the_rates_of_its_steps(steps: list[tuple[float, float]], nesterov: bool) -> None:
    model = Tiny(0.5, -1.0, 2.0).double()
    optimizer = build_optimizer(Sgd(style="caffe", momentum=0.75, nesterov=nesterov, weight_decay=0.5), model)
    values, history = [0.5, -1.0, 2.0], [0.0] * 3
    for lr, gradient in steps:
        update(model, optimizer, [gradient] * 3, lr)
        for at, decay in enumerate((0.5, 0.5, 0.0)):
            old = history[at]
            history[at] = 0.75 * old + lr * (gradient + decay * values[at])
            values[at] -= 1.75 * history[at] - 0.75 * old if nesterov else history[at]
    assert model.values() == pytest.approx(values, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("style", ["torch", "caffe"])
def test_lars_adapts_weights_alone_and_not_where_a_norm_is_zero(style: Any) -> None:
    model = Tiny(2.0, 0.0, 3.0).double()
    optimizer = build_optimizer(Lars(style=style, trust=0.1, weight_decay=0.5), model)
    update(model, optimizer, [4.0, 4.0, 4.0], lr=0.1)
    # The first: 0.1 x 2 / (4 + 0.5 x 2) of g + decay w = 5. The second is zero, the third a bias.
    assert model.values() == pytest.approx([2.0 - 0.1 * 0.04 * 5.0, -0.4, 3.0 - 0.4])
    still = Tiny(2.0, 1.0).double()
    update(still, build_optimizer(Lars(style=style, trust=0.1, weight_decay=0.5), still), [0.0, 0.0, 0.0], lr=0.1)
    assert still.values() == pytest.approx([2.0 - 0.1 * 1.0, 1.0 - 0.1 * 0.5, 0.0])  # nothing but decay, not adapted


def test_eps_bounds_the_local_rate_of_lars() -> None:
    model = Tiny(2.0, 1.0).double()
    update(model, build_optimizer(Lars(trust=0.1, weight_decay=0.0, eps=4.0), model), [4.0, 4.0, 4.0], lr=0.1)
    assert model.values() == pytest.approx([2.0 - 0.1 * (0.1 * 2 / 8) * 4, 1.0 - 0.1 * (0.1 * 1 / 8) * 4, -0.4])


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_lamb_adapts_weights_alone_and_not_where_a_norm_is_zero(decay: float) -> None:
    model = Tiny(2.0, 0.0, 3.0).double()
    optimizer = build_optimizer(Lamb(weight_decay=decay, eps=1e-12), model)
    update(model, optimizer, [40.0, -40.0, 40.0], lr=0.1)
    # Adam's first corrected step is the sign of the gradient, whatever its size.
    assert model.values() == pytest.approx([2.0 - 0.1 * 2.0, 0.1, 3.0 - 0.1])


def test_momentum_exists_before_the_first_step_and_makes_no_difference_to_it() -> None:
    models = [build_model(SMALL, 10, 0) for _ in range(2)]
    config = Sgd(momentum=0.9, nesterov=True, weight_decay=5e-4, decay_norm_and_bias=True)
    ours = build_optimizer(config, models[0])
    plain = torch.optim.SGD(models[1].parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for seed in range(3):
        for model, optimizer in zip(models, (ours, plain), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = 0.1
            backward(model, seed)
            optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# --- the protocol: state and skipped steps -----------------------------------------------------------------------


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    """The bytes of parameters and state, by name."""
    tensors = dict(model.named_parameters())
    for name, parameter in model.named_parameters():
        tensors |= {f"{name}.{key}": tensor for key, tensor in optimizer.state.get(parameter, {}).items()}
    return {name: tensor.detach().cpu().numpy().tobytes() for name, tensor in tensors.items()}


def trained(kind: str, device: torch.device, steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network in channels-last format after a few steps; a -0.0 among its weights, which compares equal to 0.0."""
    model = build_model(SMALL, 10, 0).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(CONFIGS[kind], model)
    for step in range(steps):
        give_gradients(model, step)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        optimizer.step()
    next(model.parameters()).data[0, 0, 0, 0] = -0.0
    return model, optimizer


def give_gradients(model: nn.Module, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=random))


@EVERY
def test_state_is_there_from_the_start_and_keeps_its_keys_and_the_memory_format(kind: str) -> None:
    device = torch.device("cpu")
    model, optimizer = trained(kind, device, steps=0)
    keys = STATE.get(kind, {"momentum_buffer"})
    for steps in range(2):
        for parameter in model.parameters():
            state = optimizer.state[parameter]
            assert set(state) == keys
            for key, tensor in state.items():
                if key == "step":
                    assert tensor.shape == () and tensor.dtype == torch.float32 and tensor == steps
                else:
                    assert tensor.stride() == parameter.stride() and tensor.dtype == parameter.dtype
                    assert tensor.any() == bool(steps)
        give_gradients(model, 0)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        optimizer.step()


@EVERY
def test_a_skipped_step_leaves_parameters_and_state_to_the_bit_whatever_the_gradients(
    kind: str, device: torch.device
) -> None:
    model, optimizer = trained(kind, device)
    before = snapshot(model, optimizer)
    for bad in (float("nan"), float("inf"), -float("inf"), 1.0):
        give_gradients(model, 7)
        for parameter in list(model.parameters())[::2]:
            assert parameter.grad is not None
            parameter.grad[(0,) * parameter.ndim] = bad
        optimizer.found_inf = torch.tensor(1.0, device=device)  # type: ignore[attr-defined]
        optimizer.step()
        assert snapshot(model, optimizer) == before
        del optimizer.found_inf  # type: ignore[attr-defined]


@EVERY
def test_a_step_that_is_not_skipped_and_one_after_a_skipped_step_are_as_any_other(
    kind: str, device: torch.device
) -> None:
    plain, guarded = trained(kind, device), trained(kind, device)
    for step, (skip, guard) in enumerate([(False, True), (True, True), (False, False)]):
        give_gradients(guarded[0], step)
        if guard:
            guarded[1].found_inf = torch.tensor(float(skip), device=device)  # type: ignore[attr-defined]
        guarded[1].step()
        if guard:
            del guarded[1].found_inf  # type: ignore[attr-defined]
        if not skip:
            give_gradients(plain[0], step)
            plain[1].step()
        assert snapshot(*guarded) == snapshot(*plain)


@EVERY
def test_the_memory_format_makes_no_difference(kind: str) -> None:
    last, first = build_model(SMALL, 10, 0).double(), build_model(SMALL, 10, 0).double()
    last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizers = [build_optimizer(CONFIGS[kind], model) for model in (last, first)]
    for model, optimizer in zip((last, first), optimizers, strict=True):
        for step in range(3):
            give_gradients(model, step)
            for group in optimizer.param_groups:
                group["lr"] = 0.1
            optimizer.step()
    for a, b in zip(last.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # sums of squares in another order


@EVERY
def test_parameters_without_a_gradient_are_left_alone(kind: str) -> None:
    model = Tiny(2.0, 3.0, 4.0)
    optimizer = build_optimizer(CONFIGS[kind], model)
    optimizer.step()
    model.two.weight.grad = torch.ones(1, 1)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    first, second, bias = model.values()
    assert (first, bias) == (2.0, 4.0) and second < 3.0
    assert not any(tensor.any() for tensor in optimizer.state[model.one.weight].values())


@EVERY
def test_a_state_dict_restores_the_future(kind: str) -> None:
    model, optimizer = trained(kind, torch.device("cpu"))
    again = build_model(SMALL, 10, 1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    restored = build_optimizer(CONFIGS[kind], again)
    again.load_state_dict(model.state_dict())
    restored.load_state_dict(deepcopy(optimizer.state_dict()))  # torch would share the tensors
    for made, its in ((model, optimizer), (again, restored)):
        give_gradients(made, 5)
        its.step()
    assert snapshot(again, restored) == snapshot(model, optimizer)


# --- combinations that cannot be had -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ("{nesterov: true, momentum: 0}", r"optimizer.nesterov=true needs an optimizer.momentum above 0\.$"),
        ("{style: caffe, implementation: apex}", r"implementation=apex has no optimizer.style=caffe: use .*=torch\.$"),
        ("{kind: lamb, implementation: apex, weight_decay: 0}", r"adapts just what decays: use .*=torch, .*=false\.$"),
        ("{kind: lamb, implementation: apex, decay_norm_and_bias: true}", r"adapts just what decays: use .*=torch, or"),
        ("{kind: lars, implementation: apex}", r"unknown key 'optimizer.implementation'"),
    ],
)  # fmt: skip
def test_a_combination_that_there_is_not_is_refused_with_the_mend(optimizer: str, message: str) -> None:
    with pytest.raises(LonghaulError, match=message):
        load_recipe("resnet50", [f"optimizer={optimizer}"])


# --- apex --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [Sgd(implementation="apex"), Lamb(implementation="apex")])
def test_apex_without_its_cuda_extensions_is_refused_whatever_else_is_called_apex(
    config: Optimizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "amp_C", None)
    with pytest.raises(LonghaulError, match=r"^optimizer.implementation=apex .*amp_C.*implementation=torch\.$"):
        build_optimizer(config, Tiny(1.0, 1.0))


def test_apex_is_refused_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "amp_C", ModuleType("amp_C"))
    with pytest.raises(LonghaulError, match=r"implementation=apex runs on CUDA and not on cpu: .*=torch\.$"):
        build_optimizer(Sgd(implementation="apex"), Tiny(1.0, 1.0))


class FusedSGD(torch.optim.SGD):
    """apex's as far as ours relies on it, on the CPU: its flag, and momentum buffers made where there are none."""

    def __init__(self, params: Any, lr: float, momentum: float, nesterov: bool, set_grad_none: bool) -> None:
        assert set_grad_none
        super().__init__(params, lr=lr, momentum=momentum, nesterov=nesterov, fused=True)
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int)

    def step(self) -> None:  # type: ignore[override]
        if not self._dummy_overflow_buf:
            super().step()


class FusedLAMB(torch.optim.Optimizer):
    """apex's as far as ours relies on it: the defaults it is told to leave, and its own count of steps, from which
    it corrects the bias."""

    def __init__(self, params: Any, **options: Any) -> None:
        expected = {
            "lr": 0.0, "bias_correction": True, "adam_w_mode": True, "grad_averaging": True, "set_grad_none": True,
            "max_grad_norm": float("inf"), "use_nvlamb": False,
        }  # fmt: skip
        assert {key: value for key, value in options.items() if key not in ("betas", "eps")} == expected
        super().__init__(params, {"lr": 0.0, "betas": options["betas"], "eps": options["eps"], "weight_decay": 0.0})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m, v = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
                m.lerp_(p.grad, 1 - beta1)
                v.lerp_(p.grad**2, 1 - beta2)
                u = m / (1 - beta1 ** group["step"]) / ((v / (1 - beta2 ** group["step"])).sqrt() + group["eps"])
                u += group["weight_decay"] * p
                adapted = group["weight_decay"] and p.norm() > 0 and u.norm() > 0
                p -= group["lr"] * (p.norm() / u.norm() if adapted else 1.0) * u


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`trainer.optim.apex` on stand-ins for apex's classes, whose kernels need CUDA and a build of their own."""
    optimizers = ModuleType("apex.optimizers")
    optimizers.FusedSGD, optimizers.FusedLAMB = FusedSGD, FusedLAMB  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    monkeypatch.delitem(sys.modules, "trainer.optim.apex", raising=False)
    yield import_module("trainer.optim.apex")
    sys.modules.pop("trainer.optim.apex", None)


@pytest.mark.parametrize("kind", ["Sgd", "Lamb"])
def test_apexs_optimizers_keep_to_the_protocol_too(kind: str, apex: ModuleType) -> None:
    config: Optimizer = Sgd(nesterov=True) if kind == "Sgd" else Lamb()
    models = [build_model(SMALL, 10, 0) for _ in range(2)]
    ours = build_optimizer(config, models[0])
    groups = [{**group, "params": list(group["params"])} for group in build_optimizer(config, models[1]).param_groups]
    theirs = apex.Sgd(groups, 0.9, True) if kind == "Sgd" else apex.Lamb(groups, (0.9, 0.999), 1e-6)
    for step, skip in enumerate([False, True, False, False]):
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            give_gradients(model, step)
            for group in optimizer.param_groups:
                group["lr"] = 0.01
            before = snapshot(model, optimizer)
            optimizer.found_inf = torch.tensor(float(skip))  # type: ignore[attr-defined]
            optimizer.step()
            del optimizer.found_inf  # type: ignore[attr-defined]
            assert (snapshot(model, optimizer) == before) == skip
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert set(ours.state[a]) == set(theirs.state[b])
    if kind == "Lamb":  # as after a checkpoint of another optimizer: the count in the state is what holds
        for state in theirs.state.values():
            state["step"].fill_(41)
        theirs.step()
        assert {group["step"] for group in theirs.param_groups} == {42}
