"""`longhaul data check`: is a data set what was ingested, and do its images decode? Names shard and row."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs import LonghaulError
from data_pipeline.findings import Finding
from data_pipeline.pipeline import decoded_shapes
from data_pipeline.shards import Manifest, Shard
from data_pipeline.split import Split

_NAMED = 10  # of what is wrong, so many are named and the others counted
_BATCH = 64

Progress = Callable[[str, int, int], None]


def check_data(directory: Path, decode: float, threads: int, progress: Progress = lambda *_: None) -> list[Finding]:
    """Check a data set.

    Args:
        decode: share of the JPEGs to decode, evenly spread over each split; 0 for none.
        threads: to hash and decode with.
        progress: called with (what, done, total).

    Returns:
        A finding for each check. Raises LonghaulError where there is no data set.
    """
    manifest = Manifest.read(directory)
    findings = [_check_files(directory, manifest, threads, progress)]
    keys: dict[str, NDArray[np.int64]] = {}
    for name in manifest.splits:
        try:
            split = Split(directory, name)
        except LonghaulError as error:
            findings.append(Finding(f"{name}: index and shards can be read", False, str(error)))
            continue
        keys[name] = _image_keys(split)
        findings += [
            _check_index(split, name),
            _check_images(split, name, progress),
            *(
                [_check_decoding(split, name, decode, threads, progress)]
                if decode and manifest.encoding == "jpeg"
                else []
            ),
            _check_balance(split, name),
        ]
    findings.append(_check_duplicates(keys))
    return findings


def _check_files(directory: Path, manifest: Manifest, threads: int, progress: Progress) -> Finding:
    files = [file for files in manifest.splits.values() for file in files] + list(manifest.indexes.values())
    wrong = []
    with ThreadPoolExecutor(threads) as pool:
        verdicts = pool.map(lambda file: _file_problem(directory / file.file, file), files)
        for done, (file, problem) in enumerate(zip(files, verdicts, strict=True), start=1):
            if problem:
                wrong.append(f"{file.file} {problem}")
            progress("files", done, len(files))
    total = sum(file.bytes for file in files)
    return _finding("every file has its size and SHA-256", wrong, f"{len(files):,} files, {total / 2**30:,.2f} GiB")


def _file_problem(path: Path, file: Shard) -> str | None:
    try:
        if path.stat().st_size != file.bytes:
            return f"has {path.stat().st_size:,} bytes instead of {file.bytes:,}"
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if digest == file.sha256 else "does not have the bytes that were written"


def _check_index(split: Split, name: str) -> Finding:
    """The index against the shards it was made from, and against what labels and sizes can be."""
    wrong = [split.where(sample) for sample in split.unlike_index()]
    known = len(split.manifest.classes)
    wrong += [f"{split.where(int(i))}: label {split.labels[i]}" for i in np.flatnonzero(split.labels >= known)]
    return _finding(f"{name}: the index says what the shards say", wrong, f"{len(split):,} images")


def _check_images(split: Split, name: str, progress: Progress) -> Finding:
    wrong: list[str] = []
    for ids, images in _batches(split, 1.0, f"{name} checksums", progress):
        wrong += [split.where(int(ids[place])) for place in split.damaged(ids, images)]
    return _finding(f"{name}: every image has the bytes that were written", wrong, f"{len(split):,} images")


def _check_decoding(split: Split, name: str, share: float, threads: int, progress: Progress) -> Finding:
    wrong: list[str] = []
    count = 0
    for ids, images in _batches(split, share, f"{name} decoding", progress):
        count += len(ids)
        shapes = decoded_shapes(images, threads)
        for sample, shape, size in zip(ids.tolist(), shapes, split.sizes[ids].tolist(), strict=True):
            if shape is None:
                wrong.append(f"{split.where(sample)} does not decode")
            elif list(shape[:2]) != size:
                wrong.append(f"{split.where(sample)} is {shape[1]}x{shape[0]}, the index says {size[1]}x{size[0]}")
    return _finding(f"{name}: images decode to the size in the index", wrong, f"{count:,} of {len(split):,} images")


def _check_balance(split: Split, name: str) -> Finding:
    """A class that cannot be learned is wrong; one that is not held out is only counted."""
    known = len(split.manifest.classes)
    counts = np.bincount(split.labels[split.labels < known], minlength=known)
    empty = [f"class {split.manifest.classes[i]} has no image" for i in np.flatnonzero(counts == 0)]
    spread = f"{counts.min():,} to {counts.max():,} images a class (median {int(np.median(counts)):,})"
    if name == "train":
        return _finding("train: every class has images", empty, spread)
    return Finding(f"{name}: class balance", True, f"{spread}, {len(empty)} of {len(counts):,} classes without")


def _image_keys(split: Split) -> NDArray[np.int64]:
    """For each image a number that two different ones hardly share: checksum, height and width."""
    sizes = split.sizes.astype(np.int64)
    return (split.crcs.astype(np.int64) << 31) ^ (sizes[:, 0] << 15) ^ sizes[:, 1]


def _check_duplicates(keys: dict[str, NDArray[np.int64]]) -> Finding:
    """For information: ImageNet itself has some."""
    repeated = [f"{len(k) - len(np.unique(k)):,} in {name}" for name, k in keys.items()]
    if {"train", "val"} <= keys.keys():
        repeated.append(f"{len(np.intersect1d(keys['train'], keys['val'])):,} in both train and val")
    return Finding("images that occur more than once", True, ", ".join(repeated))


def _batches(
    split: Split, share: float, what: str, progress: Progress
) -> Iterator[tuple[NDArray[np.int64], list[NDArray[np.uint8]]]]:
    count = max(1, round(share * len(split)))
    ids = np.unique(np.linspace(0, len(split) - 1, count).round().astype(np.int64))
    for first in range(0, len(ids), _BATCH):
        part = ids[first : first + _BATCH]
        yield part, split.images(part)
        progress(what, first + len(part), len(ids))


def _finding(what: str, wrong: list[str], figures: str) -> Finding:
    if not wrong:
        return Finding(what, True, figures)
    more = f" and {len(wrong) - _NAMED:,} more" if len(wrong) > _NAMED else ""
    return Finding(what, False, "; ".join(wrong[:_NAMED]) + more)
