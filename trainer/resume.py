"""Which checkpoint a run goes on from: at its start, and after updates that failed."""

from collections.abc import Sequence
from contextlib import suppress

from configs import LonghaulError, Recipe
from trainer.checkpoints.manifest import Saved, open_checkpoint, open_valid, step_in
from trainer.checkpoints.store import Store
from trainer.group import Group, together
from trainer.rundir import RunDirectory
from trainer.telemetry import Telemetry


def checkpoint_to_resume(stores: Sequence[Store], group: Group, broken: list[tuple[str, str]]) -> Saved | None:
    """The newest checkpoint that verifies, of several of one step that of the first store. Rank 0 reads and decides;
    what is broken is set aside."""

    def decide() -> Saved | None:
        for store, name in _newest_first(stores):
            try:
                return open_valid(store, name)
            except LonghaulError as error:
                broken.append((store.set_aside(name, "broken"), str(error)))
        return None

    return _agree(stores, group, decide() if group.rank == 0 else None)


def roll_back(
    recipe: Recipe, run: RunDirectory, stores: Sequence[Store], group: Group, telemetry: Telemetry, since: int
) -> Saved:
    """The newest checkpoint from before the updates that fail since step `since`; later ones are set aside. Raises
    LonghaulError where the recipe does not ask to go back, or this did not help already, or there is none."""

    def decide() -> Saved:
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
        for store, name in _newest_first(stores):
            with suppress(LonghaulError):
                if open_checkpoint(store, name).step <= since:
                    return open_valid(store, name)
            store.set_aside(name, "abandoned")
        raise LonghaulError(f"{trouble}, and no checkpoint is from before them: {mend}.")

    saved = _agree(stores, group, together(group, lambda: decide() if group.rank == 0 else None))
    assert saved is not None
    telemetry.event("rollback", step=saved.step, failing_since=since, path=str(saved))
    return saved


def _newest_first(stores: Sequence[Store]) -> list[tuple[Store, str]]:
    """The checkpoints of all stores; of one step, those of the first store first, and in each the newest."""
    found = [(store, name) for store in stores for name in reversed(store.names())]
    return sorted(found, key=lambda at: -step_in(at[1]))


def _agree(stores: Sequence[Store], group: Group, saved: Saved | None) -> Saved | None:
    """Rank 0's checkpoint on every rank, in this rank's own store on the same place."""
    choice = None if saved is None else (saved.step, stores.index(saved.store), saved.name, saved.manifest)
    choice = group.from_zero(choice)
    if choice is None:
        return None
    step, place, name, manifest = choice
    return Saved(step, stores[place], name, manifest)
