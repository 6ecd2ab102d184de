"""WebDataset shards: tars in which the members of a sample follow each other and share their name up to the first
dot (github.com/webdataset/webdataset, docs "The WebDataset Format")."""

import json
import re
import tarfile
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import NamedTuple

from configs import LonghaulError
from data_pipeline.sources.base import Item, Listing
from data_pipeline.sources.labels import Label, index_labels, splits_of_files
from data_pipeline.sources.splits import hold_out
from data_pipeline.sources.storage import Span, Store
from data_pipeline.sources.tarindex import members
from data_pipeline.sources.tree import IMAGE_SUFFIXES, clean_name

NAMES_FILES = ("classes.txt", "classnames.txt")
_LABEL_SUFFIXES = ("cls", "json")
_BRACES = re.compile(r"\{([^{}]*)\}")


class _Sample(NamedTuple):
    key: str
    label: Label
    offset: int
    size: int


class WebDataset:
    """Shards. A key is the shard's name without ".tar", and the sample's."""

    sequential = False

    def __init__(self, name: str, store: Store, shards: Sequence[str], names_file: str, holdout: float) -> None:
        self.name = name
        self._store = store
        self._shards = sorted(shards)
        self._names_file = names_file
        self._holdout = holdout

    def listing(self) -> Listing:
        where = self._store.locate("")
        splits = splits_of_files(where, self._shards)
        with ThreadPoolExecutor(self._store.num_readers) as pool:
            found = list(zip(splits, pool.map(self._scan, splits), strict=True))
        names = read_names(self._store, self._names_file) if self._names_file else None
        classes, labels = index_labels(where, [sample.label for _, samples in found for sample in samples], names)
        label_of = iter(labels)
        items = [
            Item(splits[shard], next(label_of), f"{shard[:-4]}/{sample.key}", f"{sample.offset}:{shard}", sample.size)
            for shard, samples in found
            for sample in samples
        ]
        if not any(item.split == "train" for item in items):
            raise LonghaulError(f"No training images in '{self.name}': its shards hold no member NAME.jpg or the like.")
        return Listing(classes, hold_out(items, self._holdout))

    def read(self, items: Sequence[Item]) -> Iterator[bytes | OSError]:
        places = [item.path.partition(":") for item in items]
        spans = [Span(shard, int(at), item.size) for (at, _, shard), item in zip(places, items, strict=True)]
        return self._store.read_spans(spans)

    def _scan(self, shard: str) -> list[_Sample]:
        """The samples of a shard that have an image, in its order."""
        title = self._store.locate(shard)
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        labels: dict[str, Label] = {}
        try:
            with self._store.scanner(shard) as (read, size):
                for member in members(read, 0, size):
                    key, suffix = _key(clean_name(member.name))
                    parts = samples.setdefault(key, {})
                    if suffix in parts:
                        raise LonghaulError(f"{title} holds {key}.{suffix} twice: write the shard again.")
                    parts[suffix] = member.offset, member.size
                    if suffix in _LABEL_SUFFIXES and not (suffix == "json" and "cls" in parts):
                        label = _label(suffix, read(member.offset, member.size))
                        if label is not None:
                            labels[key] = label
        except tarfile.ReadError as error:
            raise LonghaulError(f"{title} is not whole ({error}): fetch or make it again.") from None
        result = []
        for key, parts in samples.items():
            image = next((parts[suffix] for s in IMAGE_SUFFIXES if (suffix := s[1:]) in parts), None)
            if image is not None:
                if key not in labels:
                    raise LonghaulError(
                        f"{title}: {key} has no label: neither a number or name in {key}.cls, "
                        f"nor 'label' or 'cls' in {key}.json."
                    )
                result.append(_Sample(key, labels[key], *image))
        return result


def webdataset_signs(names: Collection[str]) -> list[str]:
    """The members' names that show that a tar is a shard: labels beside images that are not in folders of classes."""
    if not any(name.lower().endswith((".cls", ".json")) for name in names):
        return []
    there = {_key(clean_name(name)) for name in names}
    images = {key for key, suffix in there if f".{suffix}" in IMAGE_SUFFIXES}
    with_class = [key for key, suffix in there if suffix == "cls" and key in images]
    in_json = [key for key, suffix in there if suffix == "json" and key in images and "/" not in key]
    return sorted(with_class or in_json)


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern stands for: {000..146} counts with the digits as given, {a,b} lists."""
    pieces = _BRACES.split(pattern)
    choices = [_choices(piece) if i % 2 else [piece] for i, piece in enumerate(pieces)]
    return ["".join(parts) for parts in product(*choices)]


def read_names(store: Store, file: str) -> list[str]:
    """The lines of a file with the names of classes."""
    with store.open(file) as opened:
        text = opened.read().decode("utf-8", "replace")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _choices(braces: str) -> list[str]:
    span = re.fullmatch(r"(\d+)\.\.(\d+)", braces)
    if not span:
        return braces.split(",")
    first, last = int(span[1]), int(span[2])
    return [f"{number:0{len(span[1])}d}" for number in range(first, last + 1)]


def _key(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def _label(suffix: str, data: bytes) -> Label | None:
    text = data.decode("utf-8", "replace").strip()
    if suffix == "json":
        try:
            values = json.loads(text)
        except ValueError:
            return None
        found = values.get("label", values.get("cls")) if isinstance(values, dict) else None
        text = str(found).strip() if isinstance(found, int | str) and not isinstance(found, bool) else ""
    if not text:
        return None
    return int(text) if re.fullmatch(r"-?\d+", text) else text
