"""What a checkpoint says of itself, whether its files are what it says, and which of a store's is the one to load."""

import errno
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from configs import LonghaulError
from trainer.checkpoints.store import MANIFEST, Store

FORMAT = 4
_BLOCK = 2**20
_DAMAGED = {errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.EUCLEAN, errno.EBADMSG}


class Broken(LonghaulError):
    """A checkpoint whose bytes are not those that were saved."""


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


def render(manifest: dict[str, Any]) -> bytes:
    """A manifest as the bytes of its file, whose last key is the SHA-256 of what precedes it."""
    return _text({**manifest, "sha256": _digest_of(manifest)})


def parse(data: bytes) -> dict[str, Any]:
    """The manifest of a file's bytes; raises ValueError for bytes that `render` did not make, each of them."""
    manifest = json.loads(data)
    if not isinstance(manifest, dict) or not {"format", "step", "files"} <= manifest.keys():
        raise ValueError("not a manifest")
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
    """Read a checkpoint's manifest. Raises Broken where it is lost or damaged, another LonghaulError where it was
    written by another version or the storage cannot be read."""
    where = f"{store.locate(name)}/{MANIFEST}"
    try:
        with store.open(name, MANIFEST) as file:
            data = file.read()
    except OSError as error:
        raise _unreadable(where, error) from None
    try:
        manifest = parse(data)
    except (ValueError, RecursionError):
        if (found := _older_format(data)) is not None:
            raise LonghaulError(f"{where} has format {found}, this version reads {FORMAT}.") from None
        raise Broken(f"{where} does not have the bytes that were saved") from None
    if manifest["format"] != FORMAT:
        raise LonghaulError(f"{where} has format {manifest['format']}, this version reads {FORMAT}.")
    return Saved(int(manifest["step"]), store, name, manifest)


def _older_format(data: bytes) -> int | None:
    """The format of a manifest from before manifests hashed themselves (4); a damaged one is not taken for it."""
    try:
        manifest = json.loads(data)
        return int(manifest["format"]) if "sha256" not in manifest and manifest["format"] < 4 else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def problem_of(saved: Saved, files: Iterable[str] | None = None) -> str | None:
    """What is wrong with a checkpoint, or None when every file (or each of `files`) has the size and SHA-256 that its
    manifest says. Raises LonghaulError where the storage cannot be read, which says nothing about the checkpoint."""
    for name in saved.manifest["files"] if files is None else files:
        try:
            found = _fingerprint(saved, name)
        except OSError as error:
            problem = _unreadable(f"{saved}/{name}", error)
            if isinstance(problem, Broken):
                return str(problem)
            raise problem from None
        if found != saved.manifest["files"][name]:
            return f"{saved}/{name} does not have the bytes that were saved"
    return None


def _unreadable(where: str, error: OSError) -> LonghaulError:
    """Broken for a file that is lost, or on a bad sector. Not for a server that does not answer: then the checkpoint
    may be as good as ever, and to go on without it would throw its work away."""
    if isinstance(error, FileNotFoundError) or error.errno in _DAMAGED:
        return Broken(f"{where} is missing or unreadable")
    return LonghaulError(f"{where} cannot be read ({error}): check the storage, and try again.")


def open_valid(store: Store, name: str) -> Saved:
    """A checkpoint all of whose bytes are those that were saved; raises Broken where they are not."""
    saved = open_checkpoint(store, name)
    problem = problem_of(saved)
    if problem is not None:
        raise Broken(problem)
    return saved


def newest_valid(store: Store, on_broken: Callable[[str, str], object] = lambda *_: None) -> Saved | None:
    """The newest checkpoint that verifies; `on_broken(name, why)` is told of each newer one that does not. Raises
    LonghaulError where the storage cannot be read."""
    for name in reversed(list_names(store)):
        try:
            return open_valid(store, name)
        except Broken as error:
            on_broken(name, str(error))
    return None


def list_names(store: Store) -> list[str]:
    """`store.names()`; raises LonghaulError where the storage cannot be read."""
    try:
        return store.names()
    except OSError as error:
        raise LonghaulError(f"The checkpoints in {store} cannot be listed ({error}).") from None


def _fingerprint(saved: Saved, file: str) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with saved.store.open(saved.name, file) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}
