"""Parameters, multiply-adds and memory as counted without computing, against closed forms and what really happens."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from configs import LonghaulError
from configs.optimisation import Lamb, Lars, Optimizer, Sgd
from configs.schema import Model
from launch.model import stages
from tests.conftest import longhaul
from trainer.count import Costs, Layer, count, count_inference, count_network, without_memory
from trainer.fit import RESERVE, footprint, largest_micro_batch
from trainer.models import build_model
from trainer.optim import build_optimizer

# --- layers ------------------------------------------------------------------------------------------------------


def test_each_layer_is_what_it_is_by_hand() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16 * 16, 5))
    network.append(nn.Dropout(0.5))
    costs = count_network(network, 16, "fp32")
    assert [layer for layer in costs.layers if layer.works] == [
        Layer("0", "Conv2d", (8, 16, 16), 3 * 8 * 9 + 8, 3 * 8 * 9 * 256, 3 * 256 * 4),  # saves the images
        Layer("1", "ReLU", (8, 16, 16), 0, 0, 8 * 256 * 4),  # its output, which the linear layer needs too
        Layer("3", "Linear", (5,), 8 * 256 * 5 + 5, 8 * 256 * 5, 0),
        Layer("4", "Dropout", (5,), 0, 0, 5 * 4),  # the mask, already scaled
    ]
    assert [layer.name for layer in costs.layers] == ["", "0", "1", "2", "3", "4"]
    assert costs.saved_bytes == sum(layer.saved_bytes for layer in costs.layers)


def test_the_peak_of_a_linear_layer_is_by_hand() -> None:
    # At the peak: images, logits, and their gradient; the loss of a sample is a number or two.
    costs = count_network(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 1000)), 32, "fp32")
    assert 4 * (3 * 32 * 32 + 2 * 1000) <= costs.peak_bytes <= 4 * (3 * 32 * 32 + 4 * 1000)


def test_parameters_of_modules_that_hold_others_are_counted() -> None:
    config = Model(name="timm:test_vit")  # a class token and position embeddings
    costs = count(config, 10, 160, "fp32")
    assert costs.parameters == sum(p.numel() for p in without_memory(config, 10).parameters())
    assert costs.layers[0].parameters > 0


@pytest.mark.parametrize("name", ["resnet50", "plain18", "torchvision:regnet_y_400mf"])
def test_training_and_evaluation_multiply_and_add_alike(name: str) -> None:
    costs = count(Model(name=name), 1000, 64, "bf16")
    assert count_inference(Model(name=name), 1000, 64) == (costs.parameters, costs.multiply_adds)


def test_a_size_that_does_not_fit_is_refused_in_a_sentence() -> None:
    with pytest.raises(
        LonghaulError, match=r"The network torchvision:inception_v3 does not take 64x64 images: .*small\."
    ):
        count(Model(name="torchvision:inception_v3"), 10, 64, "fp32")
    with pytest.raises(LonghaulError, match=r"The network timm:vit_tiny_patch16_224 does not take 64x64 images: .*224"):
        count(Model(name="timm:vit_tiny_patch16_224"), 10, 64, "fp32")


# --- memory, against a real pass on the CPU ----------------------------------------------------------------------


def storages(tensors: Iterator[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def really(network: nn.Module, batch: int, size: int, precision: str) -> tuple[int, int]:
    """The bytes that autograd saves in a real pass, and the peak of what the allocator handed out, by its own count."""
    known, saved = storages(network.parameters()), {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        images = torch.randn(batch, 3, size, size)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                outputs = network(images)
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward([logits.float().logsumexp(1).sum() for logits in several])
    kineto = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted((e.start_ns(), e.nbytes()) for e in kineto.events() if e.name() == "[memory]")
    now = peak = 0
    for _, change in events:
        now += change
        peak = max(peak, now)
    return sum(saved.values()), peak


@pytest.mark.parametrize(
    ("name", "size", "precision"),
    [
        ("cifar-resnet20", 32, "bf16"),
        ("resnet18", 64, "fp32"),
        ("resnet50", 64, "bf16"),
        ("torchvision:googlenet", 64, "fp32"),
        ("timm:test_vit", 160, "bf16"),
    ],
)
def test_what_autograd_saves_for_an_image_is_what_it_really_saves(name: str, size: int, precision: str) -> None:
    network = build_model(Model(name=name), 10, 0).train()
    few, many = (really(network, batch, size, precision)[0] for batch in (2, 5))
    assert count(Model(name=name), 10, size, precision).saved_bytes * 3 == many - few


@pytest.mark.parametrize(("name", "size"), [("torchvision:vgg11", 32), ("cifar-resnet20", 32), ("resnet50", 96)])
def test_the_peak_is_close_to_the_allocators(name: str, size: int) -> None:
    network = build_model(Model(name=name), 10, 0).train()
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    costs = count(Model(name=name), 10, size, "bf16")
    _, peak = really(network, 8, size, "bf16")
    # Workspaces of the CPU's convolutions are in the allocator's figure alone.
    assert 0.97 <= peak / (costs.step_bytes + 8 * costs.peak_bytes) <= 1.1


@pytest.mark.parametrize("optimizer", [Sgd(), Sgd(momentum=0.0)])
def test_the_optimizers_state_is_as_large_as_said(optimizer: Optimizer) -> None:
    network = build_model(Model(name="cifar-resnet20"), 10, 0)
    built = build_optimizer(optimizer, network)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    built.step()
    real = sum(t.nbytes for state in built.state.values() for t in state.values() if isinstance(t, Tensor) and t.ndim)
    costs = count(Model(name="cifar-resnet20"), 10, 32, "fp32")
    assert footprint(costs, optimizer, False).optimizer == real


def test_what_is_kept_of_a_network() -> None:
    costs = Costs((Layer("", "X", (), 100, 0, 0),), buffer_bytes=12, saved_bytes=0, peak_bytes=1, step_bytes=0)
    kept = [footprint(costs, optimizer, averaged=True) for optimizer in (Sgd(), Lars(), Lamb())]
    assert [(k.weights, k.gradients, k.average) for k in kept] == [(412, 400, 412)] * 3
    assert [k.optimizer for k in kept] == [400, 400, 800]
    assert footprint(costs, Sgd(), averaged=False).total == 1212


@given(st.integers(1, 10**8), st.integers(0, 10**8), st.integers(0, 10**7), st.integers(1, 10**11))
def test_the_largest_micro_batch_fits_and_one_more_does_not(
    image: int, step: int, parameters: int, memory: int
) -> None:
    costs = Costs((Layer("", "X", (), parameters, 0, 0),), 0, 0, image, step)
    kept = footprint(costs, Sgd(), averaged=False)
    most = largest_micro_batch(costs, kept, memory)
    taken = kept.total + step + int(RESERVE * memory)
    assert most == 0 or taken + most * image <= memory
    assert taken + (most + 1) * image > memory


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: longhaul(capsys, monkeypatch, "model", *arguments)


def cells(output: str, first: str) -> list[str]:
    (row,) = [line for line in output.splitlines() if line.startswith(f"│ {first} ")]
    return [cell.strip() for cell in row.strip("│").split("│")]


def test_without_a_name_it_lists_ours_and_how_to_name_others(cli) -> None:  # type: ignore[no-untyped-def]
    code, output = cli()
    assert code == 0 and "torchvision:vgg16" in output and "timm:resnet50d" in output
    assert cells(output, "resnet152") == ["resnet152", "224x224", "B", "60,192,808", "11.514"]
    assert cells(output, "cifar-plain56") == ["cifar-plain56", "32x32", "", "853,018", "0.125"]


def test_a_network_by_stage_and_by_layer(cli) -> None:  # type: ignore[no-untyped-def]
    code, output = cli("resnet50", "stride=v1", "shortcut=C", "--memory", "24GiB", "--optimizer", "lamb")
    assert code == 0 and "resnet50 (stride v1, shortcut C): 224x224 images, 1000 classes" in output
    assert cells(output, "layer3")[:3] == ["layer3", "6 x Bottleneck", "1024x14x14"]
    assert cells(output, "all")[3] == "40,128,552" and "+ lamb 321 MB" in output
    assert "The largest micro-batch is " in output and "10% of it left" in output
    code, output = cli("cifar-resnet20", "--layers", "--precision", "fp32")
    assert code == 0 and "shortcut A" in output and "10 classes" in output
    assert cells(output, "layer3.2.conv2") == ["layer3.2.conv2", "Conv2d", "64x8x8", "36,864", "0.002", "0 bytes"]
    assert "Not even one image fits" in cli("cifar-resnet20", "--memory", "1MB")[1]


def test_a_recipe_brings_its_network_size_precision_and_optimizer(cli) -> None:  # type: ignore[no-untyped-def]
    code, output = cli("paper-resnet50", "--size", "64")
    assert code == 0 and "resnet50 (stride v1, shortcut B): 64x64 images" in output
    code, output = cli("digits", "model.name=timm:test_vit", "shortcut=B", "--size", "160", "--classes", "7")
    assert code == 0 and "timm:test_vit: 160x160 images, 7 classes" in output


def test_a_part_that_does_most_of_it_is_shown_by_its_own(cli) -> None:  # type: ignore[no-untyped-def]
    costs = count(Model(name="torchvision:squeezenet1_1"), 10, 64, "fp32")
    shown = stages(costs.layers)
    assert [layer.name for layer in shown if layer.kind == "Fire"][:2] == ["features.3", "features.4"]
    assert sum(layer.parameters for layer in shown) == costs.parameters
    assert sum(layer.saved_bytes for layer in shown) == costs.saved_bytes


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("resnet51",), ["no network and no recipe 'resnet51'", "longhaul model"]),
        (("timm:resnet51",), ["'resnet51'", "did you mean"]),
        (("resnet18", "short=C"), ["'model.short'", "did you mean 'shortcut'"]),
        (("resnet18", "shortcut"), ["key=value"]),
        (("resnet18", "--precision", "fp8"), ["precision", "bf16"]),
        (("resnet18", "--optimizer", "adam"), ["'adam'", "sgd, lars or lamb"]),
        (("resnet18", "--memory", "much"), ["--memory much", "80GB"]),
        (("mine.yaml",), ["mine.yaml"]),
        (("torchvision:inception_v3", "--size", "64"), ["torchvision:inception_v3", "64x64"]),
    ],
)
def test_a_mistake_is_one_sentence(cli, arguments: tuple[str, ...], named: list[str]) -> None:  # type: ignore[no-untyped-def]
    code, output = cli(*arguments)
    assert code == 2 and "Traceback" not in output
    (message,) = [line for line in output.splitlines() if "Error:" in line]
    assert all(part in message for part in named), message
