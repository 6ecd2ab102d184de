"""Networks are the published ones to the parameter, optimizers and schedules the closed forms they claim to be."""

import math
from collections.abc import Iterator

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import StochasticDepth

from configs import Duration, LonghaulError, Recipe, load_recipe
from configs.optimisation import Sgd
from configs.schema import Model
from trainer.count import count_inference, without_memory
from trainer.models import MODELS, build_model
from trainer.optim import build_optimizer
from trainer.progress import is_due
from trainer.schedules import learning_rate, total_steps

# --- shapes ------------------------------------------------------------------------------------------------------

# Parameters, and multiply-adds in units of 10**9 at 224 x 224: He et al. 2015, table 1, counted exactly.
IMAGENET = [
    ("plain18", "v1.5", "B", 11_515_688, 1.795),
    ("plain34", "v1.5", "B", 21_623_848, 3.644),
    ("resnet18", "v1.5", "A", 11_515_688, 1.795),
    ("resnet18", "v1.5", "B", 11_689_512, 1.814),
    ("resnet18", "v1.5", "C", 12_043_816, 1.878),
    ("resnet34", "v1.5", "A", 21_623_848, 3.644),
    ("resnet34", "v1.5", "B", 21_797_672, 3.664),
    ("resnet34", "v1.5", "C", 22_716_840, 3.831),
    ("resnet50", "v1", "B", 25_557_032, 3.858),
    ("resnet50", "v1.5", "B", 25_557_032, 4.089),
    ("resnet101", "v1", "B", 44_549_160, 7.570),
    ("resnet101", "v1.5", "B", 44_549_160, 7.801),
    ("resnet152", "v1", "B", 60_192_808, 11.282),
    ("resnet152", "v1.5", "B", 60_192_808, 11.514),
]
CIFAR = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962, 1202: 19_421_274}


@pytest.mark.parametrize(("name", "stride", "shortcut", "count", "gmacs"), IMAGENET)
def test_an_imagenet_network_has_the_published_parameters_and_multiply_adds(
    name: str, stride: str, shortcut: str, count: int, gmacs: float
) -> None:
    config = Model(name=name, stride=stride, shortcut=shortcut)  # type: ignore[arg-type]
    parameters, multiply_adds = count_inference(config, 1000, 224)
    assert parameters == count
    assert multiply_adds / 1e9 == pytest.approx(gmacs, abs=0.0005)


@pytest.mark.parametrize("kind", ["plain", "resnet"])
@pytest.mark.parametrize(("layers", "count"), CIFAR.items())
def test_a_cifar_network_has_the_published_parameters_and_multiply_adds(layers: int, count: int, kind: str) -> None:
    config = Model(name=f"cifar-{kind}{layers}", shortcut="A")
    assert count_inference(config, 10, 32) == (count, cifar_multiply_adds((layers - 2) // 6))


@pytest.mark.parametrize("layers", [20, 110])
def test_a_cifar_network_has_the_layers_of_its_name(layers: int) -> None:
    modules = without_memory(Model(name=f"cifar-resnet{layers}", shortcut="A"), 10).modules()
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in modules) == layers


def cifar_multiply_adds(n: int) -> int:
    """Of section 4.2: the stem, 2n convolutions a stage, of which the first sees half as many channels, 64 x 10."""
    stages = [(16, 16, 32), (16, 32, 16), (32, 64, 8)]  # channels before and within, pixels a side
    inside = sum(9 * width * side**2 * (before + (2 * n - 1) * width) for before, width, side in stages)
    return 3 * 9 * 16 * 32**2 + inside + 640


@pytest.mark.parametrize(("name", "gmacs"), [("vgg16", 15.347), ("vgg19", 19.508)])
def test_vgg_has_the_multiply_adds_that_the_paper_compares_with(name: str, gmacs: float) -> None:
    # The paper's 15.3 are of VGG-16's convolutions alone, its 19.6 of VGG-19 with the fully connected layers.
    _, multiply_adds = count_inference(Model(name=f"torchvision:{name}"), 1000, 224)
    fully_connected = 25_088 * 4_096 + 4_096 * 4_096 + 4_096 * 1_000
    assert (multiply_adds - fully_connected) / 1e9 == pytest.approx(gmacs, abs=0.0005)
    assert fully_connected / 1e9 == pytest.approx(19.632 - 19.508, abs=0.0005)


def test_every_model_is_in_these_tables() -> None:
    cifar = {f"cifar-{kind}{layers}" for kind in ("plain", "resnet") for layers in CIFAR}
    assert set(MODELS) == {name for name, *_ in IMAGENET} | cifar


def test_an_unknown_model_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        LonghaulError, match=r"no model 'resnet51' \(did you mean 'resnet\d+'\?\); known are plain18, .*1202, "
    ):
        build_model(Model(name="resnet51"), 10, 0)


def test_option_a_pads_channels_and_takes_every_second_pixel() -> None:
    model = build_model(Model(name="cifar-resnet20", shortcut="A"), 10, 0)
    shortcut = model.get_submodule("layer2.0.downsample")
    assert not list(shortcut.parameters())
    x = torch.randn(2, 16, 8, 8)
    out = shortcut(x)
    assert out.shape == (2, 32, 4, 4)
    assert torch.equal(out[:, :16], x[:, :, ::2, ::2]) and not out[:, 16:].any()


@pytest.mark.parametrize("stride", ["v1", "v1.5"])
def test_the_stride_stands_where_its_version_says(stride: str) -> None:
    model = without_memory(Model(name="resnet50", stride=stride), 1000)  # type: ignore[arg-type]
    for stage in ("layer2", "layer3", "layer4"):
        convolutions = [model.get_submodule(f"{stage}.0.conv{i}") for i in (1, 2, 3)]
        strides = [convolution.stride for convolution in convolutions]
        assert strides == ([(2, 2), (1, 1), (1, 1)] if stride == "v1" else [(1, 1), (2, 2), (1, 1)])


# --- exchange with torchvision -----------------------------------------------------------------------------------

EXCHANGED = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
LIBRARIES = ["torchvision", "timm"]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", EXCHANGED)
def test_state_dicts_have_the_libraries_keys_and_shapes_in_their_order(name: str, library: str) -> None:
    theirs = without_memory(Model(name=f"{library}:{name}"), 1000)
    ours = without_memory(Model(name=name), 1000)
    assert [(k, v.shape, v.dtype) for k, v in ours.state_dict().items()] == [
        (k, v.shape, v.dtype) for k, v in theirs.state_dict().items()
    ]


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Statistics and gammas that are not the initial ones, so that a forgotten one shows."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.0)
            module.bias.uniform_(-0.1, 0.1)
            module.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.8, 1.2)  # type: ignore[union-attr]
    return model


@pytest.mark.parametrize("name", EXCHANGED)
def test_outputs_equal_the_libraries_with_weights_loaded_either_way(name: str) -> None:
    torch.manual_seed(0)
    ours = randomise(build_model(Model(name=name), 10, 1)).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for library in LIBRARIES:
            theirs = without_memory(Model(name=f"{library}:{name}"), 10).eval()
            weights = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
            theirs.load_state_dict(weights, strict=True, assign=True)
            before = ours(images)
            torch.testing.assert_close(before, theirs(images), rtol=1e-4, atol=1e-4)
            randomise(theirs)
            ours.load_state_dict(theirs.state_dict(), strict=True)
            torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
            assert not torch.allclose(ours(images), before, atol=1e-3)


def test_training_takes_torchvisions_gradients() -> None:
    ours = build_model(Model(name="resnet18"), 10, 1).train()
    theirs = torchvision.models.resnet18(num_classes=10).train()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for model in (ours, theirs):
        nn.functional.cross_entropy(model(images), torch.tensor([1, 2, 3, 4])).backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


# --- initial weights ---------------------------------------------------------------------------------------------

SMALL = Model(name="cifar-resnet20", shortcut="B")


def equal(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_the_seed_decides_the_weights_and_nothing_else_does() -> None:
    torch.manual_seed(1)
    first = build_model(SMALL, 10, 5)
    torch.manual_seed(2)
    torch.randn(100)
    assert equal(build_model(SMALL, 10, 5), first)
    for seed in (4, 6, 2**63 - 1):
        other = build_model(SMALL, 10, seed)
        for (name, a), b in zip(first.named_parameters(), other.parameters(), strict=True):
            if a.ndim > 1:
                assert not torch.equal(a, b), (seed, name)


def test_building_does_not_disturb_the_global_random_numbers(device: torch.device) -> None:
    torch.manual_seed(3)
    expected = torch.randn(5), torch.randn(5, device=device)
    torch.manual_seed(3)
    first = torch.randn(5)
    build_model(SMALL, 10, 7)
    assert torch.equal(first, expected[0])
    assert torch.equal(torch.randn(5, device=device), expected[1] if device.type == "cuda" else continued(3))


def continued(seed: int) -> torch.Tensor:
    """The second five numbers after `seed`, from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    torch.randn(5, generator=generator)
    return torch.randn(5, generator=generator)


def test_convolutions_are_hes_with_fan_out_and_batch_norms_start_as_the_identity() -> None:
    model = build_model(Model(name="resnet18"), 1000, 0)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            count = module.weight.numel()
            deviation = math.sqrt(2 / fan_out)
            assert module.weight.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * count)), name
            assert abs(module.weight.mean().item()) < 5 * deviation / math.sqrt(count), name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all(), name


@pytest.mark.parametrize(("name", "last"), [("cifar-resnet20", "bn2"), ("resnet18", "bn2"), ("resnet50", "bn3")])
def test_zero_init_gamma_makes_every_block_its_shortcut(name: str, last: str) -> None:
    model = build_model(Model(name=name, zero_init_gamma=True), 10, 0).train()
    zeros = {
        key for key, module in model.named_modules() if isinstance(module, nn.BatchNorm2d) and not module.weight.any()
    }
    blocks = {key for key, _ in model.named_modules() if key.startswith("layer") and key.count(".") == 1}
    assert zeros == {f"{block}.{last}" for block in blocks}
    block = model.get_submodule("layer1.1")
    x = torch.rand(2, 16 if "cifar" in name else 64 if last == "bn2" else 256, 8, 8)
    assert torch.equal(block(x), x)


# --- stochastic depth --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_stochastic_depth_drops_what_timm_drops(name: str) -> None:
    ours = build_model(Model(name=name, drop_path=0.5), 10, 1).train()
    theirs = build_model(Model(name=f"timm:{name}", drop_path=0.5), 10, 2).train()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        outputs.append(model(images))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)
    torch.manual_seed(4)
    assert not torch.allclose(ours(images), outputs[0], atol=1e-2)


def test_stochastic_depth_grows_linearly_changes_no_key_and_sleeps_in_evaluation() -> None:
    dropping, plain = (build_model(Model(name="cifar-resnet20", drop_path=rate), 10, 0) for rate in (0.4, 0.0))
    rates = [module.p for module in dropping.modules() if isinstance(module, StochasticDepth)]
    assert rates == pytest.approx([0.05 * block for block in range(1, 9)])  # the first of nine has none
    assert equal(dropping, plain) and list(dropping.state_dict()) == list(plain.state_dict())
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(dropping.eval()(images), plain.eval()(images))


def test_a_dropped_sample_is_the_blocks_input_and_a_kept_one_is_scaled() -> None:
    block = build_model(Model(name="resnet50", drop_path=0.6), 10, 0).get_submodule("layer4.2").train()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    x = torch.rand(64, 2048, 2, 2)
    with torch.no_grad():
        out = block(x)
        residual = block.bn3(block.conv3(block.bn2(block.conv2(block.bn1(block.conv1(x)).relu())).relu()))  # type: ignore[operator]
    kept = torch.tensor([not torch.equal(a, b) for a, b in zip(out, x, strict=True)])
    assert 10 <= kept.sum() <= 42  # of 64, each with probability 0.4
    torch.testing.assert_close(out[kept], (x + residual / 0.4).relu()[kept], rtol=1e-4, atol=1e-4)


# --- optimizer ---------------------------------------------------------------------------------------------------


def groups_of(config: Sgd, model: nn.Module) -> dict[str, float]:
    """The weight decay of every parameter, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(config, model).param_groups
    found = [(names[id(p)], group["weight_decay"]) for group in groups for p in group["params"]]
    assert len(found) == len(names)  # each once
    return dict(found)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "cifar-resnet20"])
def test_batch_norm_and_biases_do_not_decay_and_the_shortcuts_batch_norm_is_one(name: str) -> None:
    model = build_model(Model(name=name), 10, 0)
    decay = groups_of(Sgd(weight_decay=5e-4), model)
    shortcuts = {key for key in decay if "downsample.1" in key}
    assert shortcuts
    for key, value in decay.items():
        is_convolution = model.get_parameter(key).ndim > 1
        assert value == (5e-4 if is_convolution else 0.0), key
    assert decay["fc.weight"] == 5e-4 and decay["fc.bias"] == 0.0


def test_everything_decays_where_the_recipe_asks() -> None:
    model = build_model(SMALL, 10, 0)
    assert set(groups_of(Sgd(weight_decay=1e-4, decay_norm_and_bias=True), model).values()) == {1e-4}


def test_momentum_exists_before_the_first_step_and_makes_no_difference_to_it() -> None:
    models = [build_model(SMALL, 10, 0) for _ in range(2)]
    config = Sgd(momentum=0.9, nesterov=True, weight_decay=5e-4, decay_norm_and_bias=True)
    ours = build_optimizer(config, models[0])
    plain = torch.optim.SGD(models[1].parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    before = {key: sorted(value) for key, value in ours.state_dict()["state"].items()}
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        for model, optimizer in zip(models, (ours, plain), strict=True):
            optimizer.param_groups[0]["lr"] = 0.1
            optimizer.zero_grad()
            model(images).logsumexp(1).sum().backward()
            optimizer.step()
    assert {key: sorted(value) for key, value in ours.state_dict()["state"].items()} == before
    assert set(before) == set(range(len(list(models[0].parameters()))))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_without_momentum_there_is_no_momentum_to_save() -> None:
    optimizer = build_optimizer(Sgd(momentum=0.0), build_model(SMALL, 10, 0))
    assert not optimizer.state_dict()["state"]


# --- schedules ---------------------------------------------------------------------------------------------------


def recipe(schedule: str, duration: str = "100it") -> Recipe:
    return load_recipe("digits", [f"schedule={schedule}", f"duration={duration}", "batch={size: 10, micro: 5}"])


def rates(made: Recipe, num_samples: int = 1000) -> list[float]:
    return [learning_rate(made, num_samples, step) for step in range(total_steps(made, num_samples))]


def torch_rates(schedule: torch.optim.lr_scheduler.LRScheduler, steps: int) -> Iterator[float]:
    for _ in range(steps):
        yield schedule.optimizer.param_groups[0]["lr"]
        schedule.optimizer.step()
        schedule.step()


def optimizer(lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def test_multistep_is_torchs() -> None:
    made = recipe("{kind: multistep, lr: 0.8, milestones: [30it, 0.6ep, 900samples], gamma: 0.25}")
    expected = torch.optim.lr_scheduler.MultiStepLR(optimizer(0.8), [30, 60, 90], 0.25)
    assert rates(made) == pytest.approx(list(torch_rates(expected, 100)))
    assert rates(made)[29:31] == [0.8, 0.2]


def test_cosine_is_torchs() -> None:
    made = recipe("{kind: cosine, lr: 0.8, end_lr: 0.01}")
    expected = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer(0.8), T_max=100, eta_min=0.01)
    assert rates(made) == pytest.approx(list(torch_rates(expected, 100)))


def test_constant_is_constant_and_one_cycle_goes_linearly_up_and_down() -> None:
    assert rates(recipe("{kind: constant, lr: 0.8}")) == [0.8] * 100
    made = rates(recipe("{kind: one_cycle, lr: 0.8, end_lr: 0.1, warmup: 20it}"))
    up = [0.8 * (step + 1) / 20 for step in range(20)]
    expected = torch.optim.lr_scheduler.LinearLR(optimizer(0.8), start_factor=1, end_factor=0.125, total_iters=80)
    assert made == pytest.approx(up + list(torch_rates(expected, 80)))


SCHEDULES = {
    "constant": "{kind: constant, lr: 0.8, warmup: %s}",
    "multistep": "{kind: multistep, lr: 0.8, milestones: [50it], warmup: %s}",
    "cosine": "{kind: cosine, lr: 0.8, end_lr: 0.001, warmup: %s}",
    "one_cycle": "{kind: one_cycle, lr: 0.8, end_lr: 0.001, warmup: %s}",
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(("warmup", "steps"), [("0it", 0), ("1it", 1), ("7it", 7), ("0.25ep", 25), ("130samples", 13)])
def test_warm_up_is_linear_and_reaches_the_full_rate_as_it_ends(kind: str, warmup: str, steps: int) -> None:
    made = rates(recipe(SCHEDULES[kind] % warmup))
    assert made[:steps] == pytest.approx([0.8 * (step + 1) / steps for step in range(steps)])
    assert made[steps] == pytest.approx(0.8)
    assert all(0 <= rate <= 0.8 + 1e-12 for rate in made)


@pytest.mark.parametrize("kind", ["cosine", "one_cycle"])
def test_the_rate_would_be_the_end_rate_one_step_after_the_last(kind: str) -> None:
    made = recipe(SCHEDULES[kind] % "10it")
    assert learning_rate(made, 1000, 100) == pytest.approx(0.001)
    falling = rates(made)[10:]
    assert falling == sorted(falling, reverse=True) and falling[-1] > 0.001


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_run_that_is_all_warm_up_still_has_a_schedule(kind: str) -> None:
    made = recipe(SCHEDULES[kind] % "100it")
    assert rates(made)[-1] == pytest.approx(0.8)
    assert all(math.isfinite(rate) for rate in rates(recipe(SCHEDULES[kind] % "500it")))


@pytest.mark.parametrize(
    ("duration", "steps"), [("600000it", 600_000), ("90ep", 450_411), ("1.2Msamples", 4_688), ("1samples", 1)]
)
def test_total_steps_of_imagenet(duration: str, steps: int) -> None:
    made = load_recipe("paper-resnet50", [f"duration={duration}"])
    assert total_steps(made, 1_281_167) == steps


# --- what is due when --------------------------------------------------------------------------------------------


def dues(every: str, steps: int, batch: int, samples: int) -> list[int]:
    length = Duration.parse(every)
    return [step for step in range(1, steps + 1) if is_due(length, step, batch, samples)]


@given(st.integers(1, 400), st.integers(1, 300), st.integers(1, 64), st.integers(1, 2_000), st.data())
@settings(max_examples=150)
def test_every_multiple_of_a_period_is_due_once(
    period: int, steps: int, batch: int, samples: int, data: st.DataObject
) -> None:
    unit = data.draw(st.sampled_from(["it", "samples", "ep"]))
    of_samples = period * {"it": batch, "samples": 1, "ep": samples}[unit]
    found = dues(f"{period}{unit}", steps, batch, samples)
    # By integers: the steps in which one multiple at least, or more where a step is longer than the period, is reached.
    expected = [s for s in range(1, steps + 1) if s * batch // of_samples > (s - 1) * batch // of_samples]
    assert found == expected
    if of_samples >= batch:
        assert len(found) == steps * batch // of_samples


@pytest.mark.parametrize("hundredths", [10, 29, 57, 110, 115, 220])
@given(st.integers(1, 20), st.integers(1, 64), st.integers(1, 20))
def test_hundredths_of_an_epoch_are_due_when_they_are_reached(
    hundredths: int, steps: int, batch: int, times: int
) -> None:
    # 1.1 and its like have no exact binary form: 1.1 * 10 is more than 11, 0.29 * 100 less than 29.
    period = hundredths * steps
    found = dues(f"{hundredths / 100}ep", times * period, batch, 100 * steps * batch)
    assert found == list(range(period, times * period + 1, period))


def test_what_is_due_is_due_in_the_last_of_six_hundred_thousand_steps_too() -> None:
    every = Duration.parse("5kit")
    assert [s for s in (594_999, 595_000, 599_999, 600_000) if is_due(every, s, 256, 1_281_167)] == [595_000, 600_000]
    epoch = Duration.parse("1ep")
    around = [s for s in range(450_400, 450_420) if is_due(epoch, s, 256, 1_281_167)]
    assert around == [total_steps(load_recipe("paper-resnet50", ["duration=90ep"]), 1_281_167)]
