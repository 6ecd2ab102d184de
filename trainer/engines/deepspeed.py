"""DeepSpeed: ZeRO stages 0 to 3."""

import copy
import logging
import os
import warnings
from types import ModuleType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from configs import LonghaulError, Recipe
from trainer.checkpoints.state import Piece, State
from trainer.engines.base import Engine
from trainer.engines.deepspeed_config import deepspeed_config, zero_stage
from trainer.engines.deepspeed_partitions import PartitionOptimizer, Stretch, stretches
from trainer.group import Group
from trainer.optim import build_optimizer
from trainer.predict import autocast


class DeepSpeedEngine(Engine):
    """Every rank holds all weights and the optimizer state of a part of them (stage 1), gradients of that part too
    (stage 2), or a part of everything (stage 3). Stage 0 spreads nothing.

    DeepSpeed moves tensors between ranks. It neither scales nor clips: it takes itself to be computing in fp32 with
    plain gradients. Only stage 3 looks for gradients that are not finite by itself too, and skips the same updates.
    Weights are NCHW, as it demands; activations keep the images' memory format.
    """

    def __init__(self, recipe: Recipe, num_samples: int, num_classes: int, group: Group) -> None:
        self._stage = zero_stage(recipe)
        # Stage 2 spreads the gradients of every pass, stage 3 gathers the weights for it.
        self.collective_passes = self._stage >= 2
        super().__init__(recipe, num_samples, num_classes, group)

    def _prepare(self) -> torch.optim.Optimizer:
        parameters = list(self._model.parameters())
        config = deepspeed_config(self._recipe, sum(parameter.numel() for parameter in parameters))
        network = _Autocasting(self._model, self._recipe, self._group.device)
        exact = self._recipe.deterministic
        self._held: dict[str, tuple[torch.Size, Stretch]] = {}
        if self._stage == 0:
            optimizer = build_optimizer(self._recipe.optimizer, self._model, exact=exact)
            self._engine = _initialise(network, optimizer, config, self._group)
            return optimizer
        shapes = copy.deepcopy(self._model).to("meta")  # stage 3 takes them from the model, and they decide on decay
        outer = PartitionOptimizer(parameters)
        self._engine = _initialise(network, outer, config, self._group)
        held = stretches(self._engine.optimizer, self._stage, self._group.rank)
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        whole = dict(shapes.named_parameters())
        for stretch in held:
            name = names[id(stretch.parameter)]
            self._held[name] = whole[name].shape, stretch
        stepped = {whole[name]: stretch.values for name, (_, stretch) in self._held.items()}
        optimizer = build_optimizer(self._recipe.optimizer, shapes, stepped.__getitem__, self._norms, exact)
        outer.delegate(held, optimizer.step)
        return optimizer

    def _forward(self, images: Tensor, last: bool) -> Any:
        self._engine.set_gradient_accumulation_boundary(last)
        with torch.autocast(self._group.device.type, enabled=False):  # DeepSpeed ends any but its own, and complains
            return self._engine(images)

    def _backward(self, loss: Tensor, last: bool) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)
        if last and self._stage == 3:
            torch._foreach_mul_(self._gradients(), float(self._group.world_size))  # it knows the mean alone

    def _gradients(self) -> list[Tensor]:
        if self._stage == 0:
            return [parameter.grad for parameter in self._model.parameters() if parameter.grad is not None]
        return [part for parts in self._engine.optimizer.averaged_gradients.values() for part in parts]

    def _step(self) -> None:
        self._engine.step()

    def _weights(self) -> State:
        if self._stage == 0:
            return dict(self._model.named_parameters())
        return {name: self._piece(name, held.values.detach()) for name, (_, held) in self._here()}

    def _optimizer_state(self) -> dict[str, State]:
        state = self._optimizer.state
        if self._stage == 0:
            return {name: state[parameter] for name, parameter in self._model.named_parameters()}
        return {
            name: {
                key: self._piece(name, tensor) if tensor.ndim else tensor for key, tensor in state[held.values].items()
            }
            for name, (_, held) in self._here()
        }

    def _imported(self) -> None:
        zero = self._engine.optimizer
        if self._stage in (1, 2):
            zero.update_lp_params()
        elif self._stage == 3:  # as its step() does
            zero._partition_all_parameters()  # small ones are kept whole, and not gathered again while they are
            for index in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(index)
            zero._post_step(set())

    def _sum_of_squares(self, own: Tensor) -> Tensor:
        return own if self._stage == 0 else super()._sum_of_squares(own)

    def _here(self) -> list[tuple[str, tuple[torch.Size, Stretch]]]:
        return [(name, entry) for name, entry in self._held.items() if entry[1].values.numel()]

    def _piece(self, name: str, values: Tensor) -> Piece:
        shape, held = self._held[name]
        return Piece(shape, held.start, values)


class _Autocasting(nn.Module):
    """A network in the precision of its recipe, whatever surrounds it."""

    def __init__(self, network: nn.Module, recipe: Recipe, device: torch.device) -> None:
        super().__init__()
        self.network, self._recipe, self._device = network, recipe, device

    def forward(self, images: Tensor) -> Any:
        with autocast(self._recipe, self._device):
            return self.network(images)


def _initialise(network: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], group: Group) -> Any:
    """DeepSpeed's engine, in the process group that there is."""
    deepspeed = _import_deepspeed(group.device)
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    # Its clone of the world group would wait half an hour for a lost rank, and outlive the group.
    deepspeed.utils.groups._WORLD_GROUP = group.gradients
    try:
        DeepSpeedConfig(config)
    except (DeepSpeedConfigError, ValueError, TypeError, AssertionError) as error:
        raise LonghaulError(f"engine.deepspeed: DeepSpeed refuses {_described(error)}.") from None
    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def _described(error: Exception) -> str:
    """What DeepSpeed objects to, in one line."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
    return " ".join(str(error).split()).rstrip(".")


def _import_deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed for a kind of device. It takes seconds, so that nothing but this engine imports it."""
    os.environ["DS_ACCELERATOR"] = device.type  # else it takes a GPU wherever it sees one
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # which Ray does not set
    import deepspeed
    from deepspeed.utils.logging import logger

    # An extension for CPUs, which it would compile for a minute at every start, and fail where there is no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if _worth_telling not in logger.filters:
        logger.addFilter(_worth_telling)
        # Its calls of functions that torch is about to rename.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


def _worth_telling(record: logging.LogRecord) -> bool:
    known = ("untested optimizer", "OVERFLOW! Skipping step")  # ours are tested here, and the guard counts
    return record.levelno >= logging.WARNING and not any(part in record.getMessage() for part in known)
