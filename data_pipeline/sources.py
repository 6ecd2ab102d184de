"""Where images come from: the embedded digits, and class-per-folder trees in a directory, zip or tar file."""

import io
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from PIL import Image

from configs import LonghaulError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
_TRAIN_NAMES = ("train", "training")
_VAL_NAMES = ("val", "test", "validation", "valid")


@dataclass(frozen=True)
class Item:
    """One image to ingest: its split, class name, key (unique in the source) and where `Source.read` finds it."""

    split: str
    label: str
    key: str
    path: str


class Source(Protocol):
    """A list of items in a fixed order, and their bytes."""

    name: str

    def items(self) -> list[Item]: ...

    def read(self, items: list[Item]) -> Iterator[bytes]: ...


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

    def read(self, items: list[Item]) -> Iterator[bytes]:
        for item in items:
            buffer = io.BytesIO()
            # 4:4:4 at quality 100: an 8x8 image is a single block, so nothing of note is lost.
            Image.fromarray(self._images[int(item.path)]).convert("RGB").save(
                buffer, "JPEG", quality=100, subsampling=0
            )
            yield buffer.getvalue()


class _Files(Protocol):
    def names(self) -> list[str]: ...

    def read(self, names: list[str]) -> Iterator[bytes]: ...


class _DirectoryFiles:
    def __init__(self, root: Path) -> None:
        self._root = root

    def names(self) -> list[str]:
        return [p.relative_to(self._root).as_posix() for p in self._root.rglob("*") if p.is_file()]

    def read(self, names: list[str]) -> Iterator[bytes]:
        return ((self._root / name).read_bytes() for name in names)


class _ZipFiles:
    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self) -> list[str]:
        with zipfile.ZipFile(self._path) as archive:
            return [info.filename for info in archive.infolist() if not info.is_dir()]

    def read(self, names: list[str]) -> Iterator[bytes]:
        with zipfile.ZipFile(self._path) as archive:
            for name in names:
                yield archive.read(name)


class _TarFiles:
    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self) -> list[str]:
        with tarfile.open(self._path) as archive:
            return [member.name for member in archive if member.isfile()]

    def read(self, names: list[str]) -> Iterator[bytes]:
        with tarfile.open(self._path) as archive:
            for name in names:
                member = archive.extractfile(name)
                assert member is not None, name  # `names` lists regular files only
                yield member.read()


class Tree:
    """A class-per-folder tree. `train/` and `val/` (or `test/`) at the top become splits; otherwise all is for
    training but the share `holdout`, taken evenly from every class."""

    def __init__(self, name: str, files: _Files, holdout: float) -> None:
        self.name = name
        self._files = files
        self._holdout = holdout

    def items(self) -> list[Item]:
        # (normalised parts, name in the source), in an order that does not depend on how the source lists its files
        found = sorted(
            (PurePosixPath(name).parts, name)
            for name in self._files.names()
            if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES
        )
        while found and len({parts[0] for parts, _ in found}) == 1 and all(len(parts) > 2 for parts, _ in found):
            if found[0][0][0].lower() in _TRAIN_NAMES:
                break
            found = [(parts[1:], name) for parts, name in found]  # one folder around everything
        tops = {parts[0].lower() for parts, _ in found if len(parts) > 2}
        has_splits = bool(tops & set(_TRAIN_NAMES))
        items = [item for parts, name in found if (item := self._item(parts, name, has_splits)) is not None]
        if not any(item.split == "train" for item in items):
            raise LonghaulError(
                f"No training images in '{self.name}': it needs a folder for each class "
                f"(CLASS/*.jpg, or train/CLASS/*.jpg and val/CLASS/*.jpg)."
            )
        if has_splits and any(item.split == "val" for item in items):
            return items
        return _hold_out(items, self._holdout)

    def _item(self, parts: tuple[str, ...], name: str, has_splits: bool) -> Item | None:
        if len(parts) < 2:
            return None
        top = parts[0].lower()
        if not has_splits:
            return Item("train", parts[-2], "/".join(parts), name)
        if len(parts) < 3 or top not in _TRAIN_NAMES + _VAL_NAMES:
            return None
        return Item("train" if top in _TRAIN_NAMES else "val", parts[-2], "/".join(parts), name)

    def read(self, items: list[Item]) -> Iterator[bytes]:
        return self._files.read([item.path for item in items])


def _hold_out(items: list[Item], share: float) -> list[Item]:
    seen: dict[str, int] = {}
    result = []
    for item in items:
        index = seen.get(item.label, 0)
        seen[item.label] = index + 1
        held = int((index + 1) * share + 1e-9) > int(index * share + 1e-9)
        result.append(Item("val" if held else item.split, item.label, item.key, item.path))
    return result
