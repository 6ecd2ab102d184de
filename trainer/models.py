"""Residual networks and their plain counterparts: He et al. 2015 (arXiv 1512.03385), and the v1.5 variant.

Every network, of ours or of a library, takes images [n, 3, height, width] and returns logits [n, classes]; in training
mode one with auxiliary classifiers returns a tuple (logits, *auxiliary logits), each [n, classes]. The names of the
parameters of ours equal torchvision's and timm's, so that state dicts can be exchanged.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from configs import LonghaulError, did_you_mean
from configs.schema import Model
from trainer.zoo import LIBRARIES, build_library_model

_IMAGENET = {  # kind of block, blocks a stage (table 1)
    "plain18": ("plain", (2, 2, 2, 2)),
    "plain34": ("plain", (3, 4, 6, 3)),
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}
_CIFAR = {  # kind of block, blocks a stage (section 4.2)
    f"cifar-{name}{6 * n + 2}": (kind, n)
    for name, kind in (("plain", "plain"), ("resnet", "basic"))
    for n in (3, 5, 7, 9, 18, 200)
}
MODELS = (*_IMAGENET, *_CIFAR)


def build_model(config: Model, num_classes: int, seed: int) -> nn.Module:
    """The network of a recipe, float32, its weights drawn from `seed`: the same on every machine, whatever was drawn
    before, and torch's generators stay as they are. Raises LonghaulError for a name or an option that cannot be."""
    library, colon, name = config.name.partition(":")
    if config.name not in MODELS and library not in LIBRARIES:
        if colon:
            raise LonghaulError(f"model.name={config.name}: the libraries are {' and '.join(LIBRARIES)}.")
        raise LonghaulError(
            f"There is no model '{config.name}'{did_you_mean(config.name, MODELS)}; known are {', '.join(MODELS)}, and "
            "those of libraries, as torchvision:vgg16 or timm:resnet50d."
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU as well
        if colon:
            return build_library_model(library, name, num_classes, config.drop_path)
        if config.name in _CIFAR:
            kind, n = _CIFAR[config.name]
            return CifarResNet(BLOCKS[kind], n, num_classes, config)
        kind, blocks = _IMAGENET[config.name]
        return ResNet(BLOCKS[kind], blocks, num_classes, config)


class PadShortcut(nn.Module):
    """Option A: every second pixel, new channels filled with zeros; no parameters."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels, self.stride = new_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


def _shortcut(option: str, inputs: int, outputs: int, stride: int) -> nn.Module | None:
    """None is the identity. A pads where the shape changes, B projects there, C projects everywhere (section 3.3)."""
    if stride == 1 and inputs == outputs and option != "C":
        return None
    if option == "A":
        return PadShortcut(outputs - inputs, stride)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _drop_path(rate: float) -> nn.Module:
    """Stochastic depth: in training a sample skips the block with probability `rate`; otherwise its residual is divided
    by 1 - rate."""
    if rate == 0.0:
        return nn.Identity()
    from torchvision.ops import StochasticDepth  # seconds to import, for what few recipes ask for

    return StochasticDepth(rate, "row")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (figure 5, left)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, drop_path: float, config: Model) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.drop_path = _drop_path(drop_path)
        self.downsample = _shortcut(config.shortcut, inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.drop_path(self.bn2(self.conv2(out)))
        return functional.relu(out + identity, inplace=True)


class PlainBlock(nn.Module):
    """Two 3x3 convolutions without a shortcut (figure 3, middle)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, drop_path: float, config: Model) -> None:
        super().__init__()
        del drop_path, config  # the schema lets a plain network have none
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        return functional.relu(self.bn2(self.conv2(out)), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 (figure 5, right). The stride stands in the first convolution (v1) or the second (v1.5)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, drop_path: float, config: Model) -> None:
        super().__init__()
        first, second = (stride, 1) if config.stride == "v1" else (1, stride)
        self.conv1 = nn.Conv2d(inputs, width, 1, first, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, second, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.drop_path = _drop_path(drop_path)
        self.downsample = _shortcut(config.shortcut, inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        out = functional.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.drop_path(self.bn3(self.conv3(out)))
        return functional.relu(out + identity, inplace=True)


Block = type[PlainBlock] | type[BasicBlock] | type[Bottleneck]
BLOCKS: dict[str, Block] = {"plain": PlainBlock, "basic": BasicBlock, "bottleneck": Bottleneck}


def _stages(block: Block, blocks: Sequence[int], width: int, config: Model) -> Iterator[nn.Sequential]:
    """Stages of so many `blocks`, after a stem of `width` channels: each twice as wide and half as high as the one
    before. `drop_path` grows linearly from 0 in the first block to its full rate in the last, as in timm."""
    last = sum(blocks) - 1
    rates = [config.drop_path * index / last for index in range(last + 1)]
    inputs, stride = width, 1
    for count in blocks:
        modules = []
        for _ in range(count):
            modules.append(block(inputs, width, stride, rates.pop(0), config))
            inputs, stride = width * block.expansion, 1
        yield nn.Sequential(*modules)
        width, stride = 2 * width, 2


class ResNet(nn.Module):
    """The ImageNet networks of table 1."""

    def __init__(self, block: Block, blocks: tuple[int, ...], num_classes: int, config: Model) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1, self.layer2, self.layer3, self.layer4 = _stages(block, blocks, 64, config)
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        _initialise(self, config)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(functional.relu(self.bn1(self.conv1(x)), inplace=True))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class CifarResNet(nn.Module):
    """The CIFAR-10 networks of section 4.2: 6n + 2 layers, widths 16, 32 and 64."""

    def __init__(self, block: Block, n: int, num_classes: int, config: Model) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = _stages(block, (n, n, n), 16, config)
        self.fc = nn.Linear(64, num_classes)
        _initialise(self, config)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def _initialise(model: nn.Module, config: Model) -> None:
    """He et al. 2015 (arXiv 1502.01852), fan-out as in fb.resnet.torch; the last gamma of a block 0 where asked."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if config.zero_init_gamma:
        for module in model.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)
            elif isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
