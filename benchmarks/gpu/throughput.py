"""Training images/s of the engine on ready tensors, against torchvision's reference loop in the same run and roofline.

Arms, interleaved over `--rounds`: torchvision's model in the loop of its references (`--amp`: fp16 autocast with a
GradScaler, NCHW; and the same in bf16, channels-last), and Longhaul's engine in bf16 channels-last, eager and compiled.
Nothing is decoded: this is the ceiling that the input path has to keep up with. One process, one device.

    python -m benchmarks.gpu.throughput --device cuda
    python -m benchmarks.gpu.throughput --device cpu --batch 8 --steps 2 --rounds 1 --models resnet18   (does it run?)
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torchvision
from torch import nn

from benchmarks.common import machine, write
from configs import load_recipe
from trainer.engines import Engine, build_engine
from trainer.group import Group, Rendezvous, free_port, join, pick_device

CLASSES, SIZE = 1000, 224
# Bytes a second of device memory, by name; bytes of an image's traffic in bf16 (ResNet-50 at 224, forward and backward,
# computed) with every layer reading and writing once, and with batch norm, ReLU and addition fused into neighbours.
BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12}
TRAFFIC = {"eager": 464e6, "fused": 335e6}

Step = Callable[[torch.Tensor, torch.Tensor], None]


def reference(name: str, device: torch.device, dtype: torch.dtype, channels_last: bool) -> Step:
    """`train_one_epoch` of pytorch/vision references/classification/train.py, without its printing."""
    model: nn.Module = torchvision.models.get_model(name, weights=None).to(device)
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    criterion = nn.CrossEntropyLoss()

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        with torch.autocast(device.type, dtype=dtype):
            loss = criterion(model(images if channels_last else images.contiguous()), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    model.train()
    return step


def ours(name: str, group: Group, batch: int, how: str) -> Step:
    """The engine as the loop drives it: one micro-batch a step."""
    overrides = [f"model.name={name}", f"batch.size={batch}", f"batch.micro={batch}", f"compile={how}"]
    recipe = load_recipe("resnet50", [*overrides, "precision=bf16"])
    engine: Engine = build_engine(recipe, 1_281_167, CLASSES, group)
    done = 0

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        nonlocal done
        engine.forward_backward(images, labels, done, first=True, last=True)
        engine.update(done, 0.1)
        done += 1

    return step


def images_per_second(step: Step, batch: int, steps: int, warmup: int, device: torch.device) -> float:
    images = torch.randn(batch, 3, SIZE, SIZE, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (batch,), device=device)
    for number in range(warmup + steps):
        if number == warmup:
            _wait(device)
            began = time.perf_counter()
        step(images, labels)
    _wait(device)
    return batch * steps / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def roofline(device: torch.device) -> dict[str, float]:
    """Images/s of ResNet-50 that the memory of a known GPU allows."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    bandwidth = next((value for known, value in BANDWIDTH.items() if known in name), None)
    return {} if bandwidth is None else {kind: round(bandwidth / bytes_) for kind, bytes_ in TRAFFIC.items()}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda")
    options.add_argument("--models", nargs="+", default=["resnet50", "resnet101", "resnet152"])
    options.add_argument("--batch", type=int, default=256)
    options.add_argument("--steps", type=int, default=30)
    options.add_argument("--warmup", type=int, default=8)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--compile", nargs="*", default=["default", "cuda-graphs"])
    options.add_argument("--name", default="gpu-throughput")
    given = options.parse_args()
    where, device = machine(), pick_device(given.device, 0)
    torch.backends.cudnn.benchmark = True
    table: dict[str, dict[str, list[float]]] = {}
    with join(Rendezvous(0, 1, 0, "127.0.0.1", free_port()), device, 600) as group:
        for name in given.models:
            arms: dict[str, Callable[[], Step]] = {
                "torchvision reference, fp16 AMP, NCHW": lambda n=name: reference(n, device, torch.float16, False),
                "torchvision reference, bf16, channels-last": lambda n=name: reference(n, device, torch.bfloat16, True),
                **{
                    f"longhaul, bf16, channels-last, {how}": lambda n=name, h=how: ours(n, group, given.batch, h)
                    for how in ("eager", *given.compile)
                },
            }
            rates = table.setdefault(name, {arm: [] for arm in arms})
            for _ in range(given.rounds):
                for arm, build in arms.items():
                    torch.compiler.reset()
                    rates[arm].append(images_per_second(build(), given.batch, given.steps, given.warmup, device))
                    print(f"{name:10} {arm:46} {rates[arm][-1]:10,.1f} images/s", flush=True)
    figures = {
        "what": f"training images/s on ready tensors, {SIZE} x {SIZE}, batch {given.batch}, one process",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "roofline_resnet50": roofline(device),
        "images_per_second": table,
        "median": {n: {arm: statistics.median(found) for arm, found in rates.items()} for n, rates in table.items()},
    }
    print(write(given.name, figures, where))


if __name__ == "__main__":
    main()
