"""Replicated weights, gradients averaged by torch's DistributedDataParallel."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from configs.schema import Recipe
from trainer.averaging import Average
from trainer.compiling import compiled
from trainer.gradients import Guard, Health, LossScaler, finish
from trainer.group import Group
from trainer.losses import build_loss, main_logits
from trainer.models import build_model
from trainer.optim import build_optimizer
from trainer.predict import autocast
from trainer.statistics import Statistics


class DdpEngine:
    """See `trainer.engines.base.Engine`."""

    def __init__(self, recipe: Recipe, num_samples: int, num_classes: int, group: Group) -> None:
        self._recipe, self._group = recipe, group
        self._model: nn.Module = build_model(recipe.model, num_classes, recipe.seed).to(group.device)
        if recipe.channels_last:
            self._model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._parameters = list(self._model.parameters())
        self._optimizer = build_optimizer(recipe.optimizer, self._model)
        self._statistics = Statistics(self._model)
        self._average = None if recipe.ema is None else Average(recipe, num_samples, self._model)
        self._guard = Guard(recipe.gradients, group.device)
        self._scaler = LossScaler(recipe.loss_scale if recipe.precision == "fp16" else None, group.device)
        self._norm = torch.zeros((), device=group.device)
        # A micro-batch's loss is a mean over its samples; the sum of all, so weighted, is the mean over the batch
        # however unevenly micro-batches are dealt. That nothing in it depends on the number of workers matters to
        # fp16, whose range ends at 65504.
        self._weight = 1.0 / recipe.batch.num_micro
        self._criterion = build_loss(recipe.loss)
        self._replicas = self._replicate() if group.world_size > 1 else None
        self._network = compiled(self._replicas or self._model, recipe.compile, group.device)
        if self._replicas is not None and recipe.deterministic:
            self._settle_buckets()

    def forward_backward(
        self, images: torch.Tensor, labels: torch.Tensor, seed: int, first: bool, last: bool
    ) -> torch.Tensor:
        self._model.train()
        torch.manual_seed(seed)
        self._statistics.track(first)
        if first:
            self._statistics.keep()
        with self._reduced(last):
            with self._autocast():
                outputs = self._network(self._laid_out(images))
            loss = self._criterion(outputs, labels)
            weighted = loss * self._weight
            (weighted if self._scaler.scale is None else weighted * self._scaler.scale).backward()
        with torch.no_grad():
            classes = labels if labels.ndim == 1 else labels.argmax(1)
            correct = (main_logits(outputs).argmax(1) == classes).sum()
            return torch.stack([loss.detach().double(), correct.double()])

    @torch.no_grad()
    def update(self, step: int, learning_rate: float) -> None:
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        self._norm = finish(gradients, self._scaler.scale, self._recipe.gradients.clip_norm)
        found_inf = self._guard.judge(self._norm, step)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # as torch.amp.GradScaler does
        self._optimizer.step()
        del self._optimizer.found_inf  # type: ignore[attr-defined]
        self._optimizer.zero_grad()
        self._statistics.put_back(found_inf > 0)
        self._scaler.adjust(found_inf)
        if self._average is not None:
            self._average.follow(step + 1)

    def health(self) -> Health:
        counts = {name: int(tensor) for name, tensor in self._guard.state.items()}
        since, scale = counts["failing_since"], self._scaler.scale
        return Health(
            gradient_norm=float(self._norm),
            num_skipped=counts["skipped"],
            failing_since=None if since < 0 else since,
            loss_scale=1.0 if scale is None else float(scale),
        )

    @contextmanager
    def evaluating(self, ema: bool) -> Iterator[nn.Module]:
        average = self._average if ema else None
        network, statistics = (
            (self._model, self._statistics) if average is None else (average.network, average.statistics)
        )
        statistics.track(True)
        yield network.eval()

    def synchronise_buffers(self) -> None:
        if self._group.world_size > 1:
            self._statistics.broadcast(self._group.gradients)
            if self._average is not None:
                self._average.statistics.broadcast(self._group.gradients)

    def export_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {f"model.{name}": tensor for name, tensor in self._model.state_dict().items()}
        for name, parameter in self._model.named_parameters():
            for key, tensor in self._optimizer.state[parameter].items():
                state[f"optim.state.{name}.{key}"] = tensor
        if self._average is not None:
            state |= {f"ema.{name}": tensor for name, tensor in self._average.network.state_dict().items()}
        state |= {f"guard.{name}": tensor for name, tensor in self._guard.state.items()}
        return state | {f"loss_scale.{name}": tensor for name, tensor in self._scaler.state.items()}

    @torch.no_grad()
    def import_state(self, state: dict[str, Any]) -> None:
        # Copied into the tensors that are there, which keeps their memory format.
        for key, tensor in self.export_state().items():
            tensor.copy_(state[key])

    def _autocast(self) -> torch.autocast:
        return autocast(self._recipe, self._group.device)

    def _laid_out(self, images: torch.Tensor) -> torch.Tensor:
        return images if self._recipe.channels_last else images.contiguous()

    def _reduced(self, last: bool) -> Any:
        """Gradients are summed over the ranks in the last backward pass only."""
        return nullcontext() if self._replicas is None or last else self._replicas.no_sync()

    def _replicate(self) -> DistributedDataParallel:
        replicas = DistributedDataParallel(
            self._model,
            process_group=self._group.gradients,
            forward_sync_buffers=False,  # statistics are kept by rank 0 alone
            gradient_as_bucket_view=True,
        )
        replicas.register_comm_hook(self._group.gradients, _sum)
        return replicas

    def _settle_buckets(self) -> None:
        """DDP rebuilds its buckets after the first backward, and with them the order of summation. One throw-away
        pass makes a resumed run sum as the uninterrupted one did."""
        self._statistics.track(False)
        size = self._recipe.input.size
        images = torch.zeros(1, 3, size, size, device=self._group.device)
        images = images.expand(2, 3, size, size).contiguous(memory_format=torch.channels_last)
        for _ in range(2):
            with self._autocast():
                outputs = self._network(self._laid_out(images))
            parts = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.stack([part.float().sum() for part in parts]).sum().backward()
        self._optimizer.zero_grad()


def _sum(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Add a bucket of gradients up over the ranks; DDP by itself would divide by their number."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])
