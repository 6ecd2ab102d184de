"""Whole tensors out of the pieces that the ranks hold."""

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.checkpoints.state import Piece, State, values
from trainer.group import Group


class Gatherer:
    """Puts pieces together on every rank. Where they lie is asked for once: it does not change."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._places: list[list[tuple[str, int, int]]] | None = None

    @torch.no_grad()
    def fill(self, whole: dict[str, Tensor], parts: State) -> None:
        """Copy the values of `parts` into the tensors of the same names, of any memory format. Called by all ranks
        together, with parts that are spread alike every time."""
        pieces = {name: part for name, part in parts.items() if isinstance(part, Piece)}
        for name, part in parts.items():
            if name not in pieces:
                whole[name].copy_(values(part))
        for name, flat in self._assembled(pieces, whole).items():
            whole[name].copy_(flat.view(whole[name].shape))

    def _assembled(self, pieces: dict[str, Piece], whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """The row-major form of every tensor that any rank holds a piece of."""
        if self._places is None:
            own = [(name, piece.start, piece.values.numel()) for name, piece in pieces.items()]
            self._places = self._group.gather(own)
        names = dict.fromkeys(name for places in self._places for name, _, _ in places)
        device = self._group.device
        flat = {name: torch.empty(whole[name].numel(), device=device) for name in names}
        for rank, places in enumerate(self._places):
            if not places:
                continue
            if rank == self._group.rank:
                buffer = torch.cat([pieces[name].values for name, _, _ in places])
            else:
                buffer = torch.empty(sum(count for _, _, count in places), device=device)
            if self._group.world_size > 1:
                dist.broadcast(buffer, src=rank, group=self._group.gradients)
            for (name, start, count), part in zip(places, buffer.split([c for _, _, c in places]), strict=True):
                flat[name][start : start + count] = part
        return flat


def cloned(parts: State) -> State:
    """The same with memory of its own."""
    return {
        name: Piece(part.shape, part.start, part.values.clone())
        if isinstance(part, Piece)
        else part.detach().clone(memory_format=torch.preserve_format)
        for name, part in parts.items()
    }
