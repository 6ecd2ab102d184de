"""Evaluation of the held-out split: exact integer counts, every image once, on any number of workers."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from configs import LonghaulError
from configs.schema import Recipe
from data_pipeline.loader import Batch, evaluation_batches
from data_pipeline.split import Split
from data_pipeline.views import Views, central_view
from trainer.engines import Engine
from trainer.group import Group
from trainer.ledger import sample_hashes


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


def evaluate(
    engine: Engine, split: Split, recipe: Recipe, group: Group, threads: int, views: Views | None = None
) -> Score:
    """Score the network on `split`; called by all ranks together, after `engine.synchronise_buffers`.

    With several `views` of each image (None: the central crop) the probabilities, averaged over them, are its scores.
    """
    views = views or central_view(recipe.input)
    ids = np.arange(len(split), dtype=np.int64)
    batches = views.batches(split.sizes, ids, recipe.evaluate.batch)[group.rank :: group.world_size]
    counts = torch.zeros(4, dtype=torch.int64, device=group.device)
    loss = torch.zeros(1, dtype=torch.float64, device=group.device)
    for batch in evaluation_batches(split, recipe.input, batches, group.device, threads, views):
        logits = predict_views(engine, batch, views.mirrored)
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = ranked == batch.labels[:, None]
        seen = int(sample_hashes(np.zeros(len(batch.records), np.int64), batch.records[:, 0]).sum().view(np.int64))
        counts += torch.stack(
            [
                torch.tensor(len(batch.labels), device=group.device),
                hits[:, 0].sum(),
                hits.any(1).sum(),
                torch.tensor(seen, device=group.device),
            ]
        )
        loss += cross_entropy(logits, batch.labels, reduction="sum")
    dist.all_reduce(counts, group=group.gradients)
    dist.all_reduce(loss, group=group.gradients)
    num_images, top1, top5, seen_sum = counts.tolist()
    expected = int(sample_hashes(np.zeros_like(ids), ids).sum().view(np.int64))
    if num_images != len(split) or seen_sum != expected:
        raise LonghaulError(f"Evaluation saw {num_images} of {len(split)} images, or one twice: this is a defect.")
    return Score(num_images, top1, top5, float(loss))


def predict_views(engine: Engine, batch: Batch, mirrored: bool) -> torch.Tensor:
    """Scores [n, classes] whose softmax is the mean of the probabilities of all views: of a single one its logits,
    float32; of several the logarithm of the mean, float64.

    The softmax is averaged as in Krizhevsky et al. 2012 (4.1) and Simonyan & Zisserman 2014 (3.2); He et al. 2015 (3.4)
    write "average the scores" without saying which.
    """
    logits = []
    for view in (batch.images, *batch.others):
        logits += [engine.predict(view)] + ([engine.predict(view.flip(3))] if mirrored else [])
    if len(logits) == 1:
        return logits[0]
    return torch.stack([each.double().log_softmax(1) for each in logits]).logsumexp(0) - math.log(len(logits))
