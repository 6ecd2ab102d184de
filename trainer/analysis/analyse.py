"""`longhaul analyse`: everything about some runs, as pictures, tables and one page."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from configs import LonghaulError
from data_pipeline.split import Split
from trainer.analysis.confusion import (
    MOST_DRAWN,
    Confusion,
    class_rows,
    classes_csv,
    confusion_csv,
    count_confusion,
    draw_confusion,
)
from trainer.analysis.curves import Curves, curves_csv, draw_curves, read_curves
from trainer.analysis.filters import draw_filters, first_filters
from trainer.analysis.page import Page
from trainer.analysis.responses import Response, draw_responses, measure_responses, responses_csv
from trainer.rundir import RunDirectory
from trainer.trained import Images, Trained, load_trained, spread, use_exact_statistics
from trainer.weights import Weights, choose_checkpoint

PARTS = ("curves", "responses", "confusion", "filters")
_MOST_PAIRS, _MOST_TOLD = 20, 5

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Analysis:
    """What to do.

    Attributes:
        runs: by the name under which each is shown.
        out: the directory for the page and its files.
        parts: of `PARTS`; empty means all that there is something for.
        num_images: held-out images whose responses are measured, spread over the split.
    """

    runs: Mapping[str, RunDirectory]
    out: Path
    parts: Sequence[str] = ()
    weights: Weights = "auto"
    images: Images = field(default_factory=Images)
    num_images: int = 512
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    threads: int = 1

    def wants(self, *parts: str) -> bool:
        return not self.parts or any(part in self.parts for part in parts)


@dataclass
class _Found:
    """By the name of each run what it has to show."""

    curves: dict[str, Curves] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    responses: dict[str, list[Response]] = field(default_factory=dict)
    confusions: dict[str, Confusion] = field(default_factory=dict)
    filters: dict[str, NDArray[np.float32]] = field(default_factory=dict)


def analyse(analysis: Analysis, tell: Tell) -> Path:
    """Write the page and return its path; `tell` gets a line of text about each thing that was found.

    Raises LonghaulError where a part that was asked for by name is not to be had. Where none was named, `tell` says
    what is left out, and why.
    """
    found = _examine(analysis, tell)
    page = Page(analysis.out)
    for section in (_curves, _responses, _confusions, _filters):
        section(found, page, tell)
    if not page.files:
        raise LonghaulError(f"There is nothing to analyse yet of {', '.join(analysis.runs)}.")
    return page.write(" and ".join(analysis.runs))


def _examine(analysis: Analysis, tell: Tell) -> _Found:
    found = _Found()

    @contextmanager
    def optional(name: str, part: str) -> Iterator[None]:
        try:
            yield
        except LonghaulError as error:
            if analysis.parts:
                raise
            tell(f"{name}: {part} left out. {error}")

    for name, run in analysis.runs.items():
        if analysis.wants("curves"):
            with optional(name, "curves"):
                found.curves[name] = read_curves(run)
        if not analysis.wants("responses", "confusion", "filters"):
            continue
        with optional(name, "network"):
            saved = choose_checkpoint(run, None)
            trained = load_trained(run, saved, analysis.weights, analysis.device, analysis.threads)
            if analysis.wants("responses", "confusion"):
                use_exact_statistics(trained, analysis.images)
            found.steps[name] = saved.step
            if analysis.wants("responses"):
                with optional(name, "responses"), analysis.images.open(run, "val") as split:
                    found.responses[name] = _measure(trained, split, analysis.num_images)
            if analysis.wants("confusion"):
                with optional(name, "confusion"), analysis.images.open(run, "val") as split:
                    found.confusions[name] = count_confusion(trained, split)
            if analysis.wants("filters"):
                with optional(name, "filters"):
                    found.filters[name] = first_filters(trained.network)
    return found


def _measure(trained: Trained, split: Split, num_images: int) -> list[Response]:
    batches = trained.batches(split, spread(len(split), num_images))
    return measure_responses(trained.network, (trained.laid_out(batch.images) for batch in batches))


def _curves(found: _Found, page: Page, tell: Tell) -> None:
    if not found.curves:
        return
    page.heading("Error over iterations")
    page.picture("curves.svg", draw_curves(found.curves))
    page.note(
        "Top-1 error. Bold: on held-out images, one view each. Dashed: on training images as they were augmented, by "
        "the weights of that moment; means over stretches of 1 % of the iterations."
    )
    page.text("curves.csv", curves_csv(found.curves))
    for name, curves in found.curves.items():
        if curves.held_out:
            tell(f"{name}: held-out error {curves.held_out[-1].error:.2f} % at step {curves.held_out[-1].step:,}")


def _responses(found: _Found, page: Page, tell: Tell) -> None:
    if not found.responses:
        return
    page.heading("Responses of layers")
    for file, picture in draw_responses(found.responses).items():
        page.picture(file, picture)
    page.note(
        "Standard deviation of the output of each 3x3 convolution after its batch norm, before the nonlinearity or the "
        "addition, on held-out images."
    )
    page.text("responses.csv", responses_csv(found.responses))
    for name, responses in found.responses.items():
        mean = sum(response.std for response in responses) / len(responses)
        tell(f"{name}: standard deviation of {len(responses)} layers' responses {mean:.4f} on average")


def _confusions(found: _Found, page: Page, tell: Tell) -> None:
    if found.confusions:
        page.heading("Classes")
    for name, confusion in found.confusions.items():
        page.heading(f"{name}, step {found.steps[name]:,}", 3)
        page.note(f"Top-1 {confusion.top1:.2%} of {confusion.num_images:,} held-out images, in central view.")
        page.text(file_name("confusion", name, "csv"), confusion_csv(confusion))
        page.text(file_name("classes", name, "csv"), classes_csv(confusion))
        if len(confusion.classes) <= MOST_DRAWN:
            page.picture(file_name("confusion", name, "svg"), draw_confusion(confusion))
            page.note("Rows: the class of the images. Columns: what they were taken for.")
        pairs = confusion.named_pairs(_MOST_PAIRS)
        page.table(("Class", "Taken for", "Images", "Of the class"), pairs)
        page.table(("Class", "Images", "Recognised", "Accuracy"), class_rows(confusion))
        tell(f"{name}: top-1 {confusion.top1:.2%} of {confusion.num_images:,} held-out images")
        for row, column, count, share in pairs[:_MOST_TOLD]:
            tell(f"  {row} taken for {column}: {count} images, {share:.1%} of its class")


def _filters(found: _Found, page: Page, tell: Tell) -> None:
    del tell
    if found.filters:
        page.heading("Filters of the first layer")
        page.note("Each filter's weights, from its least to its greatest; red, green and blue are the three channels.")
    for name, weights in found.filters.items():
        page.heading(f"{name}, step {found.steps[name]:,}", 3)
        page.image(file_name("filters", name, "png"), draw_filters(weights))
        page.array(file_name("filters", name, "npy"), weights)


def file_name(part: str, run: str, suffix: str) -> str:
    """The file of a part of a run: a run may be shown under a name with slashes."""
    return f"{part}-{run.replace('/', '-')}.{suffix}"
