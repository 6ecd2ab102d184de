"""Which checkpoint a run goes on from: at its start, and after updates that failed."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from configs import LonghaulError, Recipe
from trainer.checkpoints.manifest import Broken, Saved, list_names, open_checkpoint, open_valid, problem_of
from trainer.checkpoints.memory import KeeperStore
from trainer.checkpoints.store import Store, age
from trainer.group import Group, together
from trainer.rundir import RunDirectory
from trainer.telemetry import Telemetry


def checkpoint_to_resume(stores: Sequence[Store], group: Group, broken: list[tuple[str, str]]) -> Saved | None:
    """The newest checkpoint that verifies, on every rank; of several of one step, the first store's. Each rank reads a
    share of the files. What is broken is set aside, and added to rank 0's `broken`: where it is now, and why. Raises
    LonghaulError where the storage cannot be read."""
    for index, name in _on_zero(group, lambda: _newest_first(stores)):
        store = stores[index]
        manifest, why = _on_zero(group, partial(_read_manifest, store, name))
        if manifest is not None:
            saved = Saved(manifest["step"], store, name, manifest)
            why = _problem_together(saved, group)
            if why is None:
                return saved
        place = _on_zero(group, partial(store.set_aside, name, "broken"))
        if group.rank == 0:
            broken.append((place, why))
    return None


def _newest_first(stores: Sequence[Store]) -> list[tuple[int, str]]:
    """The checkpoints of all stores, each with its store's place among them."""
    found = [(place, name) for place, store in enumerate(stores) for name in reversed(list_names(store))]
    return sorted(found, key=lambda at: -age(at[1])[0])


def _on_zero(group: Group, act: Callable[[], Any]) -> Any:
    """What `act` returns on rank 0, on every rank; so with the LonghaulError or OSError that it raises."""

    def on_zero() -> Any:
        try:
            return act() if group.rank == 0 else None
        except OSError as error:
            raise LonghaulError(f"The checkpoints' storage fails: {error}.") from None

    return group.from_zero(together(group, on_zero))


def _read_manifest(store: Store, name: str) -> tuple[dict[str, Any] | None, str | None]:
    """A checkpoint's manifest, or what is wrong with it."""
    try:
        return open_checkpoint(store, name).manifest, None
    except Broken as error:
        return None, str(error)


def _problem_together(saved: Saved, group: Group) -> str | None:
    """What is wrong with a checkpoint, or None. Each rank reads about as many bytes as the others; rank 0 condemns
    nothing that it has not seen for itself."""
    share = _share(saved, group)
    problems = [found for found in group.gather(together(group, lambda: problem_of(saved, share))) if found is not None]
    if not problems:
        return None
    if isinstance(saved.store, KeeperStore):  # every machine has a part of it, and none is right against another
        return problems[0]
    why: str | None = _on_zero(group, lambda: problem_of(saved))
    if why is None:
        raise LonghaulError(f"{problems[0]}, says one worker, but not rank 0: give every machine the same storage.")
    return why


def _share(saved: Saved, group: Group) -> list[str]:
    """This rank's files: the largest first, each to who has least."""
    files = saved.manifest["files"]
    shares: list[list[str]] = [[] for _ in range(group.world_size)]
    for name in sorted(files, key=lambda name: -files[name]["bytes"]):
        min(shares, key=lambda share: sum(files[one]["bytes"] for one in share)).append(name)
    return shares[group.rank]


def roll_back(
    recipe: Recipe, run: RunDirectory, stores: Sequence[Store], group: Group, telemetry: Telemetry, since: int
) -> Saved:
    """The newest checkpoint from before the updates that fail since step `since`; later ones are set aside. Raises
    LonghaulError where the recipe does not ask to go back, or this did not help already, or there is none."""

    def decide() -> tuple[int, str, dict[str, Any]]:
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
        for index, name in _newest_first(stores):
            store = stores[index]
            with suppress(Broken):
                if open_checkpoint(store, name).step <= since:
                    return index, name, open_valid(store, name).manifest
            store.set_aside(name, "abandoned")
        raise LonghaulError(f"{trouble}, and no checkpoint is from before them: {mend}.")

    index, name, manifest = group.from_zero(together(group, lambda: decide() if group.rank == 0 else None))
    saved = Saved(manifest["step"], stores[index], name, manifest)
    telemetry.event("rollback", step=saved.step, failing_since=since, path=str(saved))
    return saved
