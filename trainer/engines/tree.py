"""The sum of all micro-batches' gradients in an order that does not depend on the number of ranks.

Floating-point addition is not associative: ((a + b) + c) + d, which one rank computes, is not (a + b) + (c + d), which
two compute. Here the micro-batches are the leaves of one fixed binary tree, and every node is the sum of its children,
whoever computes it. A rank adds up what lies wholly within its micro-batches; of what is left each rank adds up a
part of the elements, for which the others send it theirs, and gives all the result: as many bytes on the wire as a ring
all-reduce, where every rank's share is one node.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.dealing import deal
from trainer.group import Group

Node = tuple[int, int]
"""The micro-batches from the first to before the second."""


def middle(node: Node) -> int:
    """Where a node's two children meet: the left one is the largest complete tree that leaves something over."""
    first, end = node
    return first + (1 << (end - first - 1).bit_length() - 1)


def cover(root: Node, share: range) -> list[Node]:
    """The largest nodes under `root` that lie within a contiguous share of the leaves, from left to right."""
    first, end = root
    if share.start <= first and end <= share.stop:
        return [root]
    if share.stop <= first or end <= share.start:
        return []
    half = middle(root)
    return cover((first, half), share) + cover((half, end), share)


def combine(node: Node, parts: dict[Node, Tensor]) -> Tensor:
    """The sum at `node` from the sums at nodes that cover it, along the tree, in memory of the parts."""
    if node in parts:
        return parts[node]
    half = middle(node)
    return combine((node[0], half), parts).add_(combine((half, node[1]), parts))


class TreeSum:
    """Gradients of `parameters`, micro-batch by micro-batch, into their sum over all ranks.

    Takes as much memory as the gradients for each level of the tree within this rank's share (at most
    log2(micro-batches a rank) + 1), and twice for the exchange.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], num_micro: int, group: Group) -> None:
        self._parameters, self._group, self._root = parameters, group, (0, num_micro)
        shares = [deal(num_micro, group.world_size, rank) for rank in range(group.world_size)]
        self._covers = [cover(self._root, share) for share in shares]
        self._share = shares[group.rank]
        size = sum(parameter.numel() for parameter in parameters)
        self._chunk = -(-size // group.world_size)
        self._free: list[Tensor] = []
        self._sums: dict[Node, Tensor] = {}
        self._next = self._share.start
        self._current: Tensor | None = None

    def begin(self) -> None:
        """Before a micro-batch's forward pass: let its gradients be written side by side into one vector."""
        self._current = self._free.pop() if self._free else self._empty()
        self._current.zero_()
        self._give(self._current)

    def add(self, last: bool) -> None:
        """After a backward pass; with the `last` of a step the parameters' gradients become the sum of all."""
        assert self._current is not None
        node = (self._next, self._next + 1)
        self._sums[node] = self._current
        self._next += 1
        self._merge()
        if last:
            self._give(self._exchange())
            self._next = self._share.start

    def _merge(self) -> None:
        """Add up whatever two children are there."""
        for node in self._covers[self._group.rank]:
            self._merge_under(node)

    def _merge_under(self, node: Node) -> Tensor | None:
        """The sum at `node` as far as all its leaves are there."""
        if node in self._sums or node[1] - node[0] == 1:
            return self._sums.get(node)
        half = middle(node)
        left, right = self._merge_under((node[0], half)), self._merge_under((half, node[1]))
        if left is None or right is None:
            return None
        self._sums[node] = left.add_(right)
        del self._sums[node[0], half], self._sums[half, node[1]]
        self._free.append(right)
        return left

    @torch.no_grad()
    def _exchange(self) -> Tensor:
        """The sum at the root, from all ranks' nodes; this rank's vectors are free again."""
        own = [self._sums.pop(node) for node in self._covers[self._group.rank]]
        if self._group.world_size == 1:
            (total,) = own
            self._free.append(total)  # used until the next step begins
            return total
        sent = torch.stack([vector.view(self._group.world_size, self._chunk) for vector in own], dim=1).flatten()
        counts = [len(nodes) * self._chunk for nodes in self._covers]
        received = torch.empty(sum(counts), device=sent.device)
        dist.all_to_all_single(
            received, sent, counts, [len(own) * self._chunk] * self._group.world_size, group=self._group.gradients
        )
        nodes = [node for nodes in self._covers for node in nodes]
        part = combine(self._root, dict(zip(nodes, received.split(self._chunk), strict=True)))
        self._free += own
        total = own[0]
        dist.all_gather(list(total.split(self._chunk)), part, group=self._group.gradients)
        return total

    def _empty(self) -> Tensor:
        return torch.empty(self._chunk * self._group.world_size, device=self._group.device)

    def _give(self, vector: Tensor) -> None:
        """Let the parameters' gradients be views of a vector, in the parameters' own memory formats."""
        at = 0
        for parameter in self._parameters:
            parameter.grad = vector.as_strided(parameter.shape, parameter.stride(), at)
            at += parameter.numel()
