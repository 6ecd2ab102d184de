"""How strongly the layers of a network respond: He et al. 2015, section 4.2 and figure 7.

The response of a layer is the output of a 3x3 convolution after its batch norm and before the nonlinearity or the
addition. Its standard deviation is over all images, channels and places together.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from configs import LonghaulError
from trainer.analysis.plot import Line, colour, plot
from trainer.analysis.tables import csv_text


@dataclass(frozen=True)
class Response:
    """Of one layer: the convolution's name, and the mean and standard deviation of its `count` outputs."""

    layer: str
    count: int
    mean: float
    std: float


@torch.no_grad()
def measure_responses(network: nn.Module, batches: Iterable[Tensor]) -> list[Response]:
    """The responses of the 3x3 layers, in the order in which a forward pass comes to them.

    Sums are float64, of each image on its own and then exactly over all images, so that they do not depend on how
    images are batched.

    Args:
        network: in evaluation mode: batch norms use their running statistics.
        batches: images, float32 [n, 3, height, width].

    Raises:
        LonghaulError: no 3x3 convolution of the network is followed by a batch norm.
    """
    probe = _Probe(network)
    try:
        for images in batches:
            network(images)
    finally:
        probe.remove()
    if not probe.sums:
        raise LonghaulError(
            "The network has no 3x3 convolution that a batch norm follows: there is no response to measure."
        )
    return [sums.response(layer) for layer, sums in probe.sums.items()]


class _Sums:
    """Of each image the sum and the sum of squares of a layer's outputs."""

    def __init__(self) -> None:
        self.count, self.values, self.squares = 0, list[float](), list[float]()

    def add(self, outputs: Tensor) -> None:
        """Outputs [n, channels, height, width]."""
        wide = outputs.double().flatten(1)
        self.count += wide.numel()
        self.values += wide.sum(1).tolist()
        self.squares += wide.square().sum(1).tolist()

    def response(self, layer: str) -> Response:
        mean = math.fsum(self.values) / self.count
        variance = math.fsum(self.squares) / self.count - mean**2
        return Response(layer, self.count, mean, math.sqrt(max(variance, 0.0)))


class _Probe:
    """Hooks that tell which batch norm takes the output of which 3x3 convolution.

    What the norm does is computed beside it: some modules (timm's) are batch norm and activation in one.
    """

    def __init__(self, network: nn.Module) -> None:
        self.sums: dict[str, _Sums] = {}
        self._latest: tuple[str, Tensor] | None = None
        self._hooks = []
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                self._hooks.append(module.register_forward_hook(self._remember(name)))
            elif isinstance(module, _BatchNorm):
                self._hooks.append(module.register_forward_pre_hook(self._measure))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _remember(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            del module, inputs
            self._latest = (name, output)

        return hook

    def _measure(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._latest is None or self._latest[1] is not inputs[0]:
            return
        name, output = self._latest
        self._latest = None
        assert isinstance(norm, _BatchNorm)
        outputs = nn.functional.batch_norm(
            output, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )
        self.sums.setdefault(name, _Sums()).add(outputs)


def draw_responses(responses: Mapping[str, Sequence[Response]]) -> dict[str, str]:
    """The two pictures of figure 7, SVG: standard deviations by layer, and from the largest to the smallest."""
    by_layer: list[Line] = []
    by_size: list[Line] = []
    for index, (name, found) in enumerate(responses.items()):
        deviations = [response.std for response in found]
        legend = f"{name}: {len(found)} layers, mean {sum(deviations) / len(found):.3f}"
        for lines, values in ((by_layer, deviations), (by_size, sorted(deviations, reverse=True))):
            points = [(float(place), value) for place, value in enumerate(values, start=1)]
            lines.append(Line(legend, colour(index), points, dots=True))
    return {
        "responses-by-layer.svg": plot(by_layer, "layer", "standard deviation"),
        "responses-by-magnitude.svg": plot(by_size, "layer, sorted by magnitude", "standard deviation"),
    }


def responses_csv(responses: Mapping[str, Sequence[Response]]) -> str:
    """A row for each layer: run, layer (from 1), name, rank (1: the largest), std, mean, count."""
    rows: list[tuple[object, ...]] = []
    for run, found in responses.items():
        ranked = sorted(range(len(found)), key=lambda place: -found[place].std)
        ranks = {place: rank for rank, place in enumerate(ranked, start=1)}
        rows += [(run, p + 1, r.layer, ranks[p], r.std, r.mean, r.count) for p, r in enumerate(found)]
    return csv_text(("run", "layer", "name", "rank", "std", "mean", "count"), rows)
