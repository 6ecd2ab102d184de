"""What every engine has in common. The loop knows an engine by the public methods here, and by no others."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.schema import Recipe
from trainer.averaging import Average
from trainer.checkpoints.state import State, copy_into
from trainer.dealing import deal
from trainer.engines.gathering import Gatherer, cloned
from trainer.gradients import Guard, Health, LossScaler, finish
from trainer.group import Group
from trainer.losses import build_loss, main_logits
from trainer.models import build_model
from trainer.predict import autocast, place
from trainer.statistics import Statistics


class Engine(ABC):
    """A model and its optimizer, spread over the workers in some way.

    Micro-batches, precision, the guard, averaging and what a state consists of are decided here, for all engines alike;
    a subclass decides where parameters live, and how gradients become their sum over the ranks.
    """

    collective_passes = False
    """Whether all ranks must take part in every pass, and not only in the last of a step."""

    def __init__(self, recipe: Recipe, num_samples: int, num_classes: int, group: Group) -> None:
        """`num_samples`: of the training split. Raises LonghaulError for what the engine or the machine cannot do."""
        self._recipe, self._group = recipe, group
        shares = [len(deal(recipe.batch.num_micro, group.world_size, rank)) for rank in range(group.world_size)]
        self._last = deal(recipe.batch.num_micro, group.world_size, group.rank)[-1]
        self._missing = max(shares) - shares[group.rank] if self.collective_passes else 0
        # A micro-batch's loss is a mean over its samples; the sum of all, so weighted, is the mean over the batch
        # however unevenly micro-batches are dealt. That nothing in it depends on the number of workers matters to
        # fp16, whose range ends at 65504.
        self._weight = 1.0 / recipe.batch.num_micro
        self._criterion = build_loss(recipe.loss)
        self._guard = Guard(recipe.gradients, group.device)
        self._scaler = LossScaler(recipe.loss_scale if recipe.precision == "fp16" else None, group.device)
        self._norm = torch.zeros((), device=group.device)
        self._model: nn.Module = build_model(recipe.model, num_classes, recipe.seed).to(group.device)
        self._plain = self._copy_of_model()
        self._statistics = Statistics(self._model)
        persistent = self._model.state_dict().keys()
        self._buffers = {name: buffer for name, buffer in self._model.named_buffers() if name in persistent}
        self._optimizer = self._prepare()
        self._gatherer = Gatherer(group)
        self._average = None if recipe.ema is None else Average(recipe, num_samples, self._averaged(), self._values())

    # What the loop calls

    def forward_backward(self, images: Tensor, labels: Tensor, seed: int, micro: int) -> Tensor:
        """Forward and backward of one micro-batch.

        Args:
            images: float32 [n, 3, height, width], channels-last.
            labels: int64 [n], or after mixing float32 [n, classes], each row a distribution.
            seed: for anything random in the network; a function of recipe, step and micro-batch.
            micro: its number in the step. Number 0's batch-norm statistics are kept; after a rank's last, gradients are
                summed over the ranks.

        Returns:
            float64 [2] on the device, detached: the mean loss, and the number of correct predictions (after
            mixing, of the likeliest class).
        """
        self._model.train()
        if micro == 0:
            self._statistics.keep()
        if micro == self._last:
            for _ in range(self._missing):  # to keep the ranks company that have one more
                self._pass(images, labels, seed, False, False, 0.0)
        return self._pass(images, labels, seed, micro == 0, micro == self._last, self._weight)

    @torch.no_grad()
    def update(self, step: int, learning_rate: float) -> None:
        """The optimizer step number `step` (from 0) with the mean gradient over the whole batch. Where that is not
        finite, weights, optimizer state and batch-norm statistics stay as they were."""
        self._norm = finish(
            self._gradients(), self._scaler.scale, self._recipe.gradients.clip_norm, self._sum_of_squares
        )
        found_inf = self._guard.judge(self._norm, step)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # as torch.amp.GradScaler does
        self._step()
        del self._optimizer.found_inf  # type: ignore[attr-defined]
        self._statistics.put_back(found_inf > 0)
        self._scaler.adjust(found_inf)
        if self._average is not None:
            self._average.follow(step + 1)

    def health(self) -> Health:
        """What became of the updates so far; waits for the device."""
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
        """The whole network, without an engine and in evaluation mode, its averaged weights where `ema`; after
        `synchronise_buffers`, by all ranks together. It is not to be changed."""
        values = self._average.state if ema and self._average is not None else self._values()
        assert self._plain is not None
        self._gatherer.fill(self._plain.state_dict(), values)
        yield self._plain.eval()

    def synchronise_buffers(self) -> None:
        """Give every rank the batch-norm statistics of rank 0, which alone keeps them; before saving or evaluating."""
        if self._group.world_size > 1:
            self._statistics.broadcast(self._group.gradients)
            if self._average is not None:
                self._average.broadcast(self._group.gradients)

    def export_state(self) -> State:
        """The canonical state, or this rank's part of it, sharing memory where it can: by `model.<fqn>`,
        `optim.state.<fqn>.<name>`, `ema.<fqn>`, `guard.<name>` and `loss_scale.<name>`."""
        state: State = {f"model.{name}": part for name, part in self._values().items()}
        for name, entries in self._optimizer_state().items():
            state |= {f"optim.state.{name}.{key}": part for key, part in entries.items()}
        if self._average is not None:
            state |= {f"ema.{name}": part for name, part in self._average.state.items()}
        state |= {f"guard.{name}": tensor for name, tensor in self._guard.state.items()}
        return state | {f"loss_scale.{name}": tensor for name, tensor in self._scaler.state.items()}

    @torch.no_grad()
    def import_state(self, state: State) -> None:
        """Take over a state of the form of `export_state`."""
        copy_into(self.export_state(), state)  # into the memory that is there, which keeps its format
        self._imported()

    # What a subclass decides

    @abstractmethod
    def _prepare(self) -> torch.optim.Optimizer:
        """Spread `self._model`, in place, and return the optimizer that steps what is held here of its parameters:
        tensors of float32. The batch-norm buffers stay the tensors that they are."""

    @abstractmethod
    def _forward(self, images: Tensor, last: bool) -> Any:
        """The outputs of the network in training mode; `last`: as for the backward pass that follows."""

    @abstractmethod
    def _backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a weighted loss to what there is of this step; after the `last`, the sum over all ranks
        is there, not their mean."""

    @abstractmethod
    def _gradients(self) -> list[Tensor]:
        """The gradients that `_step` will use, float32, to be changed in place."""

    @abstractmethod
    def _step(self) -> None:
        """Step the optimizer, make every copy of a parameter the new one, and drop the gradients."""

    @abstractmethod
    def _weights(self) -> State:
        """What is held here of each parameter, by name, sharing memory; one of which that is nothing is absent."""

    @abstractmethod
    def _optimizer_state(self) -> dict[str, State]:
        """For each name of `_weights` what the optimizer keeps for it, likewise."""

    def _imported(self) -> None:  # noqa: B027  # most have nothing to do
        """Bring what is derived from `_weights` in line with them."""

    # Where a subclass with whole weights on every rank does with less

    def _copy_of_model(self) -> nn.Module | None:
        """A network to put whole weights into, made before the model is spread."""
        network = copy.deepcopy(self._model).requires_grad_(False)
        return place(network, self._recipe, self._group.device)

    def _averaged(self) -> State:
        """What the moving average is kept in."""
        return cloned(self._values())

    def _sum_of_squares(self, own: Tensor) -> Tensor:
        """The squared norm of the whole gradient from that of what `_gradients` gave here."""
        dist.all_reduce(own, group=self._group.gradients)
        return own

    # For all of them

    def _norms(self, tensors: list[Tensor]) -> Tensor:
        """The L2 norm of each parameter, or what is like it, of which a part is held here."""
        squares = torch.stack(torch._foreach_norm(tensors)).square()
        dist.all_reduce(squares, group=self._group.gradients)
        return squares.sqrt()

    def _values(self) -> State:
        """Parameters and buffers, by name, as in the network's state_dict."""
        return {**self._weights(), **self._buffers}

    def _pass(self, images: Tensor, labels: Tensor, seed: int, tracked: bool, last: bool, weight: float) -> Tensor:
        torch.manual_seed(seed)
        self._statistics.track(tracked)
        with autocast(self._recipe, self._group.device):
            outputs = self._forward(images if self._recipe.channels_last else images.contiguous(), last)
        loss = self._criterion(outputs, labels)
        weighted = loss * weight
        self._backward(weighted if self._scaler.scale is None else weighted * self._scaler.scale, last)
        with torch.no_grad():
            classes = labels if labels.ndim == 1 else labels.argmax(1)
            correct = (main_logits(outputs).argmax(1) == classes).sum()
            return torch.stack([loss.detach().double(), correct.double()])
