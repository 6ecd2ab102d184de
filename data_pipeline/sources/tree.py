"""Class-per-folder trees."""

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from configs import LonghaulError
from data_pipeline.sources.base import Item, Listing
from data_pipeline.sources.files import Entry, Files
from data_pipeline.sources.splits import TRAIN_NAMES, VAL_NAMES, choose_splits, hold_out

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


class _Found(NamedTuple):
    """An image of a class. `key` is its name from the top of the tree."""

    split: str
    label: str
    key: str
    entry: Entry


class Tree:
    """A class-per-folder tree. `train/` and `val/` (or, where there is none, `test/`) at the top become splits;
    otherwise all is for training but the share `holdout`, taken evenly from every class. A class is the topmost folder
    of its images, as for torchvision's ImageFolder; hidden files and folders are passed over."""

    sequential = False

    def __init__(self, name: str, files: Files, holdout: float) -> None:
        self.name = name
        self._files = files
        self._holdout = holdout

    def listing(self) -> Listing:
        images = {
            clean_name(name): entry
            for name, entry in self._files.entries().items()
            if name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(name)
        }
        depth = _wrappers(images)
        splits = choose_splits({part.lower() for part in _folders(images, depth, 1)})
        found = [
            image
            # By parts, as people sort folders, in an order that does not depend on how the source lists its files.
            for name in sorted(images, key=lambda name: name.replace("/", "\0"))
            if (image := _image(name.split("/", depth)[-1], images[name], splits)) is not None
        ]
        if not any(image.split == "train" for image in found):
            raise LonghaulError(
                f"No training images in '{self.name}': it needs a folder for each class "
                f"(CLASS/*.jpg, or train/CLASS/*.jpg and val/CLASS/*.jpg)."
            )
        if splits and not any(image.split == "val" for image in found):
            self._refuse_unlabelled(images, depth)
        classes = sorted({image.label for image in found})
        index = {name: i for i, name in enumerate(classes)}
        items = [Item(f.split, index[f.label], f.key, f.entry.path, f.entry.size) for f in found]
        return Listing(classes, hold_out(items, self._holdout))

    def _refuse_unlabelled(self, images: dict[str, Entry], depth: int) -> None:
        for name in images:
            top, _, rest = name.split("/", depth)[-1].partition("/")
            # Test sets are published without labels, so a folder of those is passed over.
            if top.lower() in VAL_NAMES[:-1] and rest and "/" not in rest:
                raise LonghaulError(
                    f"{self._files.locate(name)} and its neighbours lie in no folder of a class: sort them into "
                    f"{top}/CLASS/, or move {top}/ away."
                )

    def read(self, items: Sequence[Item]) -> Iterator[bytes | OSError]:
        return self._files.read(items)


def clean_name(name: str) -> str:
    """A file's name as it is written in a key: valid Unicode, without "./" and "//"."""
    if not name.isascii():
        name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return name if "./" not in name and "//" not in name else PurePosixPath(name).as_posix().lstrip("/")


def is_hidden(name: str) -> bool:
    """Also what macOS adds to an archive: `__MACOSX/`, with a file `._x.jpg` for every x.jpg."""
    if not name.startswith((".", "__MACOSX/")) and "/." not in name and "/__MACOSX/" not in name:
        return False
    return any(part == "__MACOSX" or (part.startswith(".") and part != "..") for part in PurePosixPath(name).parts)


def _folders(names: dict[str, Entry], depth: int, below: int) -> set[str]:
    """The folders at a depth under which there are images at least `below` folders further down."""
    return {parts[depth] for name in names if len(parts := name.split("/", depth + below + 1)) > depth + below + 1}


def _wrappers(names: dict[str, Entry]) -> int:
    """How many folders stand around everything, one in another."""
    depth = 0
    while len(tops := _folders(names, depth, 0)) == 1 and _folders(names, depth, 1):
        if tops.pop().lower() in TRAIN_NAMES:
            break
        depth += 1
    return depth


def _image(name: str, entry: Entry, splits: dict[str, str]) -> _Found | None:
    """An image, or None where it lies outside the classes; `splits` is empty for a plain tree."""
    if not splits:
        return _Found("train", name.partition("/")[0], name, entry) if "/" in name else None
    top, _, rest = name.partition("/")
    label, slash, _ = rest.partition("/")
    return _Found(splits[top.lower()], label, name, entry) if slash and top.lower() in splits else None
