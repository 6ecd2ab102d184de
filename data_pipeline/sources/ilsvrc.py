"""ILSVRC2012 as it is distributed: the official tars and development kit, their unpacked folders, Kaggle's layout."""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence

from configs import LonghaulError
from data_pipeline.sources.files import Entry, Files, Located, Peeked
from data_pipeline.sources.splits import VAL_NAMES
from data_pipeline.sources.storage import Store
from data_pipeline.sources.tars import TarFiles
from data_pipeline.sources.tree import IMAGE_SUFFIXES, clean_name, is_hidden

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_GROUND_TRUTH, _META, _KAGGLE = "ILSVRC2012_validation_ground_truth.txt", "meta.mat", "LOC_val_solution.csv"
_DEVKIT = re.compile(r"ILSVRC2012_devkit_t12\.(tar\.gz|tgz|tar)")
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_TRAIN_IMAGE = re.compile(r"(n\d{8})_\d+\.JPEG")
_WNID = re.compile(r"n\d{8}")
_CLASS_TAR = re.compile(r"n\d{8}\.tar")
_SPECIAL = (".tar", ".tar.gz", ".tgz", _GROUND_TRUTH, _META, _KAGGLE)


def ilsvrc_signs(names: Iterable[str]) -> list[str]:
    """Those of the names that only an ILSVRC2012 set has, but for trees that need no more than their folders."""
    return [
        name
        for name in names
        if (base := _base(name)) in (TRAIN_TAR, VAL_TAR, _GROUND_TRUTH, _KAGGLE)
        or _DEVKIT.fullmatch(base)
        or _CLASS_TAR.fullmatch(base)
        or (_VAL_IMAGE.fullmatch(base) and not _wnid_folder(name))
    ]


class IlsvrcFiles:
    """The images of an ILSVRC2012 set as a class-per-folder tree, however they lie: train/WNID/*.JPEG and
    val/WNID/*.JPEG, the names that they have in trees unpacked and sorted by hand.

    Where a tar and what was unpacked from it are both there, the tar is read. The ids of the ground truth are mapped
    to WordNet ids through the leaves among the synsets of meta.mat (the development kit's readme.txt, section 2).
    """

    def __init__(self, files: Peeked, store: Store | None) -> None:
        """The images among `files`. Tars can be read where these are in a folder, `store`."""
        names = sorted((clean_name(name) for name in files.peek() if name.endswith(_SPECIAL)), reverse=True)
        self._special = {_base(name): name for name in names}
        self._store = store
        self._parts: dict[str, Files] = {"": files}
        class_tars = sorted(name for base, name in self._special.items() if _CLASS_TAR.fullmatch(base))
        if TRAIN_TAR in self._special:
            self._parts["train"] = self._open([self._special[TRAIN_TAR]])
        elif class_tars:
            self._parts["train"] = self._open(class_tars)
        if VAL_TAR in self._special:
            self._parts["val"] = self._open([self._special[VAL_TAR]])

    def locate(self, name: str) -> str:
        return self._parts[""].locate(name)

    def entries(self) -> dict[str, Entry]:
        """Raises LonghaulError where there are validation images, but nothing that tells their classes."""
        entries = self._parts[""].entries()
        there = {clean_name(name): entries[name] for name in sorted(entries) if not is_hidden(name)}
        return self._train(there) | self._val(there)

    def read(self, wanted: Sequence[Located]) -> Iterator[bytes | OSError]:
        start = 0
        for end in range(1, len(wanted) + 1):
            part = wanted[start].path.partition("|")[0]
            if end == len(wanted) or not wanted[end].path.startswith(f"{part}|"):
                run = [Entry(one.path.partition("|")[2], one.size) for one in wanted[start:end]]
                yield from self._parts[part].read(run)
                start = end

    def _train(self, there: dict[str, Entry]) -> dict[str, Entry]:
        return {
            f"train/{wnid}/{_base(name)}": entry
            for name, entry in self._entries_of("train", there).items()
            if (wnid := _wnid_of_training_image(name))
        }

    def _val(self, there: dict[str, Entry]) -> dict[str, Entry]:
        found = {name: entry for name, entry in self._entries_of("val", there).items() if _is_validation(name)}
        wnids = {_base(name): wnid for name in there if _is_validation(name) and (wnid := _wnid_folder(name))}
        if any(_base(name) not in wnids for name in found):
            wnids |= self._labels(there)
        unlabelled = next((name for name in found if _base(name) not in wnids), "")
        if unlabelled:
            raise LonghaulError(f"{self.locate(unlabelled)} has no line in the file of labels: fetch that again.")
        return {f"val/{wnids[_base(name)]}/{_base(name)}": entry for name, entry in found.items()}

    def _entries_of(self, split: str, there: dict[str, Entry]) -> dict[str, Entry]:
        """What may belong to a split: its tar, or everything that is there."""
        part = split if split in self._parts else ""
        entries = self._parts[part].entries() if part else there
        return {name: Entry(f"{part}|{entry.path}", entry.size) for name, entry in entries.items()}

    def _labels(self, there: dict[str, Entry]) -> dict[str, str]:
        """The WordNet id of each validation image, by its file's name, from whatever tells it."""
        special = self._special
        if _KAGGLE in special:
            return _kaggle_labels(self.locate(special[_KAGGLE]), self._contents(there[special[_KAGGLE]], _KAGGLE))
        found = {base: self._contents(there[special[base]], base) for base in (_GROUND_TRUTH, _META) if base in special}
        devkits = sorted(name for base, name in special.items() if _DEVKIT.fullmatch(base))
        if len(found) < 2 and devkits:
            kit = self._open(devkits[:1])
            inside = {_base(name): entry for name, entry in kit.entries().items()}
            wanted = {base: inside[base] for base in (_GROUND_TRUTH, _META) if base in inside}
            for base, data in zip(wanted, kit.read(list(wanted.values())), strict=True):
                found.setdefault(base, _bytes_of(data, kit.locate(base)))
        missing = [base for base in (_GROUND_TRUTH, _META) if base not in found]
        if missing:
            raise LonghaulError(
                f"{self.locate('')} has validation images, but nothing that tells their classes: put "
                f"ILSVRC2012_devkit_t12.tar.gz beside them (or {' and '.join(missing)}, or Kaggle's {_KAGGLE})."
            )
        return _devkit_labels(self.locate(""), found[_GROUND_TRUTH], found[_META])

    def _open(self, tars: list[str]) -> TarFiles:
        if self._store is None:
            raise LonghaulError(f"{self.locate('')} holds {tars[0]} inside another archive: unpack that.")
        return TarFiles(self._store, tars)

    def _contents(self, entry: Entry, name: str) -> bytes:
        (data,) = self._parts[""].read([entry])
        return _bytes_of(data, self.locate(name))


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _wnid_folder(name: str) -> str:
    """The folder of a file where that is a WordNet id, else nothing."""
    folder = _base(name.rpartition("/")[0])
    return folder if _WNID.fullmatch(folder) else ""


def _is_validation(name: str) -> bool:
    if not name.lower().endswith(IMAGE_SUFFIXES):
        return False
    sorted_by_hand = bool(_wnid_folder(name)) and any(part.lower() in VAL_NAMES for part in name.split("/")[:-2])
    return sorted_by_hand or bool(_VAL_IMAGE.fullmatch(_base(name)))


def _wnid_of_training_image(name: str) -> str:
    """The class of a training image by its folder, else by its own name; nothing for other files."""
    if not name.lower().endswith(IMAGE_SUFFIXES) or _is_validation(name):
        return ""
    own = _TRAIN_IMAGE.fullmatch(_base(name))
    return _wnid_folder(name) or (own[1] if own else "")


def _bytes_of(data: bytes | OSError, where: str) -> bytes:
    if isinstance(data, OSError):
        raise LonghaulError(f"{where} cannot be read ({data}): fetch it again.")
    return data


def _kaggle_labels(path: str, data: bytes) -> dict[str, str]:
    """LOC_val_solution.csv: an image's id, and boxes "WNID x y x y ..." that are all of one class."""
    rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig", "replace")))
    if not {"ImageId", "PredictionString"} <= set(rows.fieldnames or ()):
        raise LonghaulError(f"{path} has no columns ImageId and PredictionString: fetch it again.")
    labels = {f"{row['ImageId']}.JPEG": (row["PredictionString"] or "").partition(" ")[0] for row in rows}
    for image, wnid in labels.items():
        if not _WNID.fullmatch(wnid):
            raise LonghaulError(f"{path} gives {image} the class '{wnid}', which is no WordNet id: fetch it again.")
    return labels


def _devkit_labels(path: str, ground_truth: bytes, meta: bytes) -> dict[str, str]:
    """Line i of the ground truth is the ILSVRC2012_ID of validation image i, counted from 1."""
    wnids = _synsets(path, meta)
    labels = {}
    for number, line in enumerate(ground_truth.split(), start=1):
        if not line.isdigit() or int(line) not in wnids:
            raise LonghaulError(
                f"{path}: line {number} of {_GROUND_TRUTH} is '{line.decode(errors='replace')}', "
                f"which is none of the {len(wnids)} classes of {_META}: fetch both again."
            )
        labels[f"ILSVRC2012_val_{number:08d}.JPEG"] = wnids[int(line)]
    return labels


def _synsets(path: str, meta: bytes) -> dict[int, str]:
    """The WordNet id of each of the ids 1 to 1000: the synsets without children. Those above them have larger ids."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"].astype(int) == 0]
        return {int(leaf["ILSVRC2012_ID"]): str(leaf["WNID"]) for leaf in leaves}
    except Exception as error:  # scipy raises whatever a damaged file leads it into
        raise LonghaulError(f"{path}: {_META} cannot be read ({error}): fetch it again.") from None
