"""Reading the metadata of torch.distributed.checkpoint (DCP), which is a pickle, without running what is in it."""

import pickle
from pathlib import PosixPath
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import _get_layout

_PLAIN = (
    Metadata, TensorStorageMetadata, TensorProperties, ChunkStorageMetadata, MetadataIndex, StorageMeta, _StorageInfo,
    _MEM_FORMAT_ENCODING, _get_layout,
)  # fmt: skip
_ADMITTED: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("pathlib", "PosixPath"): PosixPath,  # where DCP's own writer has been
    **{
        ("torch", str(dtype).removeprefix("torch.")): dtype
        for dtype in vars(torch).values()
        if isinstance(dtype, torch.dtype)
    },
    **{(one.__module__, one.__name__): one for one in _PLAIN},
}


def read_metadata(file: BinaryIO) -> Metadata:
    """The metadata in a file that `torch.distributed.checkpoint` wrote for tensors only.

    Raises ValueError for anything else. Nothing but DCP's own records of names, shapes, dtypes and places is ever
    constructed, whatever the file says.
    """
    try:
        metadata = _Unpickler(file).load()
    except Exception as error:  # of a pickle that is none, any
        raise ValueError(f"it is not the metadata of tensors ({error})") from None
    _check(metadata)
    return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ADMITTED[module, name]


def _check(metadata: Any) -> None:
    """Refuse what DCP would unpickle later on (objects that are no tensors), and what it did not write."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise ValueError("it is not the metadata of a state")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{name} is not a tensor")
    if not isinstance(metadata.storage_data, dict):
        raise ValueError("it does not say where tensors are")
    for place in metadata.storage_data.values():
        if not isinstance(place, _StorageInfo) or place.transform_descriptors:
            raise ValueError("it does not say where tensors are")
