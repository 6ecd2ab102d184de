"""How far our optimizers stray from others' after a hundred steps of a real network, in float64.

    python -m benchmarks.optimisers

Every arm trains its own copy of a CIFAR ResNet-20 on the same random images, its gradients taken at its own weights,
so that a difference is carried on. The references are timm's optimizers, and numpy transcriptions of what NVIDIA and
Caffe publish: MXNet's multi_lars and sgd_mom_update (LARS, of NVIDIA's MLPerf submissions), apex's
multi_tensor_lamb.cu (LAMB), Caffe's sgd_solver.cpp and nesterov_solver.cpp. The deviation is the largest, over
parameters and steps, of |ours - theirs| / |theirs| (L2).
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import timm
import timm.optim
import torch
from torch import nn
from torch.nn import functional

from benchmarks.common import machine, write
from configs.optimisation import Lamb, Lars, Optimizer, Sgd
from configs.schema import Model
from trainer.models import build_model
from trainer.optim import build_optimizer

STEPS = 100
_DECAY = 5e-3  # large, so that a slip in it shows
_BATCH, _SIZE = 4, 8


class Arm(Protocol):
    """An optimizer of a network whose gradients have been taken."""

    def step(self, lr: float) -> None: ...


@dataclass
class TorchArm:
    """A torch optimizer."""

    optimizer: torch.optim.Optimizer

    def step(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()


@dataclass
class NumpyArm:
    """A formula on numpy arrays, given (name, weight, gradient, lr, step from 1); returns the new weight."""

    network: nn.Module
    formula: Callable[[str, np.ndarray, np.ndarray, float, int], np.ndarray]
    steps: int = 0

    def step(self, lr: float) -> None:
        self.steps += 1
        for name, parameter in self.network.named_parameters():
            assert parameter.grad is not None
            new = self.formula(name, parameter.detach().numpy(), parameter.grad.numpy(), lr, self.steps)
            parameter.data.copy_(torch.from_numpy(new))


@dataclass
class MxnetLars:
    """multi_lars-inl.h gives the rate of each layer, sgd_mom_update takes it: v = momentum v - rate (g + wd w)."""

    momentum: float = 0.9
    trust: float = 0.001
    moments: dict[str, np.ndarray] = field(default_factory=dict)

    def __call__(self, name: str, w: np.ndarray, g: np.ndarray, lr: float, step: int) -> np.ndarray:
        del step
        decay, rate = 0.0, lr
        if w.ndim > 1:
            decay = _DECAY
            w_norm, g_norm = np.sqrt(np.sum(w * w)), np.sqrt(np.sum(g * g))
            if w_norm > 0 and g_norm > 0:
                rate = lr * self.trust * w_norm / (g_norm + decay * w_norm)
        v = self.momentum * self.moments.get(name, np.zeros_like(w)) - rate * (g + decay * w)
        self.moments[name] = v
        return w + v


@dataclass
class ApexLamb:
    """multi_tensor_lamb.cu: stage 1 in its decoupled mode, bias-corrected, gradients averaged, not clipped; stage 2."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    moments: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def __call__(self, name: str, w: np.ndarray, g: np.ndarray, lr: float, step: int) -> np.ndarray:
        beta1, beta2 = self.betas
        decay = _DECAY if w.ndim > 1 else 0.0
        m, v = self.moments.get(name, (np.zeros_like(w), np.zeros_like(w)))
        m = m * beta1 + (1 - beta1) * g
        v = v * beta2 + (1 - beta2) * g * g
        self.moments[name] = m, v
        update = m / (1 - beta1**step) / (np.sqrt(v / (1 - beta2**step)) + self.eps) + decay * w
        rate = lr
        if decay != 0:
            w_norm, u_norm = np.sqrt(np.sum(w * w)), np.sqrt(np.sum(update * update))
            rate = lr * (w_norm / u_norm) if w_norm != 0 and u_norm != 0 else lr
        return w - rate * update


@dataclass
class CaffeSolver:
    """Regularize and ComputeUpdateValue: history = rate diff + momentum history; Nesterov's solver steps back, then
    over."""

    nesterov: bool
    momentum: float = 0.9
    history: dict[str, np.ndarray] = field(default_factory=dict)

    def __call__(self, name: str, w: np.ndarray, g: np.ndarray, lr: float, step: int) -> np.ndarray:
        del step
        diff = g + (_DECAY if w.ndim > 1 else 0.0) * w
        old = self.history.get(name, np.zeros_like(w))
        new = lr * diff + self.momentum * old
        self.history[name] = new
        return w - ((1 + self.momentum) * new - self.momentum * old if self.nesterov else new)


def _ours(config: Optimizer) -> Callable[[nn.Module], Arm]:
    return lambda network: TorchArm(build_optimizer(config, network))


def _timm(kind: Any, **options: Any) -> Callable[[nn.Module], Arm]:
    def make(network: nn.Module) -> Arm:
        groups = timm.optim.param_groups_weight_decay(network, _DECAY)
        return TorchArm(kind(groups, weight_decay=_DECAY, foreach=False, **options))

    return make


def _numpy(formula: Callable[[], Callable[..., np.ndarray]]) -> Callable[[nn.Module], Arm]:
    return lambda network: NumpyArm(network, formula())


@dataclass(frozen=True)
class Comparison:
    """One of our optimizers against others, at learning rates that change or do not."""

    ours: Optimizer
    others: Mapping[str, Callable[[nn.Module], Arm]]
    lr: float
    constant: bool = False

    def rate(self, step: int) -> float:
        """A warm-up over ten steps, then divided by 10 every thirty."""
        return self.lr if self.constant else self.lr * min(1.0, (step + 1) / 10) * 0.1 ** (step // 30)


def _sgd(style: Any, nesterov: bool) -> Sgd:
    return Sgd(style=style, nesterov=nesterov, weight_decay=_DECAY)


COMPARISONS = {
    "lars-torch": Comparison(
        Lars(weight_decay=_DECAY),
        {"timm": _timm(timm.optim.Lars, momentum=0.9, trust_coeff=0.001, eps=0.0)},
        lr=8.0,
    ),
    "lars-caffe": Comparison(Lars(weight_decay=_DECAY, style="caffe"), {"mxnet": _numpy(MxnetLars)}, lr=8.0),
    "lamb": Comparison(
        Lamb(weight_decay=_DECAY),
        {"timm": _timm(timm.optim.Lamb, max_grad_norm=None), "apex": _numpy(ApexLamb)},
        lr=0.01,
    ),
    "sgd-caffe": Comparison(_sgd("caffe", False), {"caffe": _numpy(lambda: CaffeSolver(False))}, lr=0.05),
    "sgd-caffe-nesterov": Comparison(_sgd("caffe", True), {"caffe": _numpy(lambda: CaffeSolver(True))}, lr=0.05),
    "sgd-constant": Comparison(_sgd("torch", False), {"ours-caffe": _ours(_sgd("caffe", False))}, 0.05, constant=True),
    "sgd-constant-nesterov": Comparison(
        _sgd("torch", True), {"ours-caffe": _ours(_sgd("caffe", True))}, 0.05, constant=True
    ),
}


def deviations(comparison: Comparison, steps: int = STEPS) -> dict[str, float]:
    """The deviation of our optimizer from each of the others."""
    random = torch.Generator().manual_seed(0)
    makers = {"ours": _ours(comparison.ours), **comparison.others}
    networks = {name: build_model(Model(name="cifar-resnet20"), 10, 0).double() for name in makers}
    arms = {name: make(networks[name]) for name, make in makers.items()}
    worst = dict.fromkeys(comparison.others, 0.0)
    for step in range(steps):
        images = torch.randn(_BATCH, 3, _SIZE, _SIZE, generator=random, dtype=torch.float64)
        labels = torch.randint(10, (_BATCH,), generator=random)
        for name, arm in arms.items():
            networks[name].zero_grad()
            functional.cross_entropy(networks[name](images), labels).backward()
            arm.step(comparison.rate(step))
        for name in worst:
            worst[name] = max(worst[name], _apart(networks["ours"], networks[name]))
    return worst


def _apart(ours: nn.Module, theirs: nn.Module) -> float:
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return max(float(((a - b).norm() / b.norm()).detach()) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    where = machine()
    found = {name: deviations(comparison) for name, comparison in COMPARISONS.items()}
    setting = {
        "network": "cifar-resnet20", "steps": STEPS, "batch": _BATCH, "size": _SIZE, "dtype": "float64",
        "timm": timm.__version__,
    }  # fmt: skip
    path = write("optimisers", {"setting": setting, "largest_relative_deviation": found}, where)
    print(path.read_text())


if __name__ == "__main__":
    main()
