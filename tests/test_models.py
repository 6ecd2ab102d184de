"""Networks are the published ones to the parameter."""

import math

import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import StochasticDepth

from configs import LonghaulError
from configs.schema import Model
from trainer.count import count_inference, without_memory
from trainer.models import MODELS, build_model

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
