"""What `longhaul eval` does."""

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from data_pipeline.storage import parse_location
from launch.commands import cache_options
from launch.options import choose_weights, find_target
from launch.view import shown_path


def evaluate_checkpoints(
    console: Console,
    targets: list[str],
    data: str | None,
    runs: Path,
    device: str,
    threads: int,
    views: str,
    weights: str | None,
    norm_batches: int | None,
    cache_dir: Path | None,
    cache_bytes: str | None,
) -> None:
    """Score checkpoints and, where there are several, their ensemble; under torchrun rank 0 tells."""
    chosen = None if weights is None else choose_weights(weights)
    from trainer.score import How, Scored, Target, score_checkpoints

    def described(one: Scored) -> str:
        notes = ["averaged weights"] if one.averaged else []
        notes += [f"batch norm over {one.norm_batches} micro-batches"] if one.norm_batches else []
        return shown_path(str(one.saved)) + (f" ({', '.join(notes)})" if notes else "")

    how = How(device, threads, views, chosen, norm_batches, **cache_options(cache_dir, cache_bytes))
    scored, ensemble = score_checkpoints(
        [Target(*find_target(name, runs)) for name in targets], data and parse_location(data), how
    )
    if os.environ.get("RANK", "0") != "0":
        return
    figures: dict[str, Any] = ensemble.as_dict()
    for one in scored:
        _tell(console, described(one), one.score.as_dict())
    if len(scored) > 1:
        _tell(console, f"Ensemble of {len(scored)}", figures)
        figures["members"] = [{"checkpoint": str(one.saved), **one.score.as_dict()} for one in scored]
    console.print_json(json.dumps(figures))


def _tell(console: Console, what: str, figures: dict[str, Any]) -> None:
    console.print(
        f"{what}: top-1 {figures['top1']:.2%}, top-5 {figures['top5']:.2%}, loss {figures['loss']:.4f}, "
        f"{figures['num_images']:,} images",
        highlight=False,
    )
