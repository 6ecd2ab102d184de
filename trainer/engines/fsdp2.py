"""Sharded weights, gradients and optimizer state: torch's FSDP2 (`fully_shard`)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from trainer.checkpoints.state import Piece, State
from trainer.engines.base import Engine
from trainer.optim import build_optimizer


class FsdpEngine(Engine):
    """Every rank holds rows of each parameter. The optimizer steps them as plain tensors that share FSDP's memory, so
    that all of ours run unchanged, in torch's fused kernels."""

    collective_passes = True  # each gathers the weights that it needs

    def _prepare(self) -> torch.optim.Optimizer:
        recipe, group = self._recipe, self._group
        mesh = init_device_mesh(group.device.type, (group.world_size,))
        reduce_dtype = torch.bfloat16 if recipe.engine.reduce == "bf16" else torch.float32
        policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False)
        for block in _blocks(self._model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        self._sharded: FSDPModule = fully_shard(self._model, mesh=mesh, mp_policy=policy)
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # the sum, not the mean
                module.set_force_sum_reduction_for_comms(True)
        named = dict(self._model.named_parameters())
        self._held: dict[str, tuple[DTensor, nn.Parameter]] = {}
        for name, parameter in named.items():
            assert isinstance(parameter, DTensor)
            self._held[name] = parameter, nn.Parameter(parameter.to_local().detach(), parameter.requires_grad)
        held = {id(sharded): own for sharded, own in self._held.values()}
        return build_optimizer(recipe.optimizer, self._model, lambda p: held[id(p)], self._norms, recipe.deterministic)

    def _forward(self, images: Tensor, last: bool) -> Any:
        self._sharded.set_requires_gradient_sync(last)
        return self._model(images)

    def _backward(self, loss: Tensor, last: bool) -> None:
        del last
        loss.backward()

    def _gradients(self) -> list[Tensor]:
        for sharded, own in self._held.values():
            if isinstance(sharded.grad, DTensor):
                own.grad = sharded.grad.to_local()
        return [own.grad for _, own in self._held.values() if own.grad is not None]

    def _step(self) -> None:
        self._optimizer.step()
        for sharded, own in self._held.values():
            sharded.grad = own.grad = None

    def _weights(self) -> State:
        return {name: self._piece(name, own.detach()) for name, (_, own) in self._held.items() if own.numel()}

    def _optimizer_state(self) -> dict[str, State]:
        return {
            name: {
                key: self._piece(name, tensor) if tensor.ndim else tensor
                for key, tensor in self._optimizer.state[own].items()
            }
            for name, (_, own) in self._held.items()
            if own.numel()
        }

    def _piece(self, name: str, values: Tensor) -> Piece:
        sharded, _ = self._held[name]
        _, offsets = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)
        below = sharded.numel() // sharded.shape[0]
        return Piece(sharded.shape, offsets[0] * below, values.view(-1))


def _blocks(model: nn.Module) -> list[nn.Module]:
    """What is gathered together: the children of the network's stages (residual blocks), where it has some."""
    stages = [child for child in model.children() if isinstance(child, nn.Sequential | nn.ModuleList)]
    blocks = [block for stage in stages for block in stage.children()]
    return [block for block in blocks if any(True for _ in block.parameters())]
