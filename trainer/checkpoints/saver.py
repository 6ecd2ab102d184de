"""Saving in the background: a copy is taken between two steps and written behind the next ones."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trainer.checkpoints.files import write
from trainer.checkpoints.manifest import FORMAT, Saved, checkpoint_name, render
from trainer.checkpoints.state import State, copy_into, empty_like
from trainer.checkpoints.store import Store
from trainer.group import Group

PATIENCE_SECONDS = 300.0  # less than a collective waits for the other ranks
_LAST_PATIENCE_SECONDS = 1800.0
_GROUP_TIMEOUT = timedelta(minutes=10)


class Checkpointer:
    """Saves in the background, one checkpoint at a time, and removes those that need not be kept.

    Whatever the storage does, training goes on. A save that fails on one rank fails on all, is told, and leaves what
    was there before. One that hangs holds training up once, until it is `patience_seconds` old; until it ends no other
    is begun, and each that was due is told as failed.
    """

    def __init__(
        self,
        store: Store,
        group: Group,
        attempt: int,
        superfluous: Callable[[Store], list[str]],
        on_saved: Callable[[Saved, float], None],
        on_failed: Callable[[Store, int, str], None],
        memory: Store | None = None,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        """`superfluous(store)` names the checkpoints to remove. It, `on_saved(saved, seconds)` and
        `on_failed(store, step, why)` are called on rank 0, mostly from the saving thread. `memory` is a second store,
        for saves between those that are to last."""
        self.memory = memory
        self._store, self._group, self._attempt, self._superfluous = store, group, attempt, superfluous
        self._on_saved, self._on_failed, self._patience = on_saved, on_failed, patience_seconds
        self._ranks = group.saving
        self._pending: Future[None] | None = None
        self._into, self._began = store, 0.0  # where that goes, and since when
        self._staged: State = {}
        self.last_step = -1
        if group.rank == 0:
            for swept in (store,) if memory is None else (store, memory):
                with suppress(OSError):  # what cannot be removed now is swept the next time
                    swept.sweep()

    def save(self, step: int, state: State, extra: dict[str, Any], into: Store | None = None) -> None:
        """Copy the state and return; the copy is written behind the next steps, into the store or (`into`) the one in
        memory. Called by all ranks together. Waits for a save still under way, see the class for how long."""
        if into is None:
            self.last_step = step
        self._wait(self._began + self._patience)
        if not self._ready(into or self._store, step):
            return
        self._make_room(state)
        copy_into(self._staged, state)
        copied = torch.cuda.current_stream().record_event() if self._group.device.type == "cuda" else None
        self._pending, self._into, self._began = Future(), into or self._store, time.monotonic()
        # A daemon: a write that hangs for ever does not keep the process from ending.
        threading.Thread(
            target=self._run, args=(self._pending, copied, self._into, step, dict(self._staged), extra), daemon=True
        ).start()

    def busy(self, in_memory: bool = False) -> bool:
        """Whether a save is under way into the store, or into the one in memory."""
        return self._pending is not None and not self._pending.done() and (self._into is self.memory) == in_memory

    def wait(self) -> None:
        """Until the save under way, if any, is committed or has failed: the last one, so with more patience."""
        self._wait(time.monotonic() + _LAST_PATIENCE_SECONDS)

    def close(self) -> None:
        """Wait for the last save."""
        self.wait()
        if self._pending is not None and not self._pending.done() and self._group.rank == 0:
            why = f"the last save to {self._into} hangs, and is not waited for any longer"
            self._on_failed(self._into, self.last_step, why)

    def _wait(self, deadline: float) -> None:
        if self._pending is not None:
            wait_for([self._pending], max(deadline - time.monotonic(), 0.0))

    def _ready(self, store: Store, step: int) -> bool:
        """Whether a save can begin, on all ranks alike: not while an earlier one hangs on one of them. Ranks that lost
        each other in such a save get a new group."""
        hangs = self._pending is not None and not self._pending.done()
        lost = not hangs and self._pending is not None and self._pending.exception() is not None
        ranks = self._group.gather((hangs, lost))
        if any(hangs for hangs, _ in ranks):
            if self._group.rank == 0:
                self._on_failed(store, step, f"an earlier save to {self._into} still hangs")
            return False
        if any(lost for _, lost in ranks):
            self._ranks = dist.new_group(backend="gloo", timeout=_GROUP_TIMEOUT)
        self._pending = None
        return True

    def _make_room(self, state: State) -> None:
        """Memory to copy into, kept from save to save; only the ledger's grows."""
        grown = {
            name: part
            for name, part in state.items()
            if name not in self._staged or self._staged[name].size() != part.size()
        }
        self._staged |= empty_like(grown)

    def _run(
        self, done: Future[None], copied: Any, store: Store, step: int, state: State, extra: dict[str, Any]
    ) -> None:
        try:
            if copied is not None:
                copied.synchronize()
            self._write(store, step, state, extra)
        except Exception as error:  # the ranks have lost each other: one has died, or hangs in its storage
            if self._group.rank == 0:
                self._on_failed(store, step, f"{type(error).__name__}: {error}".splitlines()[0])
            done.set_exception(error)
        else:
            done.set_result(None)

    def _write(self, store: Store, step: int, state: State, extra: dict[str, Any]) -> None:
        began = time.monotonic()
        draft = f"{checkpoint_name(step)}-attempt{self._attempt}"
        try:
            self._begin(store, draft)
            written = write(state, store, draft, self._ranks)
            shares: list[Any] = [None] * self._group.world_size
            dist.all_gather_object(shares, written, group=self._ranks)
            if self._group.rank == 0:
                files = {name: mark for share in shares for name, mark in share.items()}
                self._on_saved(self._commit(store, draft, step, files, extra), time.monotonic() - began)
                self._prune(store)
        except OSError as error:  # on every rank, but of a commit, which is rank 0's alone
            if self._group.rank == 0:
                self._on_failed(store, step, str(error))
                store.discard(draft)

    def _begin(self, store: Store, draft: str) -> None:
        """Start the draft; where rank 0 cannot, every rank raises OSError."""
        problem: list[str | None] = [None]
        if self._group.rank == 0:
            try:
                store.begin(draft)
            except OSError as error:
                problem = [str(error)]
        dist.broadcast_object_list(problem, src=0, group=self._ranks)
        if problem[0] is not None:
            raise OSError(problem[0])

    def _commit(self, store: Store, draft: str, step: int, files: dict[str, Any], extra: dict[str, Any]) -> Saved:
        manifest = {"format": FORMAT, "step": step, "world_size": self._group.world_size, "files": files, **extra}
        name = store.commit(draft, checkpoint_name(step), render(manifest))
        return Saved(step, store, name, manifest)

    def _prune(self, store: Store) -> None:
        with suppress(OSError):  # what cannot be removed now is superfluous the next time too
            for name in self._superfluous(store):
                store.remove(name)
