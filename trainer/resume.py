"""Which checkpoint a run goes on from: at its start, and after updates that failed."""

from pathlib import Path

from configs import LonghaulError, Recipe
from trainer.checkpoint import Saved, check, find, newest_valid, open_checkpoint, set_aside
from trainer.group import Group, together
from trainer.rundir import RunDirectory
from trainer.telemetry import Telemetry


def checkpoint_to_resume(run: RunDirectory, group: Group, broken: list[tuple[str, str]]) -> Saved | None:
    """The newest checkpoint that verifies. Rank 0 reads and decides; what is broken is set aside."""
    path: Path | None = None
    if group.rank == 0:
        found = newest_valid(run.checkpoints, lambda p, why: broken.append((str(set_aside(p)), why)))
        path = None if found is None else found.path
    path = group.from_zero(path)
    return None if path is None else open_checkpoint(path)


def roll_back(recipe: Recipe, run: RunDirectory, group: Group, telemetry: Telemetry, since: int) -> Saved:
    """The newest checkpoint from before the updates that fail since step `since`; later ones are set aside. Raises
    LonghaulError where the recipe does not ask to go back, or this did not help already, or there is none."""

    def decide() -> Path:
        trouble = (
            f"{recipe.gradients.max_skipped} updates in a row, from step {since} on, had a gradient that is not finite "
            f"and were skipped"
        )
        mend = (
            "lower schedule.lr, lengthen schedule.warmup or set gradients.clip_norm (then resume with --allow-changes)"
        )
        if recipe.gradients.when_exceeded == "stop":
            raise LonghaulError(f"{trouble}: {mend}, or set gradients.when_exceeded=rollback.")
        if any(event["event"] == "rollback" and event["failing_since"] == since for event in run.events()):
            raise LonghaulError(f"{trouble}, as they did before going back to an earlier checkpoint: {mend}.")
        for path in reversed(find(run.checkpoints)):
            if open_checkpoint(path).step <= since and check(path) is None:
                return path
            set_aside(path, "abandoned")
        raise LonghaulError(f"{trouble}, and no checkpoint is from before them: {mend}.")

    path = group.from_zero(together(group, lambda: decide() if group.rank == 0 else None))
    saved = open_checkpoint(path)
    telemetry.event("rollback", step=saved.step, failing_since=since, path=str(path))
    return saved
