"""Which classes are taken for which: exact counts over held-out images."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from data_pipeline.split import Split
from trainer.analysis.plot import document, text
from trainer.analysis.tables import csv_text
from trainer.predict import Predictor
from trainer.trained import Trained

MOST_DRAWN = 100


@dataclass(frozen=True)
class Confusion:
    """`counts`, int64 [classes, classes]: of the images of a class (row) those taken for a class (column)."""

    classes: list[str]
    counts: NDArray[np.int64]

    @property
    def num_images(self) -> int:
        return int(self.counts.sum())

    @property
    def top1(self) -> float:
        """The share of images whose class was found."""
        return int(np.trace(self.counts)) / self.num_images

    def pairs(self, most: int) -> list[tuple[int, int, int]]:
        """(class, taken for, images) of the most frequent mistakes; of equals the first classes first."""
        mistakes = self.counts.copy()
        np.fill_diagonal(mistakes, 0)
        order = np.argsort(-mistakes, axis=None, kind="stable")[:most].tolist()
        found = [(*divmod(place, len(self.classes)), int(mistakes.flat[place])) for place in order]
        return [pair for pair in found if pair[2]]

    def named_pairs(self, most: int) -> list[tuple[str, str, int, float]]:
        """As `pairs`, with the names of classes, and the share of the class's images."""
        totals = self.counts.sum(axis=1)
        return [
            (self.classes[row], self.classes[column], count, count / int(totals[row]))
            for row, column, count in self.pairs(most)
        ]


def count_confusion(trained: Trained, split: Split) -> Confusion:
    """Every image of `split` once, in central view, batched and in the precision of an evaluation (`longhaul eval`),
    whose top-1 it has."""
    classes = trained.classes(split)
    counts = np.zeros((len(classes), len(classes)), np.int64)
    predict = Predictor(trained.network, trained.recipe, trained.device)
    for batch in trained.batches(split, np.arange(len(split), dtype=np.int64)):
        logits = predict(batch.images)
        # As in an evaluation: of equal scores, which bf16 has now and then, argmax may take another.
        found = logits.topk(min(5, logits.shape[1]), dim=1).indices[:, 0]
        np.add.at(counts, (batch.labels.cpu().numpy(), found.cpu().numpy()), 1)
    return Confusion(classes, counts)


def confusion_csv(confusion: Confusion) -> str:
    """A row for each class of images, a column for each class that they were taken for."""
    rows = ([name, *row] for name, row in zip(confusion.classes, confusion.counts.tolist(), strict=True))
    return csv_text(("class", *confusion.classes), rows)


def class_rows(confusion: Confusion) -> list[tuple[str, int, int, float | None]]:
    """(class, images, those recognised, their share) by class; the share is None where a class has no image."""
    images, right = confusion.counts.sum(axis=1).tolist(), np.diag(confusion.counts).tolist()
    return [
        (name, total, correct, correct / total if total else None)
        for name, total, correct in zip(confusion.classes, images, right, strict=True)
    ]


def classes_csv(confusion: Confusion) -> str:
    """A row for each class: class, images, correct, accuracy (a share, empty where the class has no image)."""
    return csv_text(("class", "images", "correct", "accuracy"), class_rows(confusion))


def draw_confusion(confusion: Confusion) -> str:
    """A heat map, SVG: the darker, the greater the share of a row's images. For at most `MOST_DRAWN` classes."""
    names, size = _short(confusion.classes), len(confusion.classes)
    cell = max(7.0, min(44.0, 640 / size))
    font = min(13.0, cell * 0.85)
    margin = 24 + font * 0.62 * max(len(name) for name in names)
    totals = np.maximum(confusion.counts.sum(axis=1), 1)
    body = [f'<g font-size="{font:.1f}">']
    for index, name in enumerate(names):
        at = margin + (index + 0.5) * cell + font * 0.35
        body.append(text(margin - 5, at, name, "end"))
        body.append(text(0, 0, name, "start", f' transform="translate({at:.1f} {margin - 5:.1f}) rotate(-90)"'))
    for row, column in np.argwhere(confusion.counts).tolist():
        count, share = int(confusion.counts[row, column]), confusion.counts[row, column] / totals[row]
        x, y = margin + column * cell, margin + row * cell
        title = f"{confusion.classes[row]} taken for {confusion.classes[column]}: {count} of {totals[row]}"
        body.append(_cell(x, y, cell, float(share), title))
        if cell >= 26:
            ink = ' fill="#fff"' if share > 0.5 else ""
            body.append(text(x + cell / 2, y + cell / 2 + font * 0.35, f"{count}", "middle", ink))
    side = size * cell
    body.append(
        f'<rect x="{margin:.1f}" y="{margin:.1f}" width="{side:.1f}" height="{side:.1f}" fill="none" stroke="#888"/>'
        "</g>"
    )
    words = "rows: the class of the images; columns: what they were taken for"
    body.append(text(margin + side, margin + side + 18, words, "end"))
    return document(margin + side + 12, margin + side + 26, body, f"Confusion of classes, {words}")


def _cell(x: float, y: float, side: float, share: float, title: str) -> str:
    # From almost white to the first colour of the plots; what is rare stays visible.
    strength = 0.06 + 0.94 * share
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}" fill="#0072b2" '
        f'fill-opacity="{strength:.3f}"><title>{escape(title)}</title></rect>'
    )


def _short(names: Sequence[str], most: int = 22) -> list[str]:
    return [name if len(name) <= most else f"{name[: most - 1]}\N{HORIZONTAL ELLIPSIS}" for name in names]
