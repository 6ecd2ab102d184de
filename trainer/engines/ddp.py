"""Replicated weights, gradients averaged by torch's DistributedDataParallel."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from configs.schema import Recipe
from trainer.group import Group
from trainer.losses import build_loss, main_logits
from trainer.models import build_model
from trainer.optim import build_optimizer


class DdpEngine:
    """See `trainer.engines.base.Engine`."""

    def __init__(self, recipe: Recipe, num_classes: int, group: Group) -> None:
        self._recipe, self._group = recipe, group
        self._model: nn.Module = build_model(recipe.model, num_classes, recipe.seed).to(group.device)
        if recipe.channels_last:
            self._model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._optimizer = build_optimizer(recipe.optimizer, self._model)
        self._norms = [m for m in self._model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        # A micro-batch's loss is a mean over its samples. DDP divides by the number of ranks, so that this weight
        # makes the reduced gradient the mean over the whole batch however unevenly micro-batches are dealt.
        self._weight = group.world_size / recipe.batch.num_micro
        self._criterion = build_loss(recipe.loss)
        self._network = self._wrap() if group.world_size > 1 else self._model

    def forward_backward(
        self, images: torch.Tensor, labels: torch.Tensor, seed: int, first: bool, last: bool
    ) -> torch.Tensor:
        self._model.train()
        torch.manual_seed(seed)
        for norm in self._norms:
            norm.track_running_stats = first
        network = self._network
        reduce_later = network.no_sync() if isinstance(network, DistributedDataParallel) and not last else nullcontext()
        with reduce_later:
            with self._autocast():
                outputs = network(self._laid_out(images))
            loss = self._criterion(outputs, labels)
            (loss * self._weight).backward()
        with torch.no_grad():
            classes = labels if labels.ndim == 1 else labels.argmax(1)
            correct = (main_logits(outputs).argmax(1) == classes).sum()
            return torch.stack([loss.detach().double(), correct.double()])

    def update(self, learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()

    @torch.no_grad()
    def predict(self, images: torch.Tensor) -> torch.Tensor:
        self._model.eval()
        for norm in self._norms:
            norm.track_running_stats = True
        with self._autocast():
            return self._model(self._laid_out(images)).float()

    def synchronise_buffers(self) -> None:
        if self._group.world_size > 1:
            for buffer in self._model.buffers():
                dist.broadcast(buffer, src=0, group=self._group.gradients)

    def export_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {f"model.{name}": tensor for name, tensor in self._model.state_dict().items()}
        for name, parameter in self._model.named_parameters():
            for key, tensor in self._optimizer.state[parameter].items():
                state[f"optim.state.{name}.{key}"] = tensor
        return state

    @torch.no_grad()
    def import_state(self, state: dict[str, Any]) -> None:
        # Copied into the tensors that are there, which keeps their memory format.
        for key, tensor in self.export_state().items():
            tensor.copy_(state[key])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._group.device.type, dtype=torch.bfloat16, enabled=self._recipe.precision == "bf16")

    def _laid_out(self, images: torch.Tensor) -> torch.Tensor:
        return images if self._recipe.channels_last else images.contiguous()

    def _wrap(self) -> DistributedDataParallel:
        network = DistributedDataParallel(
            self._model,
            process_group=self._group.gradients,
            forward_sync_buffers=False,  # statistics are kept by rank 0 alone
            gradient_as_bucket_view=True,
        )
        if self._recipe.deterministic:
            self._settle_buckets(network)
        return network

    def _settle_buckets(self, network: DistributedDataParallel) -> None:
        """DDP rebuilds its buckets after the first backward, and with them the order of summation. One throw-away
        pass makes a resumed run sum as the uninterrupted one did."""
        for norm in self._norms:
            norm.track_running_stats = False
        size = self._recipe.input.size
        images = torch.zeros(1, 3, size, size, device=self._group.device)
        images = images.expand(2, 3, size, size).contiguous(memory_format=torch.channels_last)
        for _ in range(2):
            with self._autocast():
                logits = network(self._laid_out(images))
            logits.float().sum().backward()
        self._optimizer.zero_grad()
