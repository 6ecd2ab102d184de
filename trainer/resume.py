"""Which checkpoint a run goes on from: at its start, and after updates that failed."""

from contextlib import suppress

from configs import LonghaulError, Recipe
from trainer.checkpoints.manifest import Saved, newest_valid, open_checkpoint, open_valid
from trainer.group import Group, together
from trainer.rundir import RunDirectory
from trainer.telemetry import Telemetry


def checkpoint_to_resume(run: RunDirectory, group: Group, broken: list[tuple[str, str]]) -> Saved | None:
    """The newest checkpoint that verifies. Rank 0 reads and decides; what is broken is set aside."""
    store, name = run.store(), None
    if group.rank == 0:
        found = newest_valid(store, lambda n, why: broken.append((store.set_aside(n, "broken"), why)))
        name = None if found is None else found.name
    name = group.from_zero(name)
    return None if name is None else open_checkpoint(store, name)


def roll_back(recipe: Recipe, run: RunDirectory, group: Group, telemetry: Telemetry, since: int) -> Saved:
    """The newest checkpoint from before the updates that fail since step `since`; later ones are set aside. Raises
    LonghaulError where the recipe does not ask to go back, or this did not help already, or there is none."""

    store = run.store()

    def decide() -> str:
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
        for name in reversed(store.names()):
            with suppress(LonghaulError):
                if open_checkpoint(store, name).step <= since:
                    return open_valid(store, name).name
            store.set_aside(name, "abandoned")
        raise LonghaulError(f"{trouble}, and no checkpoint is from before them: {mend}.")

    name = group.from_zero(together(group, lambda: decide() if group.rank == 0 else None))
    saved = open_checkpoint(store, name)
    telemetry.event("rollback", step=saved.step, failing_since=since, path=str(saved))
    return saved
