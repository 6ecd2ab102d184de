"""Classes of sources that label every image, and their splits by the names of files."""

import re
from collections.abc import Sequence

from configs import LonghaulError
from data_pipeline.sources.splits import TRAIN_NAMES, VAL_NAMES, choose_splits

Label = int | str
_SPLIT_NAME = re.compile(rf"(?<![a-z])({'|'.join(sorted(TRAIN_NAMES + VAL_NAMES, key=len, reverse=True))})(?![a-z])")


def splits_of_files(where: str, files: Sequence[str]) -> dict[str, str]:
    """The split of each file that belongs to one, by "train", "val" and the like in its name or, failing that, its
    folders; all are for training where no name says anything."""
    names = {file: _split_name(file) for file in files}
    if not any(names.values()):
        return dict.fromkeys(files, "train")
    silent = next((file for file, name in names.items() if not name), "")
    if silent:
        telling = next(file for file, name in names.items() if name)
        raise LonghaulError(
            f"{where} holds {telling}, and {silent}, whose name does not say to which split it belongs: rename it, "
            f"or move it away."
        )
    splits = choose_splits(set(names.values()))
    if not splits:
        raise LonghaulError(f"{where} holds no file for training, only such as {files[0]}: name one train-*.")
    return {file: splits[name] for file, name in names.items() if name in splits}


def _split_name(file: str) -> str:
    folder, _, base = file.lower().rpartition("/")
    found = _SPLIT_NAME.findall(base) or _SPLIT_NAME.findall(folder)
    return str(found[-1]) if found else ""


def index_labels(where: str, labels: Sequence[Label], names: list[str] | None) -> tuple[list[str], list[int]]:
    """The classes, and the index of each label in them.

    Integers are indexes into `names`; without names the classes are the integers that occur, in numeric order. Strings
    are names of classes themselves, in alphabetical order unless `names` has another.
    """
    distinct = set(labels)
    if len({type(label) for label in distinct}) > 1:
        raise LonghaulError(f"{where} labels some images with numbers and others with names: use one of them.")
    if any(isinstance(label, int) and label < 0 for label in distinct):
        raise LonghaulError(f"{where} has the label {min(distinct)}, which means that there is none: leave it out.")
    if names is None:
        ordered = sorted(distinct)
        index = {label: i for i, label in enumerate(ordered)}
        return [str(label) for label in ordered], [index[label] for label in labels]
    known: dict[Label, int] = {i: i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    unknown = next((label for label in labels if label not in known), None)
    if unknown is not None:
        raise LonghaulError(f"{where} has the label {unknown!r}, but names only {len(names)} classes: complete these.")
    return names, [known[label] for label in labels]
