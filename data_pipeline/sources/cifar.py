"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) as their author distributes them: the binary and the Python versions."""

import io
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from configs import LonghaulError
from data_pipeline.sources.base import Item, Listing
from data_pipeline.sources.files import Entry, Files

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_TYPICAL_BYTES = 2_300  # of such an image as a JPEG


@dataclass(frozen=True)
class _Release:
    """The files of one of the four releases.

    Attributes:
        meta: the file with the names of the classes, and their key in it where it is a pickle.
        label: the number of bytes before the pixels of a record, the last of which is the label; or the key of the
            labels in a pickle.
    """

    train: tuple[str, ...]
    test: str
    meta: tuple[str, bytes]
    label: int | bytes


_RELEASES = {
    "cifar-10-batches-py": _Release(
        tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", ("batches.meta", b"label_names"), b"labels"
    ),
    "cifar-10-batches-bin": _Release(
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", ("batches.meta.txt", b""), 1
    ),
    "cifar-100-python": _Release(("train",), "test", ("meta", b"fine_label_names"), b"fine_labels"),
    "cifar-100-binary": _Release(("train.bin",), "test.bin", ("fine_label_names.txt", b""), 2),
}


def cifar_signs(names: Iterable[str]) -> list[tuple[str, str]]:
    """The (release, folder) of every release among the names of files; a folder ends in a slash or is ""."""
    there = set(names)
    kinds = {file: kind for kind, release in _RELEASES.items() for file in (release.train[0], release.test)}
    found = set()
    for name in there:
        folder, slash, base = name.rpartition("/")
        kind = kinds.get(base)
        # By the folder's name also where files are missing, so that these can be named.
        if kind and (folder.rpartition("/")[2] == kind or f"{folder}{slash}{_RELEASES[kind].meta[0]}" in there):
            found.add((kind, folder + slash))
    return sorted(found)


class Cifar:
    """A release in the folder `folder` of `files`. Its test images are for evaluation.

    Pixels are handed on as JPEGs of quality 100 with full chroma, as shards hold JPEGs.
    """

    sequential = False

    def __init__(self, name: str, files: Files, kind: str, folder: str) -> None:
        self.name = name
        self._files = files
        self._release = _RELEASES[kind]
        self._folder = folder

    def listing(self) -> Listing:
        release, entries = self._release, self._files.entries()
        needed = (*release.train, release.test, release.meta[0])
        missing = [file for file in needed if self._folder + file not in entries]
        if missing:
            raise LonghaulError(
                f"{self._files.locate(self._folder)} has no {', no '.join(missing)}: unpack the release again."
            )
        classes = self._classes(entries[self._folder + release.meta[0]])
        items: list[Item] = []
        for file in needed[:-1]:
            entry = entries[self._folder + file]
            pixels, labels = self._batch(file, self._read(file, entry))
            if len(pixels) != len(labels) or max(labels, default=0) >= len(classes):
                raise self._damaged(file, f"its labels do not fit {len(pixels)} images of {len(classes)} classes")
            split, stem = "val" if file == release.test else "train", file.removesuffix(".bin")
            items += [
                Item(split, label, f"{stem}/{row:05d}", f"{row}:{file}:{entry.size}:{entry.path}", _TYPICAL_BYTES)
                for row, label in enumerate(labels)
            ]
        return Listing(classes, items)

    def read(self, items: Sequence[Item]) -> Iterator[bytes | OSError]:
        batches: dict[str, NDArray[np.uint8]] = {}  # at most a release, 180 MB
        for item in items:
            row, _, place = item.path.partition(":")
            if place not in batches:
                file, size, path = place.split(":", 2)
                batches[place] = self._batch(file, self._read(file, Entry(path, int(size))))[0]
            buffer = io.BytesIO()
            image = Image.fromarray(np.ascontiguousarray(batches[place][int(row)].transpose(1, 2, 0)))
            image.save(buffer, "JPEG", quality=100, subsampling=0)
            yield buffer.getvalue()

    def _read(self, file: str, entry: Entry) -> bytes:
        (data,) = self._files.read([entry])
        if isinstance(data, OSError):
            raise self._damaged(file, str(data))
        return data

    def _classes(self, entry: Entry) -> list[str]:
        file, key = self._release.meta
        data = self._read(file, entry)
        if not key:
            return data.decode("utf-8", "replace").split()
        names = self._unpickle(file, data).get(key)
        if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
            raise self._damaged(file, f"it holds no list {key.decode()}")
        return [name.decode("utf-8", "replace") for name in names]

    def _batch(self, file: str, data: bytes) -> tuple[NDArray[np.uint8], list[int]]:
        """The pixels uint8 [n, 3, 32, 32] and the labels of a file."""
        label = self._release.label
        if isinstance(label, int):
            if len(data) % (label + _PIXELS):
                raise self._damaged(file, f"its {len(data):,} bytes are no whole number of records")
            records = np.frombuffer(data, np.uint8).reshape(-1, label + _PIXELS)
            return records[:, label:].reshape(-1, *_SHAPE), records[:, label - 1].tolist()
        batch = self._unpickle(file, data)
        pixels, labels = batch.get(b"data"), batch.get(label)
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (_PIXELS,):
            raise self._damaged(file, f"it holds no 'data' of {_PIXELS} bytes an image")
        if not isinstance(labels, list) or not all(isinstance(one, int) and one >= 0 for one in labels):
            raise self._damaged(file, f"it holds no list {label.decode()}")
        return pixels.reshape(-1, *_SHAPE), labels

    def _unpickle(self, file: str, data: bytes) -> dict[bytes, Any]:
        try:
            found = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        except _Refused as refused:
            raise LonghaulError(
                f"{self._files.locate(self._folder + file)} asks to load {refused}, which a file of CIFAR does not "
                f"need and which could run anything: it was not opened. Fetch the release from its author's page."
            ) from None
        except Exception as error:  # a damaged pickle may raise anything
            raise self._damaged(file, str(error) or type(error).__name__) from None
        if not isinstance(found, dict):
            raise self._damaged(file, "it holds no dictionary")
        return found

    def _damaged(self, file: str, reason: str) -> LonghaulError:
        return LonghaulError(f"{self._files.locate(self._folder + file)} is damaged ({reason}): fetch it again.")


class _Refused(Exception):
    pass


class _Unpickler(pickle.Unpickler):
    """Admits plain values and numpy arrays; a pickle may otherwise call any function."""

    _ADMITTED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ADMITTED:
            raise _Refused(f"{module}.{name}")
        return self._ADMITTED[module, name]
