"""The directory of a run: its recipe, events, checkpoints, result; and the rule by which a run may go on."""

import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from configs import LonghaulError, Recipe, dump, parse_recipe
from data_pipeline.storage import Location, parse_location
from trainer.checkpoints.objects import open_store
from trainer.checkpoints.store import Store

# Keys that decide nothing of the result: a run goes on with other values of theirs as with its own.
_NOT_OF_THE_RESULT = ("description", "checkpoint.", "log.", "engine.name", "engine.zero_stage", "engine.deepspeed")


@dataclass(frozen=True)
class RunDirectory:
    """Paths in `runs/NAME/`."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Where the run keeps its checkpoints, if it was not told otherwise."""
        return self.path / "checkpoints"

    @property
    def location_file(self) -> Path:
        """Says where else the run keeps its checkpoints: a directory or a URL."""
        return self.path / "checkpoints.url"

    def checkpoint_location(self) -> Location:
        """The directory or URL that holds the run's checkpoints."""
        return (
            parse_location(self.location_file.read_text().strip()) if self.location_file.is_file() else self.checkpoints
        )

    def store(self) -> Store:
        """Where the run keeps its checkpoints."""
        return open_store(self.checkpoint_location())

    @property
    def result_file(self) -> Path:
        return self.path / "result.json"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

    @property
    def stop_file(self) -> Path:
        """Asks the workers, wherever they are, to save a checkpoint and leave."""
        return self.path / "stop"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def require(self) -> "RunDirectory":
        """This directory, or LonghaulError where it is not a run's."""
        if not self.recipe_file.is_file():
            near = sorted(p.name for p in self.path.parent.glob("*") if (p / "recipe.yaml").is_file())
            known = f"runs here: {', '.join(near)}" if near else "start one with `longhaul train RECIPE --name NAME`"
            raise LonghaulError(f"There is no run at {self.path} (no recipe.yaml); {known}.")
        return self

    def recipe(self) -> Recipe:
        """The resolved recipe that the run was started with."""
        return parse_recipe(yaml.safe_load(self.require().recipe_file.read_text()), str(self.recipe_file))

    def write_recipe(self, recipe: Recipe) -> None:
        write_atomically(self.recipe_file, dump(recipe))

    def result(self) -> dict[str, Any] | None:
        """The contents of result.json, or None while the run is not finished."""
        return json.loads(self.result_file.read_text()) if self.result_file.is_file() else None

    def events(self) -> Iterator[dict[str, Any]]:
        """The events so far; a last line cut short by a crash is passed over."""
        if not self.events_file.is_file():
            return
        with self.events_file.open() as lines:
            for line in lines:
                try:
                    yield json.loads(line)
                except ValueError:
                    continue

    def data(self) -> Location:
        """The data set that the run was started, or imported, with; raises LonghaulError where no event tells."""
        known = next((event for event in self.events() if event["event"] in ("start", "imported")), None)
        if known is None:
            raise LonghaulError(f"{self.events_file} does not say which data the run was trained on: give --data.")
        return parse_location(known["data"])

    def recipe_sha256(self) -> str:
        """The hash of the recipe, as the latest start has it; "" where the events are not there."""
        return next((e["recipe_sha256"] for e in reversed(list(self.events())) if e["event"] == "start"), "")


class Events:
    """Appends to events.jsonl: one JSON object a line, each with `event` and `time` (seconds since 1970).

    What finds no room on the disk is written as soon as there is some; until then it is told on stderr, once.
    """

    def __init__(self, run: RunDirectory, enabled: bool = True) -> None:
        self._file = run.events_file.open("ab", buffering=0) if enabled else None
        self._lock = threading.Lock()
        self._unwritten = b""
        self._told = False
        if self._file is not None and _last_byte(run.events_file) not in (b"", b"\n"):
            self._unwritten = b"\n"  # a crash cut the last line short: do not write on in it

    def write(self, event: str, **fields: Any) -> None:
        if self._file is None:
            return
        line = json.dumps({"event": event, "time": round(time.time(), 3), **fields})
        with self._lock:
            self._unwritten += line.encode() + b"\n"
            try:
                while self._unwritten:
                    self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            except OSError as error:  # a full disk must not stop the training
                if not self._told:
                    print(f"{self._file.name} cannot be written: {error.strerror}.", file=sys.stderr, flush=True)
                self._told = True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(file.seek(0, 2) - 1, 0))
        return file.read(1)


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def settle_location(run: RunDirectory, base: Location | None, record: bool) -> None:
    """`record`, if it is a new run, that its checkpoints go to `base`/NAME (None: where they go by default). Raises
    LonghaulError where a run that has begun keeps them elsewhere, or where fsspec knows nothing of such a URL."""
    if base is None:
        return
    wanted = base / run.name if isinstance(base, Path) else f"{base}/{run.name}"
    found = run.checkpoint_location()
    if run.recipe_file.is_file() and found != wanted:
        raise LonghaulError(
            f"The run {run.path} keeps its checkpoints in {found}, not in {wanted}: leave out --checkpoints, or give "
            f"another --name."
        )
    open_store(wanted)
    if record and found != wanted:
        write_atomically(run.location_file, f"{wanted}\n")


def settle_recipe(run: RunDirectory, recipe: Recipe, allow_changes: bool) -> Recipe:
    """The recipe to go on with. `precision: auto` adopts what the run began with.

    Raises LonghaulError with the difference when a run of this name was started with another recipe.
    """
    if not run.recipe_file.is_file():
        return recipe
    old = run.recipe()
    if recipe.precision == "auto":
        recipe = recipe.model_copy(update={"precision": old.precision})
    changes = difference(old, recipe)
    if changes and not allow_changes:
        raise LonghaulError(
            f"The run {run.path} was started with another recipe: {'; '.join(changes)}. "
            f"Give another --name, or --allow-changes to go on with the new values."
        )
    return recipe


def difference(old: Recipe, new: Recipe) -> list[str]:
    """What changed of that which decides the result, one ``key: old -> new`` each."""
    before, after = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    keys = [*before, *(key for key in after if key not in before)]
    return [
        f"{key}: {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}"
        for key in keys
        if not key.startswith(_NOT_OF_THE_RESULT) and before.get(key) != after.get(key)
    ]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
