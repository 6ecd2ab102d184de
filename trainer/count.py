"""What a network costs: parameters, multiply-adds, and the memory of a training step.

Nothing is computed. One step runs on tensors without contents (torch's FakeTensorMode, as on a CPU and in the recipe's
precision), and it is recorded what the step does:

* multiply-adds of convolutions and matrix products, at half of the operations that torch.utils.flop_counter gives them;
  biases, batch norm, activations and pooling are not among them, as in the tables of the literature;
* what autograd saves for the backward pass: every tensor's memory once, in the layer that saved it first, and without
  the parameters, which are there anyway;
* the peak of the memory in use, through the forward and the backward pass.

For a batch each of these is a constant and so much for each image; two batch sizes give both.
"""

import logging
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from configs import LonghaulError
from configs.schema import Model
from trainer.models import build_model

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Batch norm needs two images. Which moment is the peak depends on the batch: the peak is the largest of several linear
# functions of it, so that between these two the straight line through them is never below it.
_BATCHES = 2, 1024


@dataclass(frozen=True)
class Layer:
    """What one module does itself, without the modules in it: for a mere container nothing.

    Attributes:
        name: as in `named_modules`; "" is the network itself.
        kind: the class.
        shape: of its (first) output, without the batch; () where it is not called.
        parameters: its own, in elements.
        multiply_adds: for one image.
        saved_bytes: what it saves for the backward pass, for each image.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    multiply_adds: int
    saved_bytes: int

    @property
    def works(self) -> bool:
        return bool(self.parameters or self.multiply_adds or self.saved_bytes)


@dataclass(frozen=True)
class Costs:
    """A network's layers, and the memory of a training step in bytes.

    Attributes:
        layers: every module, in the order of `named_modules`.
        buffer_bytes: of batch-norm statistics and other buffers.
        saved_bytes: saved for the backward pass, for each image (the sum over the layers).
        peak_bytes: at the peak of a forward and backward pass, for each image: what is saved, the batch itself, and
            what is in use at that moment.
        step_bytes: at that peak whatever the batch: copies of the weights in the precision of the arithmetic, and
            gradients before they are added up.
    """

    layers: tuple[Layer, ...]
    buffer_bytes: int
    saved_bytes: int
    peak_bytes: int
    step_bytes: int

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def multiply_adds(self) -> int:
        return sum(layer.multiply_adds for layer in self.layers)


def count(config: Model, num_classes: int, size: int, precision: str) -> Costs:
    """The costs of a recipe's network in training, for images of `size` x `size` in "fp32", "bf16" or "fp16".

    Raises LonghaulError as `build_model` does, and where the network does not take images of this size.
    """
    network = without_memory(config, num_classes)
    try:
        with _quiet("torch._subclasses.fake_tensor"):
            return count_network(network, size, precision)
    except (RuntimeError, AssertionError, ValueError) as error:
        why = " ".join(str(error).split()).rstrip(".")[:200]
        raise LonghaulError(f"The network {config.name} does not take {size}x{size} images: {why}.") from error


def count_inference(config: Model, num_classes: int, size: int) -> tuple[int, int]:
    """Parameters, and the multiply-adds for one image in evaluation mode: without auxiliary classifiers at work, and
    much faster than `count`."""
    network = without_memory(config, num_classes).eval()
    found: list[int] = []
    with _Arithmetic(found.append), torch.no_grad():
        network(torch.empty(1, 3, size, size, device="meta"))
    return sum(parameter.numel() for parameter in network.parameters()), sum(found)


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Without the traceback that torch logs where shapes do not fit, on top of the error that says so."""
    log = logging.getLogger(logger)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def without_memory(config: Model, num_classes: int) -> nn.Module:
    """The network of a recipe with parameters that have shapes and no contents (device "meta")."""
    try:
        with torch.device("meta"):
            return build_model(config, num_classes, seed=0)
    except NotImplementedError:  # torchvision's RegNet computes its widths with tensors
        return build_model(config, num_classes, seed=0).to("meta")


def count_network(network: nn.Module, size: int, precision: str) -> Costs:
    """As `count`, of any network that returns logits or a tuple of logits. Of `network` only shapes are used, and its
    parameters are replaced by ones without contents."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        network.train()._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        few, many = (_Step(network, size, precision, batch) for batch in _BATCHES)
    more = _BATCHES[1] - _BATCHES[0]
    layers = []
    for name, module in network.named_modules():
        saved = (many.saved[name] - few.saved[name]) // more
        shape = many.shapes.get(name, ())
        parameters = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        multiply_adds = many.multiply_adds[name] // _BATCHES[1]
        layers.append(Layer(name, type(module).__name__, shape, parameters, multiply_adds, saved))
    peak = (many.live.peak - few.live.peak) // more
    return Costs(
        tuple(layers),
        sum(buffer.nbytes for buffer in network.buffers()),
        sum(layer.saved_bytes for layer in layers),
        peak,
        many.live.peak - _BATCHES[1] * peak,
    )


class _Step:
    """One forward and backward pass of `batch` images, recorded by module."""

    def __init__(self, network: nn.Module, size: int, precision: str, batch: int) -> None:
        self.multiply_adds: dict[str, int] = defaultdict(int)
        self.saved: dict[str, int] = defaultdict(int)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._where = [""]
        for parameter in network.parameters():
            parameter.grad = torch.empty_like(parameter)
        weights, gradients = list(network.parameters()), [parameter.grad for parameter in network.parameters()]
        self._known = _storages(weights)
        self.live = _Live(_storages([*weights, *gradients, *network.buffers()]))
        with self._modules_watched(network), self.live:
            images = torch.empty(batch, 3, size, size)
            autocast = torch.autocast("cpu", dtype=_DTYPES[precision], enabled=precision != "fp32")
            with autocast, torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor):
                with _Arithmetic(self._add):
                    outputs = network(images)
            tuple_of = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.autograd.backward([logits.float().logsumexp(1).sum() for logits in tuple_of])

    def _save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.saved[self._where[-1]] += storage.nbytes()
        return tensor

    def _add(self, multiply_adds: int) -> None:
        self.multiply_adds[self._where[-1]] += multiply_adds

    @contextmanager
    def _modules_watched(self, network: nn.Module) -> Iterator[None]:
        def enter(name: str) -> Callable[..., None]:
            return lambda *_: self._where.append(name)

        def leave(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                self._where.pop()
                tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
                self.shapes[name] = tuple(tensors[0].shape[1:]) if tensors else ()

            return hook

        handles = [
            handle
            for name, module in network.named_modules()
            for handle in (module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave(name)))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _storages(tensors: Iterable[Tensor | None]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors if tensor is not None}


class _Arithmetic(TorchDispatchMode):
    """Hands the multiply-adds of every operation to `add`."""

    def __init__(self, add: Callable[[int], None]) -> None:
        super().__init__()
        self._add = add

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        operations = flop_registry.get(func._overloadpacket)
        if operations is not None:
            self._add(operations(*args, **(kwargs or {}), out_val=output) // 2)
        return output


class _Live(TorchDispatchMode):
    """The bytes in use, and their `peak`, of what was allocated within it: of all storages but the `known` ones."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._seen = known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._track(leaf.untyped_storage())
        return output

    def _track(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._seen:
            self._seen.add(key)
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._release, key, storage.nbytes())

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._now -= size
