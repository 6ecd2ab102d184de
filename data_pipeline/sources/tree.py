"""Class-per-folder trees in a directory, zip or tar file."""

import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Protocol

from configs import LonghaulError
from data_pipeline.sources.base import Item, Listing

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
_TRAIN_NAMES = ("train", "training")
_VAL_NAMES = ("val", "validation", "valid", "test")  # the first that is there


class Files(Protocol):
    """Named files: their sizes in bytes, and their contents."""

    def sizes(self) -> dict[str, int]: ...

    def read(self, names: list[str]) -> Iterator[bytes | OSError]: ...


def _attempt(read: Callable[[], bytes]) -> bytes | OSError:
    try:
        return read()
    # RuntimeError: an encrypted file in a zip, or a compression that Python does not know
    except (OSError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile, tarfile.TarError) as error:
        return OSError(str(error))


class DirectoryFiles:
    def __init__(self, root: Path) -> None:
        self._root = root

    def sizes(self) -> dict[str, int]:
        # Links to folders are followed: subsets of ImageNet are often made of them.
        paths = (Path(folder, file) for folder, _, files in os.walk(self._root, followlinks=True) for file in files)
        return {path.relative_to(self._root).as_posix(): path.stat().st_size for path in paths if path.is_file()}

    def read(self, names: list[str]) -> Iterator[bytes | OSError]:
        return (_attempt((self._root / name).read_bytes) for name in names)


class ZipFiles:
    def __init__(self, path: Path) -> None:
        self._path = path

    def sizes(self) -> dict[str, int]:
        with zipfile.ZipFile(self._path) as archive:
            return {info.filename: info.file_size for info in archive.infolist() if not info.is_dir()}

    def read(self, names: list[str]) -> Iterator[bytes | OSError]:
        with zipfile.ZipFile(self._path) as archive:
            for name in names:
                yield _attempt(partial(archive.read, name))


class TarFiles:
    def __init__(self, path: Path) -> None:
        self._path = path

    def sizes(self) -> dict[str, int]:
        try:
            with tarfile.open(self._path) as archive:
                sizes = {member.name: member.size for member in archive if member.isfile()}
                # tarfile takes a header that is damaged or cut short for the end, which is a block of zeros.
                assert archive.fileobj is not None
                archive.fileobj.seek(archive.offset)
                if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("its end is missing")
                return sizes
        except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
            raise LonghaulError(f"{self._path} is not whole ({error}): fetch or make it again.") from None

    def read(self, names: list[str]) -> Iterator[bytes | OSError]:
        with tarfile.open(self._path) as archive:
            # By name in a dict of our own: looking one up in the archive is a search through all of them.
            members = {member.name: member for member in archive}
            for name in names:
                yield _attempt(partial(self._read, archive, members[name]))

    @staticmethod
    def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
        file = archive.extractfile(member)
        assert file is not None, member.name  # `names` lists regular files only
        return file.read()


@dataclass(frozen=True)
class _Found:
    """A file of a class: its split, class name, key, name in the source and size."""

    split: str
    label: str
    key: str
    path: str
    size: int


class Tree:
    """A class-per-folder tree. `train/` and `val/` (or, where there is none, `test/`) at the top become splits;
    otherwise all is for training but the share `holdout`, taken evenly from every class. A class is the topmost folder
    of its images, as for torchvision's ImageFolder; hidden files and folders are passed over."""

    def __init__(self, name: str, files: Files, holdout: float) -> None:
        self.name = name
        self._files = files
        self._holdout = holdout

    def listing(self) -> Listing:
        sizes = self._files.sizes()
        # (normalised parts, name in the source), in an order that does not depend on how the source lists its files
        found = sorted(
            (PurePosixPath(name).parts, name)
            for name in sizes
            if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES and not _is_hidden(name)
        )
        while len({parts[0] for parts, _ in found}) == 1 and any(len(parts) > 2 for parts, _ in found):
            if found[0][0][0].lower() in _TRAIN_NAMES:
                break
            found = [(parts[1:], name) for parts, name in found if len(parts) > 2]  # one folder around everything
        tops = {parts[0].lower() for parts, _ in found if len(parts) > 2}
        splits: dict[str, str] = {}
        if tops & set(_TRAIN_NAMES):
            held_out = [name for name in _VAL_NAMES if name in tops][:1]
            splits = dict.fromkeys(_TRAIN_NAMES, "train") | dict.fromkeys(held_out, "val")
        files = [file for parts, name in found if (file := _file(parts, name, sizes[name], splits)) is not None]
        if not any(file.split == "train" for file in files):
            raise LonghaulError(
                f"No training images in '{self.name}': it needs a folder for each class "
                f"(CLASS/*.jpg, or train/CLASS/*.jpg and val/CLASS/*.jpg)."
            )
        if not splits or not any(file.split == "val" for file in files):
            files = _hold_out(files, self._holdout)
        classes = sorted({file.label for file in files})
        index = {name: i for i, name in enumerate(classes)}
        return Listing(classes, [Item(f.split, index[f.label], f.key, f.path, f.size) for f in files])

    def read(self, items: list[Item]) -> Iterator[bytes | OSError]:
        return self._files.read([item.path for item in items])


def _file(parts: tuple[str, ...], name: str, size: int, splits: dict[str, str]) -> _Found | None:
    """A file, or None where it lies outside the classes; `splits` is empty for a plain tree."""
    if not splits:
        return _Found("train", parts[0], "/".join(parts), name, size) if len(parts) > 1 else None
    split = splits.get(parts[0].lower())
    return _Found(split, parts[1], "/".join(parts), name, size) if split is not None and len(parts) > 2 else None


def _is_hidden(name: str) -> bool:
    """Also what macOS adds to a zip: `__MACOSX/`, with a file `._x.jpg` for every x.jpg."""
    return any(part == "__MACOSX" or (part.startswith(".") and part != "..") for part in PurePosixPath(name).parts)


def _hold_out(files: list[_Found], share: float) -> list[_Found]:
    seen: dict[str, int] = {}
    result = []
    for file in files:
        index = seen.get(file.label, 0)
        seen[file.label] = index + 1
        held = int((index + 1) * share + 1e-9) > int(index * share + 1e-9)
        result.append(replace(file, split="val") if held else file)
    return result
