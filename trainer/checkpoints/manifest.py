"""What a checkpoint says of itself, whether its files are what it says, and which of a store's is the one to load."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from configs import LonghaulError
from trainer.checkpoints.store import MANIFEST, Store

FORMAT = 4
_BLOCK = 2**20


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint: the step (number of updates done), where it is, and its manifest."""

    step: int
    store: Store
    name: str
    manifest: dict[str, Any]

    def __str__(self) -> str:
        """Its directory or URL."""
        return self.store.locate(self.name)


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def step_in(name: str) -> int:
    """The step in a checkpoint's name, whatever follows it."""
    return int(name.split("-")[1])


def render(manifest: dict[str, Any]) -> bytes:
    """A manifest as the bytes of its file, whose last key is the SHA-256 of what precedes it."""
    return _text({**manifest, "sha256": _digest_of(manifest)})


def parse(data: bytes) -> dict[str, Any]:
    """The manifest of a file's bytes; raises ValueError for bytes that `render` did not make, each of them."""
    manifest = json.loads(data)
    if not isinstance(manifest, dict):
        raise ValueError("not a JSON object")
    digest = manifest.pop("sha256", None)
    # Rendered again, so that also a byte which JSON does not mind is noticed.
    if digest != _digest_of(manifest) or render(manifest) != data:
        raise ValueError("the bytes are not those that were saved")
    return manifest


def _digest_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(_text(manifest)).hexdigest()


def _text(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()


def open_checkpoint(store: Store, name: str) -> Saved:
    """Read a checkpoint's manifest; raises LonghaulError where it cannot be used."""
    where = f"{store.locate(name)}/{MANIFEST}"
    try:
        with store.open(name, MANIFEST) as file:
            data = file.read()
    except OSError as error:
        raise LonghaulError(f"{where} is missing or unreadable ({error})") from None
    try:
        found = json.loads(data).get("format")
    except (ValueError, AttributeError):
        found = FORMAT
    if found != FORMAT and isinstance(found, int):
        raise LonghaulError(f"{where} has format {found}, this version reads {FORMAT}")
    try:
        manifest = parse(data)
        return Saved(int(manifest["step"]), store, name, manifest)
    except (ValueError, KeyError, TypeError):
        raise LonghaulError(f"{where} does not have the bytes that were saved") from None


def problem_of(saved: Saved) -> str | None:
    """What is wrong with a checkpoint, or None when every file has the size and SHA-256 that its manifest says."""
    for name, expected in saved.manifest["files"].items():
        try:
            found = _fingerprint(saved, name)
        except OSError:
            return f"{saved}/{name} is missing or unreadable"
        if found != expected:
            return f"{saved}/{name} does not have the bytes that were saved"
    return None


def open_valid(store: Store, name: str) -> Saved:
    """A checkpoint all of whose bytes are those that were saved; raises LonghaulError where they are not."""
    saved = open_checkpoint(store, name)
    problem = problem_of(saved)
    if problem is not None:
        raise LonghaulError(problem)
    return saved


def newest_valid(store: Store, on_broken: Callable[[str, str], None] = lambda *_: None) -> Saved | None:
    """The newest checkpoint that verifies; `on_broken(name, why)` is told of each newer one that does not."""
    for name in reversed(store.names()):
        try:
            return open_valid(store, name)
        except LonghaulError as error:
            on_broken(name, str(error))
    return None


def _fingerprint(saved: Saved, file: str) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with saved.store.open(saved.name, file) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}
