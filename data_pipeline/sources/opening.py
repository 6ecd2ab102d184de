"""Which source a path or URL is."""

import zipfile
from collections.abc import Iterable
from pathlib import Path

from configs import LonghaulError
from data_pipeline.sources.base import Source
from data_pipeline.sources.cifar import Cifar, cifar_signs
from data_pipeline.sources.digits import Digits
from data_pipeline.sources.files import FolderFiles, Peeked
from data_pipeline.sources.ilsvrc import IlsvrcFiles, ilsvrc_signs
from data_pipeline.sources.parquet import Parquet
from data_pipeline.sources.remote import open_store
from data_pipeline.sources.spool import compression
from data_pipeline.sources.storage import Store
from data_pipeline.sources.tars import TarFiles, is_tar
from data_pipeline.sources.tree import IMAGE_SUFFIXES, Tree, is_hidden
from data_pipeline.sources.webdataset import NAMES_FILES, WebDataset, expand_braces, webdataset_signs
from data_pipeline.sources.zips import ZipFiles

_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".parquet")


def open_source(source: str, holdout: float) -> Source:
    """The source that `longhaul prepare SOURCE` means, by what it holds.

    Args:
        source: "digits"; the path or URL of a folder, or of a tar, zip or Parquet file; or a pattern of shards.
        holdout: the share of every class to hold out where the source has no split of its own for that, 0 to 1.

    Raises LonghaulError where there is no such source, where it is damaged, and where it might be several.
    """
    if source == "digits":
        return Digits()
    if "{" in source and not Path(source).exists():
        return _open_shards(source, holdout)
    store, file = open_store(source)
    name = _name(source)
    if not file:
        return _open_folder(name, store, holdout)
    if is_tar(store, file):
        tar = Peeked(TarFiles(store, [file]))
        if webdataset_signs(tar.peek()):
            if compression(store, file):
                raise LonghaulError(f"{store.locate(file)} is a compressed WebDataset shard: unpack it to a tar.")
            return WebDataset(name, store, [file], "", holdout)
        return _open_files(name, tar, holdout)
    with store.open(file) as opened:
        start = opened.read(4)
        opened.seek(0)
        # A zip is known by its end, which other files may have too: a tar whose last member is a zip.
        is_zip = start == b"PK\3\4" or zipfile.is_zipfile(opened)
    if start == b"PAR1":
        return Parquet(name, store, [file], holdout)
    if is_zip:
        return _open_files(name, Peeked(ZipFiles(store, file)), holdout)
    raise LonghaulError(
        f"{store.locate(file)} is neither a directory nor a zip or tar file of a class-per-folder tree, "
        f"nor another data set that is known here (docs/data.md)."
    )


def _open_shards(pattern: str, holdout: float) -> Source:
    shards = expand_braces(pattern)
    folder = pattern[: pattern.index("{")].rpartition("/")[0]
    store, _ = open_store(folder or ".")
    names = [shard.removeprefix(folder).lstrip("/") for shard in shards]
    there = store.find()
    missing = [name for name in names if name not in there]
    if missing:
        raise LonghaulError(
            f"{len(missing)} of the {len(names)} shards of {pattern} are not there, the first {missing[0]}: "
            f"fetch them, or change the pattern."
        )
    return WebDataset(_name(folder or "."), store, names, _names_file(there), holdout)


def _open_folder(name: str, store: Store, holdout: float) -> Source:
    files = Peeked(FolderFiles(store))
    names = [name for name in files.peek() if not is_hidden(name)]
    parquet = [name for name in names if name.endswith(".parquet")]
    official = ilsvrc_signs(names)
    # ILSVRC2012 comes with more tars than are read, of test images and other tasks.
    not_shards = {*official, *(name for name in names if name.rpartition("/")[2].startswith("ILSVRC2012_"))}
    shards = [name for name in names if name.endswith(".tar") and name not in not_shards]
    cifar = [folder for _, folder in cifar_signs(names)]
    # Images without labels of their own; a tree that ImageNet's own files lie in or beside is one with them.
    images = [name for name in names if "/" in name and name.lower().endswith(IMAGE_SUFFIXES) and not official]
    kinds = {
        "ImageNet's own files": official,
        "CIFAR": cifar,
        "Parquet files": parquet,
        "tars": shards,
        "images": images,
    }
    found = [f"{kind} ({min(signs) or '.'})" for kind, signs in kinds.items() if signs]
    if len(found) > 1:
        raise LonghaulError(f"{store.locate('')} holds {' and '.join(found)}: give the path of those that you mean.")
    if parquet:
        return Parquet(name, store, parquet, holdout)
    if shards:
        return WebDataset(name, store, shards, _names_file(names), holdout)
    archives = sorted(name for name in names if name.endswith(_ARCHIVES))
    if not found and archives:
        raise LonghaulError(f"{store.locate('')} holds no images but {archives[0]}: give the path of that.")
    return _open_files(name, files, holdout, store)


def _open_files(name: str, peeked: Peeked, holdout: float, store: Store | None = None) -> Source:
    """CIFAR, ImageNet, or else a tree, among files in a folder or archive."""
    names = [name for name in peeked.peek() if not is_hidden(name)]
    releases = cifar_signs(names)
    if len(releases) > 1:
        raise LonghaulError(
            f"{peeked.locate('')} holds {' and '.join(folder or '.' for _, folder in releases)}: "
            f"give the path of the one that you mean."
        )
    if releases:
        return Cifar(name, peeked, *releases[0])
    if ilsvrc_signs(names):
        return Tree(name, IlsvrcFiles(peeked, store), holdout)
    return Tree(name, peeked, holdout)


def _names_file(names: Iterable[str]) -> str:
    found = [name for name in names if name.rpartition("/")[2] in NAMES_FILES]
    return min(found, key=lambda name: (name.count("/"), name), default="")


def _name(source: str) -> str:
    name = Path(source).resolve().name if "://" not in source else source.rstrip("/").rpartition("/")[2]
    for suffix in sorted(_ARCHIVES, key=len, reverse=True):
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return name
