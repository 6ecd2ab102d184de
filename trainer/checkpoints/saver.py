"""Saving in the background: a copy is taken between two steps and written behind the next ones."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from trainer.checkpoints.files import write
from trainer.checkpoints.manifest import FORMAT, Saved, checkpoint_name, render
from trainer.checkpoints.state import State, copy_into, empty_like, num_bytes
from trainer.checkpoints.store import Store
from trainer.group import Group


class Checkpointer:
    """Saves in the background, one checkpoint at a time, and removes those that need not be kept."""

    def __init__(
        self,
        store: Store,
        group: Group,
        attempt: int,
        superfluous: Callable[[Store], list[str]],
        on_saved: Callable[[Saved, float], None],
        on_failed: Callable[[Store, int, str], None],
        memory: Store | None = None,
    ) -> None:
        """`superfluous(store)` names the checkpoints to remove. It, `on_saved(saved, seconds)` and
        `on_failed(store, step, why)` are called on rank 0, from the saving thread. `memory` is a second store, for
        saves between those that are to last."""
        self._store, self._group, self._attempt, self._superfluous = store, group, attempt, superfluous
        self.memory = memory
        self._on_saved, self._on_failed = on_saved, on_failed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._in_memory = False  # whether that goes there
        self._staged: State = {}
        self.last_step = -1
        if group.rank == 0:
            for swept in (store,) if memory is None else (store, memory):
                swept.sweep()

    def save(self, step: int, state: State, extra: dict[str, Any], into: Store | None = None) -> None:
        """Copy the state and return; the copy is written behind the next steps, into the store or (`into`) the one in
        memory. Waits for a save still under way."""
        self.wait()
        self._make_room(state)
        copy_into(self._staged, state)
        self._in_memory = into is not None
        if into is None:
            self.last_step = step
        self._pending = self._thread.submit(self._write, into or self._store, step, dict(self._staged), extra)

    def busy(self, in_memory: bool = False) -> bool:
        """Whether a save is under way into the store, or into the one in memory."""
        return self._pending is not None and not self._pending.done() and self._in_memory == in_memory

    def wait(self) -> None:
        """Until the save under way, if any, is committed or has failed."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        self.wait()
        self._thread.shutdown()

    def _make_room(self, state: State) -> None:
        """Memory to copy into, kept from save to save; only the ledger's grows."""
        grown = {
            name: part
            for name, part in state.items()
            if name not in self._staged or self._staged[name].size() != part.size()
        }
        self._staged |= empty_like(grown)

    def _write(self, store: Store, step: int, state: State, extra: dict[str, Any]) -> None:
        began = time.monotonic()
        draft = f"{checkpoint_name(step)}-attempt{self._attempt}"
        problem, files = self._write_share(store, draft, state)
        outcomes: list[Any] = [None] * self._group.world_size
        dist.all_gather_object(outcomes, (problem, files), group=self._group.saving)
        if self._group.rank != 0:
            return
        problem = next((problem for problem, _ in outcomes if problem is not None), None)
        try:
            if problem is not None:
                raise OSError(problem)
            marks = {name: mark for _, own in outcomes for name, mark in own.items()}
            saved = self._commit(store, draft, step, marks, extra)
        except OSError as error:
            reason = self._reason(store, str(error), state)
            store.discard(draft)
            self._on_failed(store, step, reason)
            return
        self._on_saved(saved, time.monotonic() - began)
        self._prune(store)

    def _write_share(self, store: Store, draft: str, state: State) -> tuple[str | None, dict[str, Any]]:
        """This rank's files and their fingerprints. Never raises: a full disk must not stop the training."""
        problem = None
        try:
            if self._group.rank == 0:
                store.begin(draft)
        except OSError as error:
            problem = str(error)
        dist.barrier(group=self._group.saving)
        try:
            return problem, write(state, store, draft, self._group.saving)
        except OSError as error:
            return problem or str(error), {}

    def _commit(self, store: Store, draft: str, step: int, files: dict[str, Any], extra: dict[str, Any]) -> Saved:
        manifest = {"format": FORMAT, "step": step, "world_size": self._group.world_size, "files": files, **extra}
        name = store.commit(draft, checkpoint_name(step), render(manifest))
        return Saved(step, store, name, manifest)

    def _prune(self, store: Store) -> None:
        for name in self._superfluous(store):
            try:
                store.remove(name)
            except OSError:  # what cannot be removed now is superfluous the next time too
                continue

    def _reason(self, store: Store, message: str, state: State) -> str:
        """Why a save failed. Of a full disk torch's writer often tells no more than an unexpected position."""
        try:
            free = store.free_bytes()
        except OSError:
            return message
        size = num_bytes(state)
        if free is not None and free < size:
            return f"No space left on device: {store} has {free:,} bytes, a checkpoint takes up to {size:,}"
        return message
