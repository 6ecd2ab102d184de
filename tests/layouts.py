"""Archives as their makers lay them out, built small: what the tests of sources read."""

import csv
import io
import json
import pickle
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy.io import savemat

from data_pipeline.sources import Item, Source

Files = dict[str, bytes]
Seen = dict[str, tuple[str, str, bytes]]


def image(seed: int, size: int = 12) -> bytes:
    """A JPEG like no other."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def look(source: Source, seed: int = 0) -> Seen:
    """Everything in a source, (split, class, bytes) by key, read by a pickled copy, in random order and in parts."""
    listing = source.listing()
    items = random.Random(seed).sample(listing.items, len(listing.items))
    copy = pickle.loads(pickle.dumps(source))
    seen: Seen = {}
    for start in range(0, len(items), 7):
        part = items[start : start + 7]
        for item, data in zip(part, copy.read(part), strict=True):
            assert isinstance(data, bytes), (item.key, data)
            assert item.key not in seen
            seen[item.key] = item.split, listing.classes[item.label], data
    return dict(sorted(seen.items()))


def read_items(source: Source, items: list[Item]) -> list[bytes | OSError]:
    """For other processes."""
    return list(source.read(items))


def tar(files: Files, mode: str = "w", **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, **options) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def write(root: Path, files: Files) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def zipped(files: Files, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


# --- ILSVRC2012 --------------------------------------------------------------------------------------------------

WNIDS = ["n01440764", "n01443537", "n02102040"]
_IDS = {3: WNIDS[0], 1: WNIDS[1], 2: WNIDS[2]}  # the kit's ids do not follow the order of the WordNet ids
_TRUTH = [2, 3, 1, 3, 2]

TRAIN: Files = {f"{wnid}/{wnid}_{i * 7}.JPEG": image(10 * w + i) for w, wnid in enumerate(WNIDS) for i in range(4)}
VAL: Files = {f"ILSVRC2012_val_{i:08d}.JPEG": image(100 + i) for i in range(1, 6)}
VAL_SORTED: Files = {f"{_IDS[k]}/{name}": data for k, (name, data) in zip(_TRUTH, VAL.items(), strict=True)}
SORTED_BY_HAND: Files = {f"train/{n}": d for n, d in TRAIN.items()} | {f"val/{n}": d for n, d in VAL_SORTED.items()}


def class_tars() -> Files:
    return {f"{wnid}.tar": tar({n.split("/")[1]: d for n, d in TRAIN.items() if n.startswith(wnid)}) for wnid in WNIDS}


def ground_truth() -> bytes:
    return "".join(f"{k}\n" for k in _TRUTH).encode()


def meta_mat() -> bytes:
    """The synsets as the kit has them: a struct array [n, 1], first the leaves by id, then what is above them."""
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    synsets = np.empty((5, 1), dtype=[(field, object) for field in [*fields, "num_train_images"]])
    for row, (number, wnid) in enumerate([*sorted(_IDS.items()), (4, "n00001740"), (5, "n00015388")]):
        children = np.zeros((1, 0)) if number <= 3 else np.array([[1.0, 2.0]])
        below = float(children.size)
        synsets[row, 0] = (float(number), wnid, "a fish, a dog", "gloss", below, children, 1.0, 1300.0)
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets})
    return buffer.getvalue()


def devkit(mode: str = "w:gz") -> bytes:
    folder = "ILSVRC2012_devkit_t12"
    return tar(
        {
            f"{folder}/readme.txt": b"ILSVRC2012 development kit",
            f"{folder}/data/meta.mat": meta_mat(),
            f"{folder}/data/ILSVRC2012_validation_ground_truth.txt": ground_truth(),
        },
        mode,
    )


def kaggle_solution() -> bytes:
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["ImageId", "PredictionString"])
    for name in reversed(VAL_SORTED):
        wnid, base = name.split("/")
        rows.writerow([base.removesuffix(".JPEG"), f"{wnid} 1 2 3 4 {wnid} 5 6 7 8 "])
    return text.getvalue().encode()


def kaggle() -> Files:
    root = "ILSVRC/Data/CLS-LOC"
    return (
        {f"{root}/train/{name}": data for name, data in TRAIN.items()}
        | {f"{root}/val/{name}": data for name, data in VAL.items()}
        | {f"{root}/test/ILSVRC2012_test_{i:08d}.JPEG": image(200 + i) for i in range(1, 3)}
        | {"ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml": b"<annotation/>"}
        | {"LOC_val_solution.csv": kaggle_solution(), "LOC_synset_mapping.txt": b"n01440764 tench\n"}
    )


_TARS = {"ILSVRC2012_img_train.tar": tar(class_tars()), "ILSVRC2012_img_val.tar": tar(VAL)}
_LABELS = {"ILSVRC2012_validation_ground_truth.txt": ground_truth(), "meta.mat": meta_mat()}
LAYOUTS: dict[str, Files] = {
    "tars and kit": {**_TARS, "ILSVRC2012_devkit_t12.tar.gz": devkit()},
    "tars and more tars": {
        **_TARS,
        "ILSVRC2012_devkit_t12.tar.gz": devkit(),
        "ILSVRC2012_img_test_v10102019.tar": tar({"test/ILSVRC2012_test_00000001.JPEG": image(300)}),
        "ILSVRC2012_bbox_train_v2.tar.gz": tar({"n01440764/n01440764_0.xml": b""}, "w:gz"),
    },
    "tars and labels": {**_TARS, **_LABELS},
    "tars and unpacked kit": _TARS | {f"ILSVRC2012_devkit_t12/data/{name}": data for name, data in _LABELS.items()},
    "tars in folders": {f"x/{n}": d for n, d in _TARS.items()} | {"y/ILSVRC2012_devkit_t12.tar": devkit("w")},
    "tree, flat val": {f"train/{n}": d for n, d in TRAIN.items()} | {f"val/{n}": d for n, d in VAL.items()} | _LABELS,
    "class tars, flat val": {f"train/{n}": d for n, d in class_tars().items()}
    | {f"val/{n}": d for n, d in VAL.items()}
    | {"ILSVRC2012_devkit_t12.tar.gz": devkit()},
    "train tar, val sorted": {"ILSVRC2012_img_train.tar": _TARS["ILSVRC2012_img_train.tar"]}
    | {f"val/{name}": data for name, data in VAL_SORTED.items()},
    "tars and what was unpacked": {**_TARS, **SORTED_BY_HAND},
    "Kaggle": kaggle(),
    "sorted by hand": SORTED_BY_HAND,
}

# --- WebDataset --------------------------------------------------------------------------------------------------


def shard(first: int, labels: list[Any], kind: str = "cls") -> bytes:
    """A shard with a sample for each label."""
    files: Files = {}
    for i, label in enumerate(labels, start=first):
        if kind == "cls":
            files |= {f"{i:06d}.jpg": image(i), f"{i:06d}.cls": str(label).encode()}
        else:
            files |= {f"{i:06d}.json": json.dumps({kind: label, "id": i}).encode(), f"{i:06d}.jpeg": image(i)}
    return tar(files)


# --- Parquet -----------------------------------------------------------------------------------------------------


def parquet(
    images: list[bytes | None], labels: list[Any], names: list[str] | None = None, paths: list[Any] | None = None
) -> bytes:
    """As `datasets` writes it, in row groups of three."""
    column = pa.array(
        [{"bytes": data, "path": paths[i] if paths else None} for i, data in enumerate(images)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({"image": column, "label": pa.array(labels)})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    return write_parquet(table)


def write_parquet(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=3, **options)
    return buffer.getvalue()


# --- CIFAR -------------------------------------------------------------------------------------------------------


class _Python2Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
    """Writes what Python 2 did with protocol 2, as CIFAR's Python version was: byte strings, whatever they mean."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def _save_string(self, value: str | bytes) -> None:
        data = value.encode() if isinstance(value, str) else value
        short = len(data) < 256
        self.write((b"U" if short else b"T") + len(data).to_bytes(1 if short else 4, "little") + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = _save_string


def python2_pickle(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


NAMES10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
NAMES100 = [f"kind_{i:02d}" for i in range(100)]


def smooth(seed: int) -> np.ndarray:
    """uint8 [3, 32, 32], with the correlation of neighbours that photographs have."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
    return np.asarray(small).transpose(2, 0, 1)


def cifar(kind: str, per_batch: int = 4) -> tuple[Files, dict[str, tuple[str, str, np.ndarray]]]:
    """The files of a release, and (split, class, pixels) by key of what is in them."""
    ten = kind.startswith("cifar-10-")
    names = NAMES10 if ten else NAMES100
    batches = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if ten else ["train", "test"]
    binary = not kind.endswith(("py", "python"))
    files: Files = {}
    held: dict[str, tuple[str, str, np.ndarray]] = {}
    for b, batch in enumerate(batches):
        labels = [(b * per_batch + i) * 7 % len(names) for i in range(per_batch)]
        pixels = np.stack([smooth(b * per_batch + i) for i in range(per_batch)])
        split = "val" if batch.startswith("test") else "train"
        held |= {f"{batch}/{i:05d}": (split, names[label], pixels[i]) for i, label in enumerate(labels)}
        if binary:
            heads = [bytes([label]) if ten else bytes([label // 5, label]) for label in labels]
            files[f"{batch}.bin"] = b"".join(h + p.tobytes() for h, p in zip(heads, pixels, strict=True))
        else:
            values: dict[str, Any] = {"data": pixels.reshape(per_batch, -1), "batch_label": batch}
            values |= {"labels": labels} if ten else {"fine_labels": labels, "coarse_labels": [i // 5 for i in labels]}
            files[batch] = python2_pickle(values)
    lists: dict[str, Callable[[], bytes]] = {
        "cifar-10-batches-py": lambda: python2_pickle({"label_names": names, "num_vis": 3072}),
        "cifar-100-python": lambda: python2_pickle({"fine_label_names": names, "coarse_label_names": ["x"]}),
        "cifar-10-batches-bin": lambda: "\n".join([*names, ""]).encode(),
        "cifar-100-binary": lambda: "\n".join([*names, ""]).encode(),
    }
    meta = {
        "cifar-10-batches-py": "batches.meta",
        "cifar-100-python": "meta",
        "cifar-10-batches-bin": "batches.meta.txt",
        "cifar-100-binary": "fine_label_names.txt",
    }
    return files | {meta[kind]: lists[kind]()}, held
