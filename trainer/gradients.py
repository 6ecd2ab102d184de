"""Between backward and update: the gradient's norm, clipping, loss scaling, and the guard against what is not finite.

Nothing here waits for the device: the verdict on a gradient stays there as a tensor, which the optimizer reads (as with
`torch.amp.GradScaler`). How often it was bad is asked for when the loop gives an account.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.optimisation import Gradients, LossScale


@dataclass(frozen=True)
class Health:
    """What became of the updates so far.

    Attributes:
        gradient_norm: L2 norm of the last update's gradient, before clipping.
        num_skipped: updates skipped since the start of the run.
        failing_since: the first of `Gradients.max_skipped` skipped updates in a row (counted from 0), or None.
        loss_scale: what the loss is multiplied by at present.
    """

    gradient_norm: float
    num_skipped: int
    failing_since: int | None
    loss_scale: float


class Guard:
    """Counts the updates whose gradient is not finite. Its counters, int64 [], are part of a checkpoint."""

    def __init__(self, config: Gradients, device: torch.device) -> None:
        self._most = config.max_skipped
        zero = torch.zeros((), dtype=torch.int64, device=device)
        self.state = {"skipped": zero, "streak": zero.clone(), "failing_since": zero - 1}

    def judge(self, norm: Tensor, step: int) -> Tensor:
        """1.0 where the update of `step` (from 0) is to be skipped, else 0.0: float32 [] on the device.

        Args:
            norm: float32 [], of the whole gradient; finite exactly when all of it is (but for an overflow of the sum of
                squares, which is no gradient to follow either).
        """
        bad = ~norm.isfinite()
        skipped, streak, since = self.state["skipped"], self.state["streak"], self.state["failing_since"]
        skipped += bad
        streak.copy_((streak + 1) * bad)
        since.copy_(torch.where((streak >= self._most) & (since < 0), step + 1 - self._most, since))
        return bad.float()


class LossScaler:
    """Dynamic loss scaling (Micikevicius et al. 2017), by the rule of `torch.amp.GradScaler`; 1 for ever where `config`
    is None. `state` is part of a checkpoint: the scale, float32 [], and how many good updates it has seen, int64 []."""

    def __init__(self, config: LossScale | None, device: torch.device) -> None:
        self._config = config
        self.state: dict[str, Tensor] = {}
        if config is not None:
            self.state["scale"] = torch.tensor(config.initial, dtype=torch.float32, device=device)
            self.state["growth_tracker"] = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def scale(self) -> Tensor | None:
        """What the loss is to be multiplied by; None for one."""
        return self.state.get("scale")

    def adjust(self, found_inf: Tensor) -> None:
        """Halve the scale after a gradient that is not finite; double it after enough good ones in a row."""
        if self._config is None:
            return
        scale, tracker = self.state["scale"], self.state["growth_tracker"]
        good = (tracker + 1) * (found_inf == 0)
        grown = good >= self._config.growth_steps
        doubled = torch.where(grown & (scale * 2).isfinite(), scale * 2, scale)
        scale.copy_(torch.where(found_inf > 0, scale * 0.5, doubled))
        tracker.copy_(good * ~grown)


@torch.no_grad()
def finish(
    gradients: list[Tensor],
    scale: Tensor | None,
    clip_norm: float | None,
    sum_of_squares: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Take the loss scale out of the gradients and clip them, in place (Pascanu et al. 2012, as
    `torch.nn.utils.clip_grad_norm_`). Returns the L2 norm that the whole gradient had, unscaled: float32 [].

    `sum_of_squares` turns the squared norm of what is here into that of the whole gradient, where it is spread."""
    norm = torch.nn.utils.get_total_norm(gradients)
    if sum_of_squares is not None:
        norm = sum_of_squares(norm.square()).sqrt()
    if scale is not None:
        norm = norm / scale
    factor = None if scale is None else 1.0 / scale
    if clip_norm is not None:
        clipped = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
        factor = clipped if factor is None else factor * clipped
    if factor is not None:
        torch._foreach_mul_(gradients, factor)
    return norm
