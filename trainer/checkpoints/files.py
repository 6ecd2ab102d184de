"""Writing and reading a state with torch.distributed.checkpoint (DCP) into and out of a store."""

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from configs import LonghaulError
from trainer.checkpoints.manifest import Saved
from trainer.checkpoints.metadata import read_metadata
from trainer.checkpoints.state import Piece, State
from trainer.checkpoints.store import Store
from trainer.group import Group, together

METADATA = ".metadata"  # DCP's own name for it

# Reading a checkpoint in one process is meant, not an accident to be warned of.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


def write(state: State, store: Store, draft: str, group: dist.ProcessGroup) -> dict[str, dict[str, Any]]:
    """Write this rank's share of a state into a draft; called by all ranks of `group` together.

    Returns the size and SHA-256 of each file written here. Raises OSError, on every rank, where one could not write.
    """
    files = _Files(store, draft)
    writer = _Writer(draft, sync_files=False)  # a store's files are durable when they are closed
    writer.fs = files  # type: ignore[assignment]
    try:
        dcp.save(state, storage_writer=writer, planner=_SavePlanner(), process_group=group)
    except dcp.api.CheckpointException as error:  # derives from BaseException
        rank, (first, _) = next(iter(error.failures.items()))
        raise OSError(f"worker {rank}: {_first_line(first)}") from None
    return files.written


def load(saved: Saved, state: Mapping[str, torch.Tensor | Piece], group: Group | None = None) -> None:
    """Fill the tensors and pieces of `state` in place from a checkpoint written by any number of workers.

    Called by all ranks of `group` together, or (None) by one process. Raises LonghaulError where it does not fit.
    Never runs what a file says: metadata is read by `read_metadata`, tensors by `torch.load(weights_only=True)`.
    """
    reader = _reader(saved) if group is None else together(group, lambda: _reader(saved))
    try:
        dcp.load(
            dict(state),
            storage_reader=reader,
            planner=_LoadPlanner(),
            process_group=None if group is None else group.control,
            no_dist=group is None or group.world_size == 1,
        )
    except dcp.api.CheckpointException as error:
        first = next(iter(error.failures.values()), ("unknown",))[0]
        raise LonghaulError(f"The checkpoint {saved} does not fit this run: {_first_line(first)}.") from None
    finally:
        saved.store.done_reading()


def contents(saved: Saved) -> dict[str, torch.Tensor]:
    """Every tensor in a checkpoint by name, whole, on the CPU, its values undefined: to be filled by `load`."""
    stored: dict[str, Any] = _reader(saved).metadata.state_dict_metadata
    return {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}


def _reader(saved: Saved) -> "_Reader":
    """Raises LonghaulError where the checkpoint's metadata cannot be read."""
    files = _Files(saved.store, saved.name)
    try:
        with files.create_stream(METADATA, "rb") as stream:
            return _Reader(saved.name, files, read_metadata(stream))
    except (OSError, ValueError) as error:
        raise LonghaulError(f"{saved}/{METADATA} cannot be used: {error}.") from None


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


class _Writer(dcp.FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        """Without the directory, whose pickled form depends on the version of Python."""
        return StorageMeta(save_id=self.save_id)


class _Reader(dcp.FileSystemReader):
    """DCP's reader with metadata that were read before, by who does not run them."""

    def __init__(self, name: str, files: "_Files", metadata: Metadata) -> None:
        super().__init__(name)
        self.fs = files  # type: ignore[assignment]
        self.metadata = metadata
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id

    def read_metadata(self) -> Metadata:  # without `kwargs` DCP does not look for a rank's own
        return self.metadata


class _SavePlanner(dcp.DefaultSavePlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: Any) -> Any:
        part = self.state_dict[index.fqn]
        return part.view(index.offset) if isinstance(part, Piece) else part


class _LoadPlanner(dcp.DefaultLoadPlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """DCP's own makes room for tensors that have none yet (on the meta device), and None of pieces."""
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def load_bytes(self, read_item: Any, value: Any) -> None:
        """Would unpickle; `read_metadata` has refused everything but tensors."""
        raise NotImplementedError

    def lookup_tensor(self, index: Any) -> torch.Tensor:
        part = self.state_dict[index.fqn]
        return part.view(index.offset) if isinstance(part, Piece) else part


class _Files(FileSystemBase):
    """What DCP's writer and reader see of a store: the files of one draft, or of one checkpoint."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name
        self.written: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        file = PurePosixPath(path).name
        if mode == "rb":
            with self._store.open(self._name, file) as stream:
                yield stream
        else:
            file = file.removesuffix(".tmp")  # only what is committed is ever seen: no need to rename within it
            with self._store.create(self._name, file) as raw:
                hashed = _Hashed(raw)
                try:
                    yield hashed
                except Exception as error:  # torch.save tells of a full disk no more than an unexpected position
                    raise hashed.problem or error from None
            self.written[file] = {"bytes": hashed.tell(), "sha256": hashed.digest.hexdigest()}

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> PurePosixPath:
        return PurePosixPath(path) / suffix

    def init_path(self, path: str | os.PathLike[str]) -> PurePosixPath:
        return PurePosixPath(path)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        pass

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        del checkpoint_id
        return True

    def exists(self, path: str | os.PathLike[str]) -> bool:
        del path
        return False  # a draft begins empty

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        raise NotImplementedError


class _Hashed:
    """A file that is hashed while it is written, front to back."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._size = raw, 0
        self.digest = hashlib.sha256()
        self.problem: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data)
        try:
            self._raw.write(view)
        except OSError as error:
            self.problem = error
            raise
        self.digest.update(view)
        self._size += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._raw.flush()

    def close(self) -> None:
        """The store's file is closed by who opened it."""
