"""Evaluation of the held-out split: exact integer counts, every image once, on any number of workers.

Losses are kept batch by batch until all ranks' stand together, and the sum is then rounded once, so that it too has the
same bits on any number of workers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from configs import LonghaulError
from configs.schema import Recipe
from data_pipeline.loader import Batch, evaluation_batches
from data_pipeline.split import Split
from data_pipeline.views import Views, batches_of, central_view
from trainer.group import Group
from trainer.ledger import sample_hashes
from trainer.predict import Predict

Observe = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Told of every batch on the rank that has it: sample ids, int64 [n], on the CPU; and on the device their scores
[n, classes] (see `average_views`) and labels, int64 [n]."""


@dataclass(frozen=True)
class Score:
    """Counts over the whole split: images, and those whose label is the first, or among the first five, of the
    scores; and the sum of the cross-entropy losses."""

    num_images: int
    num_top1: int
    num_top5: int
    loss_sum: float

    def as_dict(self) -> dict[str, float | int]:
        """Shares in [0, 1] and the mean loss, for people and files."""
        return {
            "top1": self.num_top1 / self.num_images,
            "top5": self.num_top5 / self.num_images,
            "loss": self.loss_sum / self.num_images,
            "num_images": self.num_images,
        }


@dataclass(frozen=True)
class Member:
    """A network of an ensemble, and how it is shown the images."""

    predict: Predict
    views: Views


def evaluate(
    predict: Predict,
    split: Split,
    recipe: Recipe,
    group: Group,
    threads: int,
    views: Views | None = None,
    observe: Observe | None = None,
) -> Score:
    """Score a network on `split`; called by all ranks together, with the same weights on each.

    With several `views` of each image (None: the central crop) the probabilities, averaged over them, are its scores.
    """
    member = Member(predict, views or central_view(recipe.input))
    return evaluate_ensemble([member], split, recipe.evaluate.batch, group, threads, observe)[-1]


def evaluate_ensemble(
    members: Sequence[Member],
    split: Split,
    batch_size: int,
    group: Group,
    threads: int,
    observe: Observe | None = None,
) -> list[Score]:
    """The score of each member and, where there are several, last that of their ensemble, whose probabilities are the
    mean of the members'.

    Members that are shown the same pixels share them; for the others there are input pipelines side by side, each with
    the same images at the same time, so that no scores are kept. `observe` is told the ensemble's. Called by all ranks
    together.
    """
    seen = list(dict.fromkeys(member.views for member in members))
    batches = batches_of(seen, split.sizes, batch_size)
    own = range(group.rank, len(batches), group.world_size)
    loaders = [
        evaluation_batches(split, views.config, [batches[i] for i in own], group.device, threads, views)
        for views in seen
    ]
    tally = _Tally(len(members) + (len(members) > 1), len(batches), group.device)
    for place, shown in zip(own, zip(*loaders, strict=True), strict=True):
        ids, labels = shown[0].records[:, 0], shown[0].labels
        if any(not np.array_equal(ids, batch.records[:, 0]) for batch in shown):
            raise LonghaulError("Networks of an ensemble were shown different images: this is a defect.")
        batch_of = dict(zip(seen, shown, strict=True))
        scores = [average_views(member.predict, batch_of[member.views], member.views.mirrored) for member in members]
        if len(members) > 1:
            scores.append(log_mean(scores))
        tally.add(place, ids, scores, labels)
        if observe is not None:
            observe(torch.from_numpy(ids), scores[-1], labels)
    return tally.sum(group, len(split))


def average_views(predict: Predict, batch: Batch, mirrored: bool) -> torch.Tensor:
    """Scores [n, classes] whose softmax is the mean of the probabilities of all views: of a single one its logits,
    float32; of several the logarithm of the mean, float64."""
    logits = []
    for view in (batch.images, *batch.others):
        logits += [predict(view)] + ([predict(view.flip(3))] if mirrored else [])
    return logits[0] if len(logits) == 1 else log_mean(logits)


def log_mean(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """The logarithm of the mean of the probabilities of several logits [n, classes], float64.

    The softmax is averaged as in Krizhevsky et al. 2012 (4.1) and Simonyan & Zisserman 2014 (3.2). He et al. 2015 (3.4)
    "average the scores"; that these are the softmax's stands in the README of KaimingHe/deep-residual-networks.
    """
    return torch.stack([each.double().log_softmax(1) for each in logits]).logsumexp(0) - math.log(len(logits))


class _Tally:
    """Counts of one rank; only the sum over all ranks waits for the device."""

    def __init__(self, num_scores: int, num_batches: int, device: torch.device) -> None:
        self._hits = torch.zeros(num_scores, 2, dtype=torch.int64, device=device)
        self._losses = torch.zeros(num_scores, num_batches, dtype=torch.float64, device=device)
        self._ids = [np.empty(0, np.int64)]

    def add(self, place: int, ids: NDArray[np.int64], scores: Sequence[torch.Tensor], labels: torch.Tensor) -> None:
        """Count batch number `place`."""
        self._ids.append(ids)
        for row, logits in enumerate(scores):
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            self._hits[row] += torch.stack([hits[:, 0].sum(), hits.any(1).sum()])
            self._losses[row, place] = cross_entropy(logits, labels, reduction="sum")

    def sum(self, group: Group, num_images: int) -> list[Score]:
        """The scores over all ranks; every one of `num_images` must have been counted once."""
        images = torch.tensor(_count_and_hash(np.concatenate(self._ids)), device=group.device)
        for tensor in (images, self._hits, self._losses):
            dist.all_reduce(tensor, group=group.gradients)
        counted = int(images[0])
        if images.tolist() != _count_and_hash(np.arange(num_images)):
            raise LonghaulError(f"Evaluation saw {counted} of {num_images} images, or one twice: this is a defect.")
        rows = zip(self._hits.tolist(), self._losses.tolist(), strict=True)
        return [Score(counted, top1, top5, math.fsum(losses)) for (top1, top5), losses in rows]


def _count_and_hash(ids: NDArray[np.int64]) -> list[int]:
    """The number of samples and the sum modulo 2**64 of a hash of each: added up over the ranks, equal to those of
    all samples only if each was there once (but for a chance of 2**-64)."""
    hashes = sample_hashes(np.zeros_like(ids), ids)
    return [len(ids), int(hashes.sum(dtype=np.uint64).view(np.int64))]
