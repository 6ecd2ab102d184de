"""Residual networks and their plain counterparts: He et al. 2015 (arXiv 1512.03385), and the v1.5 variant.

Names of parameters equal torchvision's (and timm's), so that state dicts can be exchanged. Images are
[n, 3, height, width].
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from configs import LonghaulError
from configs.schema import Model

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
    """The network of a recipe with weights drawn from `seed` (the same on every machine); raises LonghaulError."""
    if config.name not in MODELS:
        raise LonghaulError(f"There is no model '{config.name}'; known are {', '.join(MODELS)}.")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU as well
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


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (figure 5, left)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, config: Model) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(config.shortcut, inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return functional.relu(out + identity, inplace=True)


class PlainBlock(nn.Module):
    """Two 3x3 convolutions without a shortcut (figure 3, middle)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, config: Model) -> None:
        super().__init__()
        del config
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

    def __init__(self, inputs: int, width: int, stride: int, config: Model) -> None:
        super().__init__()
        first, second = (stride, 1) if config.stride == "v1" else (1, stride)
        self.conv1 = nn.Conv2d(inputs, width, 1, first, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, second, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = _shortcut(config.shortcut, inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        out = functional.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return functional.relu(out + identity, inplace=True)


Block = type[PlainBlock] | type[BasicBlock] | type[Bottleneck]
BLOCKS: dict[str, Block] = {"plain": PlainBlock, "basic": BasicBlock, "bottleneck": Bottleneck}


def _stage(block: Block, inputs: int, width: int, count: int, stride: int, config: Model) -> nn.Sequential:
    rest = [block(width * block.expansion, width, 1, config) for _ in range(count - 1)]
    return nn.Sequential(block(inputs, width, stride, config), *rest)


class ResNet(nn.Module):
    """The ImageNet networks of table 1."""

    def __init__(self, block: Block, blocks: tuple[int, ...], num_classes: int, config: Model) -> None:
        super().__init__()
        grow = block.expansion
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = _stage(block, 64, 64, blocks[0], 1, config)
        self.layer2 = _stage(block, 64 * grow, 128, blocks[1], 2, config)
        self.layer3 = _stage(block, 128 * grow, 256, blocks[2], 2, config)
        self.layer4 = _stage(block, 256 * grow, 512, blocks[3], 2, config)
        self.fc = nn.Linear(512 * grow, num_classes)
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
        self.layer1 = _stage(block, 16, 16, n, 1, config)
        self.layer2 = _stage(block, 16, 32, n, 2, config)
        self.layer3 = _stage(block, 32, 64, n, 2, config)
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
