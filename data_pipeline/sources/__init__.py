"""Where images come from."""

import tarfile
import zipfile
from pathlib import Path

from configs import LonghaulError
from data_pipeline.sources.base import Item, Listing, Source
from data_pipeline.sources.digits import Digits
from data_pipeline.sources.tree import DirectoryFiles, TarFiles, Tree, ZipFiles

__all__ = ["Item", "Listing", "Source", "open_source"]


def open_source(source: str, holdout: float) -> Source:
    """The source that `longhaul prepare SOURCE` means; raises LonghaulError where there is none."""
    if source == "digits":
        return Digits()
    path = Path(source)
    if path.is_dir():
        return Tree(path.resolve().name, DirectoryFiles(path), holdout)
    if path.is_file() and zipfile.is_zipfile(path):
        return Tree(path.stem, ZipFiles(path), holdout)
    if path.is_file() and tarfile.is_tarfile(path):
        return Tree(path.stem, TarFiles(path), holdout)
    if path.is_file():
        raise LonghaulError(f"{path} is neither a directory nor a zip or tar file of a class-per-folder tree.")
    raise LonghaulError(
        f"There is no {path}: give 'digits', or a directory, zip or tar file with a folder for each class."
    )
