"""Whole weights on every rank, gradients summed by torch's DistributedDataParallel."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.checkpoints.state import State
from trainer.compiling import compiled
from trainer.engines.base import Engine
from trainer.engines.tree import TreeSum
from trainer.optim import build_optimizer
from trainer.predict import autocast, place


class DdpEngine(Engine):
    """Replicated weights. In `reproducible` mode DDP's own reduction, whose order depends on the number of ranks, gives
    way to a sum along a tree over the micro-batches, whose order does not."""

    def _prepare(self) -> torch.optim.Optimizer:
        recipe, group = self._recipe, self._group
        place(self._model, recipe, group.device)
        self._parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        optimizer = build_optimizer(recipe.optimizer, self._model, exact=recipe.deterministic)
        self._tree = TreeSum(self._parameters, recipe.batch.num_micro, group) if recipe.reproducible else None
        self._replicas = self._replicate() if group.world_size > 1 and self._tree is None else None
        self._network = compiled(self._replicas or self._model, recipe.compile, group.device)
        if self._replicas is not None and recipe.deterministic:
            self._settle_buckets()
        return optimizer

    def _forward(self, images: Tensor, last: bool) -> Any:
        if self._replicas is not None:
            self._replicas.require_backward_grad_sync = last  # as no_sync() does, which would have to span both passes
        if self._tree is not None:
            self._tree.begin()
        return self._network(images)

    def _backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()
        if self._tree is not None:
            self._tree.add(last)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def _step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _weights(self) -> State:
        return dict(self._model.named_parameters())

    def _optimizer_state(self) -> dict[str, State]:
        return {name: self._optimizer.state[parameter] for name, parameter in self._model.named_parameters()}

    @contextmanager
    def evaluating(self, ema: bool) -> Iterator[nn.Module]:
        self._statistics.track(True)
        yield (self._plain if ema and self._plain is not None else self._model).eval()

    def _copy_of_model(self) -> nn.Module | None:
        """The average is the only other network, and kept as one."""
        return None if self._recipe.ema is None else super()._copy_of_model()

    def _averaged(self) -> State:
        assert self._plain is not None
        return self._plain.state_dict()

    def _sum_of_squares(self, own: Tensor) -> Tensor:
        return own

    def _replicate(self) -> DistributedDataParallel:
        replicas = DistributedDataParallel(
            self._model,
            process_group=self._group.gradients,
            forward_sync_buffers=False,  # statistics are kept by rank 0 alone
            gradient_as_bucket_view=True,
        )
        replicas.register_comm_hook(self._group.gradients, _HOOKS[self._recipe.engine.reduce])
        return replicas

    def _settle_buckets(self) -> None:
        """DDP rebuilds its buckets after the first backward, and with them the order of summation. One throw-away
        pass makes a resumed run sum as the uninterrupted one did."""
        self._statistics.track(False)
        size = self._recipe.input.size
        images = torch.zeros(1, 3, size, size, device=self._group.device)
        images = images.expand(2, 3, size, size).contiguous(memory_format=torch.channels_last)
        for _ in range(2):
            with autocast(self._recipe, self._group.device):
                outputs = self._network(images if self._recipe.channels_last else images.contiguous())
            parts = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.stack([part.float().sum() for part in parts]).sum().backward()
        for parameter in self._parameters:
            parameter.grad = None


def _sum(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Add a bucket of gradients up over the ranks; DDP by itself would divide by their number."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def _sum_in_bf16(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The same with half the bytes on the wire (as torch's bf16_compress_hook, which divides)."""
    whole = bucket.buffer()
    work = dist.all_reduce(whole.bfloat16(), group=group, async_op=True)
    return work.get_future().then(lambda done: whole.copy_(done.value()[0]))


_HOOKS = {"fp32": _sum, "bf16": _sum_in_bf16}
