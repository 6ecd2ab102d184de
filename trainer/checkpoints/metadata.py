"""DCP's `.metadata`, read without trusting it.

The file is a pickle, which can name any function and have it called. What DCP writes for tensors names few classes, all
of them inert; nothing else is looked up, so that looking into a checkpoint runs nothing that its author chose. Entries
that are not tensors (`BytesStorageMetadata`), which DCP would unpickle without a question, are not on the list.
"""

import pickle
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import Metadata

from configs import LonghaulError

_DCP = "torch.distributed.checkpoint"
_ALLOWED = {
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # the name of a layout to the layout
    (f"{_DCP}.filesystem", "_StorageInfo"),
    *((f"{_DCP}.metadata", name) for name in (
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )),
}  # fmt: skip


def read_metadata(file: BinaryIO, where: str) -> Metadata:
    """The index of a checkpoint's tensors; `where` names the file. Raises LonghaulError for anything else."""
    try:
        metadata = _Inert(file).load()
    except Exception as error:  # a pickle that is not one fails in every way
        raise LonghaulError(f"{where} is not the index of a checkpoint's tensors, and was not read: {error}.") from None
    if not isinstance(metadata, Metadata):
        raise LonghaulError(f"{where} is not the index of a checkpoint's tensors, but a {type(metadata).__name__}.")
    return metadata


class _Inert(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")
