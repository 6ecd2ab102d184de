"""Where images come from: the embedded digits, and class-per-folder trees in a directory, zip or tar file."""

import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from PIL import Image

from configs import LonghaulError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
_TRAIN_NAMES = ("train", "training")
_VAL_NAMES = ("val", "validation", "valid", "test")  # the first that is there


@dataclass(frozen=True)
class Item:
    """One image to ingest: its split, class name, key (unique in the source) and where `Source.read` finds it."""

    split: str
    label: str
    key: str
    path: str


class Source(Protocol):
    """A list of items in a fixed order, and their bytes; an item that cannot be read gives the error in their place."""

    name: str

    def items(self) -> list[Item]: ...

    def read(self, items: list[Item]) -> Iterator[bytes | OSError]: ...


def open_source(source: str, holdout: float) -> Source:
    """The source that `longhaul prepare SOURCE` means; raises LonghaulError where there is none."""
    if source == "digits":
        return Digits()
    path = Path(source)
    if path.is_dir():
        return Tree(path.resolve().name, _DirectoryFiles(path), holdout)
    if path.is_file() and zipfile.is_zipfile(path):
        return Tree(path.stem, _ZipFiles(path), holdout)
    if path.is_file() and tarfile.is_tarfile(path):
        return Tree(path.stem, _TarFiles(path), holdout)
    if path.is_file():
        raise LonghaulError(f"{path} is neither a directory nor a zip or tar file of a class-per-folder tree.")
    raise LonghaulError(
        f"There is no {path}: give 'digits', or a directory, zip or tar file with a folder for each class."
    )


class Digits:
    """scikit-learn's digits: 1,797 real 8x8 grey scans (Alpaydin & Kaynak 1998), every fifth of a class held out."""

    name = "digits"

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self._images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        self._labels = digits.target

    def items(self) -> list[Item]:
        seen = np.zeros(10, int)
        items = []
        for index, label in enumerate(self._labels):
            split = "val" if seen[label] % 5 == 4 else "train"
            seen[label] += 1
            items.append(Item(split, str(label), f"{split}/{label}/{index:04d}.jpg", str(index)))
        return items

    def read(self, items: list[Item]) -> Iterator[bytes | OSError]:
        for item in items:
            buffer = io.BytesIO()
            # 4:4:4 at quality 100: an 8x8 image is a single block, so nothing of note is lost.
            Image.fromarray(self._images[int(item.path)]).convert("RGB").save(
                buffer, "JPEG", quality=100, subsampling=0
            )
            yield buffer.getvalue()


class _Files(Protocol):
    def names(self) -> list[str]: ...

    def read(self, names: list[str]) -> Iterator[bytes | OSError]: ...


def _attempt(read: Callable[[], bytes]) -> bytes | OSError:
    try:
        return read()
    # RuntimeError: an encrypted file in a zip, or a compression that Python does not know
    except (OSError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile, tarfile.TarError) as error:
        return OSError(str(error))


class _DirectoryFiles:
    def __init__(self, root: Path) -> None:
        self._root = root

    def names(self) -> list[str]:
        # Links to folders are followed: subsets of ImageNet are often made of them.
        paths = (Path(folder, file) for folder, _, files in os.walk(self._root, followlinks=True) for file in files)
        return [path.relative_to(self._root).as_posix() for path in paths if path.is_file()]

    def read(self, names: list[str]) -> Iterator[bytes | OSError]:
        return (_attempt((self._root / name).read_bytes) for name in names)


class _ZipFiles:
    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self) -> list[str]:
        with zipfile.ZipFile(self._path) as archive:
            return [info.filename for info in archive.infolist() if not info.is_dir()]

    def read(self, names: list[str]) -> Iterator[bytes | OSError]:
        with zipfile.ZipFile(self._path) as archive:
            for name in names:
                yield _attempt(partial(archive.read, name))


class _TarFiles:
    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self) -> list[str]:
        try:
            with tarfile.open(self._path) as archive:
                names = [member.name for member in archive if member.isfile()]
                # tarfile takes a header that is damaged or cut short for the end, which is a block of zeros.
                assert archive.fileobj is not None
                archive.fileobj.seek(archive.offset)
                if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("its end is missing")
                return names
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


class Tree:
    """A class-per-folder tree. `train/` and `val/` (or, where there is none, `test/`) at the top become splits;
    otherwise all is for training but the share `holdout`, taken evenly from every class. A class is the topmost folder
    of its images, as for torchvision's ImageFolder; hidden files and folders are passed over."""

    def __init__(self, name: str, files: _Files, holdout: float) -> None:
        self.name = name
        self._files = files
        self._holdout = holdout

    def items(self) -> list[Item]:
        # (normalised parts, name in the source), in an order that does not depend on how the source lists its files
        found = sorted(
            (PurePosixPath(name).parts, name)
            for name in self._files.names()
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
        items = [item for parts, name in found if (item := _item(parts, name, splits)) is not None]
        if not any(item.split == "train" for item in items):
            raise LonghaulError(
                f"No training images in '{self.name}': it needs a folder for each class "
                f"(CLASS/*.jpg, or train/CLASS/*.jpg and val/CLASS/*.jpg)."
            )
        if splits and any(item.split == "val" for item in items):
            return items
        return _hold_out(items, self._holdout)

    def read(self, items: list[Item]) -> Iterator[bytes | OSError]:
        return self._files.read([item.path for item in items])


def _item(parts: tuple[str, ...], name: str, splits: dict[str, str]) -> Item | None:
    """The item of a file, or None for one that lies outside the classes; `splits` is empty for a plain tree."""
    if not splits:
        return Item("train", parts[0], "/".join(parts), name) if len(parts) > 1 else None
    split = splits.get(parts[0].lower())
    return Item(split, parts[1], "/".join(parts), name) if split is not None and len(parts) > 2 else None


def _is_hidden(name: str) -> bool:
    """Also what macOS adds to a zip: `__MACOSX/`, with a file `._x.jpg` for every x.jpg."""
    return any(part == "__MACOSX" or (part.startswith(".") and part != "..") for part in PurePosixPath(name).parts)


def _hold_out(items: list[Item], share: float) -> list[Item]:
    seen: dict[str, int] = {}
    result = []
    for item in items:
        index = seen.get(item.label, 0)
        seen[item.label] = index + 1
        held = int((index + 1) * share + 1e-9) > int(index * share + 1e-9)
        result.append(Item("val" if held else item.split, item.label, item.key, item.path))
    return result
