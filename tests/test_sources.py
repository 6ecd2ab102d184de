"""Sources: whatever the archive, every image comes out byte for byte with its class, and damage is named.

Archives are built small, as their makers lay them out (tests/layouts.py). `look` reads with a pickled copy of the
source, in random order and in parts, as the processes of an ingest do.
"""

import functools
import gzip
import http.server
import io
import multiprocessing
import os
import pickle
import random
import resource
import socket
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import fsspec
import numpy as np
import pyarrow as pa
import pytest
import s3fs
from hypothesis import given
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer
from PIL import Image

from configs import LonghaulError
from data_pipeline.sources import Source, open_source
from data_pipeline.sources.labels import index_labels, splits_of_files
from data_pipeline.sources.storage import ReadAhead
from data_pipeline.sources.webdataset import expand_braces
from tests.layouts import (
    LAYOUTS,
    SORTED_BY_HAND,
    TRAIN,
    VAL,
    WNIDS,
    Files,
    Seen,
    cifar,
    class_tars,
    devkit,
    ground_truth,
    image,
    kaggle,
    kaggle_solution,
    look,
    meta_mat,
    parquet,
    python2_pickle,
    read_items,
    shard,
    tar,
    write,
    write_parquet,
    zipped,
)

TREE: Files = {f"{split}/{label}/{i}.jpg": image(i) for split in ("train", "val") for label in "ab" for i in range(3)}
TREE_SEEN: Seen = {name: (*name.split("/")[:2], data) for name, data in TREE.items()}  # type: ignore[misc]
ILSVRC_SEEN: Seen = {name: (*name.split("/")[:2], data) for name, data in SORTED_BY_HAND.items()}  # type: ignore[misc]


def opened(path: Path | str, holdout: float = 0.0) -> Source:
    return open_source(str(path), holdout)


def of_folder(root: Path, files: Files, holdout: float = 0.0) -> Source:
    return opened(write(root, files), holdout)


def of_file(path: Path, data: bytes, holdout: float = 0.0) -> Source:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return opened(path, holdout)


def splits(seen: Seen) -> dict[str, int]:
    return {split: sum(s == split for s, _, _ in seen.values()) for split in ("train", "val")}


def read_all(source: Source) -> dict[str, bytes | OSError]:
    items = source.listing().items
    return dict(zip([item.key for item in items], source.read(items), strict=True))


def refuses(source: Callable[[], Source], told: str) -> None:
    """Opening or listing raises LonghaulError with a message that matches."""
    with pytest.raises(LonghaulError, match=told):
        source().listing()


# --- ILSVRC2012 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_ilsvrc2012_gives_what_the_tree_sorted_by_hand_gives(tmp_path: Path, layout: str) -> None:
    source = of_folder(tmp_path, LAYOUTS[layout])
    assert source.listing().classes == WNIDS
    assert look(source) == ILSVRC_SEEN


def test_items_stand_in_the_same_order_in_every_layout(tmp_path: Path) -> None:
    listed = [of_folder(tmp_path / name, files).listing().items for name, files in LAYOUTS.items()]
    assert {tuple((item.split, item.label, item.key, item.size) for item in items) for items in listed} == {
        tuple((i.split, i.label, i.key, i.size) for i in listed[0])
    }
    assert [item.key for item in listed[0]] == sorted(ILSVRC_SEEN)


def test_kaggles_zip_is_read_as_it_is(tmp_path: Path) -> None:
    assert look(of_file(tmp_path / "imagenet.zip", zipped(kaggle()))) == ILSVRC_SEEN


def test_the_training_tar_alone_has_its_classes_and_a_share_held_out(tmp_path: Path) -> None:
    seen = look(of_file(tmp_path / "ILSVRC2012_img_train.tar", tar(class_tars()), 0.25))
    assert {key: (label, data) for key, (_, label, data) in seen.items()} == {
        name: (name.split("/")[0], data) for name, data in TRAIN.items()
    }
    assert splits(seen) == {"train": 9, "val": 3}


BOTH = {f"train/{name}": data for name, data in TRAIN.items()} | {f"val/{name}": data for name, data in VAL.items()}


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (
            {},
            r"nothing that tells their classes: put ILSVRC2012_devkit_t12\.tar\.gz beside them \(or .*truth.* and meta",
        ),
        ({"meta.mat": meta_mat()}, r"\(or ILSVRC2012_validation_ground_truth\.txt, or"),
        ({"ILSVRC2012_validation_ground_truth.txt": ground_truth()}, r"\(or meta\.mat, or"),
        ({"ILSVRC2012_devkit_t12.tar.gz": tar({"x/readme.txt": b""}, "w:gz")}, "nothing that tells"),
        ({"ILSVRC2012_devkit_t12.tar.gz": devkit()[:-50]}, r"ILSVRC2012_devkit_t12\.tar\.gz is not whole"),
        ({"ILSVRC2012_validation_ground_truth.txt": b"1\n2\n", "meta.mat": meta_mat()}, "_00000003.JPEG has no line"),
        (
            {"ILSVRC2012_validation_ground_truth.txt": b"1\n4\n", "meta.mat": meta_mat()},
            "line 2 .* is '4', which is none",
        ),
        ({"ILSVRC2012_validation_ground_truth.txt": b"1\nx\n", "meta.mat": meta_mat()}, "line 2 .* is 'x'"),
        ({"ILSVRC2012_validation_ground_truth.txt": b"1\n", "meta.mat": meta_mat()[:300]}, r"meta\.mat cannot be read"),
        ({"LOC_val_solution.csv": b"a,b\n1,2\n"}, "has no columns ImageId and PredictionString"),
        ({"LOC_val_solution.csv": b"ImageId,PredictionString\nILSVRC2012_val_00000001,cat 1\n"}, "the class 'cat'"),
        ({"LOC_val_solution.csv": kaggle_solution()[:120]}, r"which is no WordNet id|has no line"),
    ],
)
def test_validation_images_that_cannot_be_labelled_are_refused_with_what_is_missing(
    tmp_path: Path, labels: Files, told: str
) -> None:
    refuses(lambda: of_folder(tmp_path, BOTH | labels), told)


def test_the_validation_tar_alone_is_refused(tmp_path: Path) -> None:
    refuses(lambda: of_file(tmp_path / "ILSVRC2012_img_val.tar", tar(VAL)), "nothing that tells their classes")
    refuses(lambda: of_folder(tmp_path / "x", {"ILSVRC2012_img_val.tar": tar(VAL)}), "nothing that tells their classes")


def test_a_cut_training_tar_is_refused_wherever_the_cut_is(tmp_path: Path) -> None:
    whole = tar(class_tars(), format=tarfile.USTAR_FORMAT)
    ends = len(whole.rstrip(b"\0"))
    for length in random.Random(0).sample(range(600, ends, 8), 25):
        refuses(lambda n=length: of_file(tmp_path / "x.tar", whole[:n]), r"x\.tar is not whole")  # type: ignore[misc]


def test_damage_in_an_inner_tar_names_both(tmp_path: Path) -> None:
    inner = class_tars()
    damaged = bytearray(inner["n01443537.tar"])
    damaged[damaged.index(b"n01443537_7.JPEG") + 150] ^= 0xFF  # the checksum of its header
    files = {"ILSVRC2012_img_train.tar": tar(inner | {"n01443537.tar": bytes(damaged)})}
    refuses(lambda: of_folder(tmp_path, files), r"n01443537\.tar in .*img_train\.tar is not whole \(the header at byte")
    cut = {"ILSVRC2012_img_train.tar": tar(inner | {"n01443537.tar": inner["n01443537.tar"][:1500]})}
    refuses(lambda: of_folder(tmp_path, cut), r"n01443537\.tar in .*img_train\.tar is not whole")


# --- trees and archives ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_is_read_compressed_or_not_and_leaves_nothing_behind(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    assert look(of_file(tmp_path / "x.tar", tar(TREE, mode))) == TREE_SEEN
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_other_processes_read_what_one_has_unpacked(tmp_path: Path, start: str) -> None:
    source = of_file(tmp_path / "x.tgz", tar(TREE, "w:gz"))
    items = source.listing().items
    with multiprocessing.get_context(start).Pool(1) as pool:
        assert pool.apply(read_items, (source, items)) == [TREE[item.key] for item in items]


def test_a_compressed_tar_that_is_cut_or_has_no_room_or_is_zstd_is_refused(tmp_path: Path) -> None:
    noise = {"a/1.jpg": random.Random(0).randbytes(2**20)}
    for mode in ("w:gz", "w:bz2", "w:xz"):
        data = tar(noise, mode)
        refuses(lambda d=data: of_file(tmp_path / "x.tgz", d[: len(d) // 2]), r"x\.tgz is not whole")  # type: ignore[misc]
    path = tmp_path / "x.tgz"
    path.write_bytes(tar(noise, "w:gz"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, limits[1]))
    try:
        refuses(lambda: opened(path), "cannot be unpacked into .* set TMPDIR to a folder with more room")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    refuses(lambda: of_file(tmp_path / "x.tar.zst", b"\x28\xb5\x2f\xfd" + bytes(600)), "zstd: unpack it with `unzstd`")


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0."), min_size=1, max_size=60)


@given(
    st.dictionaries(st.lists(NAMES, min_size=1, max_size=6).map("/".join), st.binary(max_size=1500), max_size=6),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_lie_where_tarfile_finds_them(contents: Files, form: int) -> None:
    files = {f"train/{name}.jpg": data for name, data in contents.items()} | {"train/a/b.jpg": b"x"}
    data = tar(files, format=form)
    with fsspec.open("memory://members/x.tar", "wb") as file:
        file.write(data)
    source = opened("memory://members/x.tar")
    seen = {key: value[2] for key, value in look(source).items()}
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        found = {m.name: archive.extractfile(m).read() for m in archive if m.name.count("/") > 1}  # type: ignore[union-attr]
    assert seen == found


def test_long_names_of_ustar_are_put_together(tmp_path: Path) -> None:
    name = f"train/{'c' * 90}/{'x' * 80}.jpg"
    assert list(look(of_file(tmp_path / "x.tar", tar({name: b"1"}, format=tarfile.USTAR_FORMAT)))) == [name]


def test_of_two_members_with_a_name_the_later_counts_and_a_hard_link_is_its_target(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for data in (b"old", b"new"):
            member = tarfile.TarInfo("train/a/1.jpg")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("./train/b/2.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "train/a/1.jpg"
        archive.addfile(link)
    assert look(opened(tmp_path / "x.tar")) == {
        "train/a/1.jpg": ("train", "a", b"new"),
        "train/b/2.jpg": ("train", "b", b"new"),
    }


def test_sizes_in_base_256_are_read(tmp_path: Path) -> None:
    data = bytearray(tar({"a/1.jpg": b"x" * 700}, format=tarfile.GNU_FORMAT))
    data[124:136] = b"\x80" + (700).to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    assert look(of_file(tmp_path / "x.tar", bytes(data))) == {"a/1.jpg": ("train", "a", b"x" * 700)}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_read_stored_or_deflated(tmp_path: Path, compression: int) -> None:
    assert look(of_file(tmp_path / "x.zip", zipped(TREE, compression))) == TREE_SEEN


def test_a_zip_written_to_a_pipe_or_with_something_before_it_is_read(tmp_path: Path) -> None:
    class Pipe(io.RawIOBase):
        """Cannot seek, so sizes follow the data."""

        written = b""

        def write(self, data) -> int:  # type: ignore[no-untyped-def,override]
            self.written += bytes(data)
            return len(data)

        def writable(self) -> bool:
            return True

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:  # type: ignore[arg-type]
        for name, data in TREE.items():
            archive.writestr(name, data)
    assert look(of_file(tmp_path / "x.zip", pipe.written)) == TREE_SEEN
    assert look(of_file(tmp_path / "x.zip", b"#!/bin/sh\n" + pipe.written)) == TREE_SEEN


def test_what_a_zip_cannot_give_back_is_an_error_in_its_place(tmp_path: Path) -> None:
    data = bytearray(zipped(TREE))
    name = b"train/a/0.jpg"
    data[data.index(name) + len(name) + 20] ^= 0xFF
    name = b"train/a/1.jpg"
    data[data.index(name) - 30 + 6] |= 1  # "encrypted"
    name = b"train/b/0.jpg"
    data[data.index(name) - 30] ^= 0xFF
    found = read_all(of_file(tmp_path / "x.zip", bytes(data)))
    errors = {key: str(value) for key, value in found.items() if isinstance(value, OSError)}
    assert set(errors) == {"train/a/0.jpg", "train/a/1.jpg", "train/b/0.jpg"}
    assert "encrypted" in errors["train/a/1.jpg"] and "header" in errors["train/b/0.jpg"]
    found = read_all(of_file(tmp_path / "y.zip", zipped(TREE, zipfile.ZIP_LZMA)))
    assert {str(value) for value in found.values()} == {
        "damaged in the zip: compression method 14 is not known here; unpack the zip"
    }


def test_a_tar_whose_last_member_is_a_zip_is_a_tar(tmp_path: Path) -> None:
    assert look(of_file(tmp_path / "x.tar", tar(TREE | {"x.zip": zipped({"a/1.jpg": b"1"})}))) == TREE_SEEN


def test_validation_images_that_lie_in_no_class_are_refused_and_unlabelled_test_images_passed_over(
    tmp_path: Path,
) -> None:
    train = {name: data for name, data in TREE.items() if name.startswith("train")}
    assert splits(look(of_folder(tmp_path, train | {"test/1.jpg": b"1"}, 0.4))) == {"train": 4, "val": 2}
    told = r"val/1\.jpg and its neighbours lie in no folder of a class: sort them into val/CLASS/"
    refuses(lambda: of_folder(tmp_path, train | {"val/1.jpg": b"1"}), told)


def test_a_cut_zip_is_refused(tmp_path: Path) -> None:
    refuses(lambda: of_file(tmp_path / "x.zip", zipped(TREE)[:-200]), r"x\.zip is not whole")


def test_what_is_cut_off_after_listing_is_an_error_in_its_place_and_a_lost_archive_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    source = of_file(path, tar(TREE))
    items = source.listing().items
    path.write_bytes(path.read_bytes()[: int(items[4].path.split(":")[1]) + 100])
    found = list(source.read(items))
    assert [isinstance(data, OSError) for data in found] == [i >= 4 for i in range(12)]
    assert "ends after 100 of its" in str(found[4])
    path.unlink()
    with pytest.raises(LonghaulError, match=r"x\.tar cannot be read \(No such file"):
        list(source.read(items))


def test_a_link_that_leads_nowhere_is_an_error_in_its_place_and_one_that_leads_up_is_not_followed(
    tmp_path: Path,
) -> None:
    root = write(tmp_path / "x", TREE)
    (root / "train/a/9.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (root / "train/a/loop").symlink_to(root)
    found = read_all(opened(root))
    assert isinstance(found.pop("train/a/9.jpg"), FileNotFoundError)
    assert found == TREE


def test_names_that_are_not_utf8_get_keys_that_are(tmp_path: Path) -> None:
    root = write(tmp_path / "x", TREE)
    (root / "train/a").joinpath(b"\xff.jpg".decode("utf-8", "surrogateescape")).write_bytes(b"1")
    assert look(opened(root))[r"train/a/\xff.jpg"] == ("train", "a", b"1")


@given(st.permutations(list(TREE)), st.integers(0, 2))
def test_the_listing_does_not_depend_on_the_order_in_an_archive(order: list[str], wrappers: int) -> None:
    files = {"wrapper/" * wrappers + name: TREE[name] for name in order}
    with fsspec.open("memory://order/x.tar", "wb") as file:
        file.write(tar(files))
    listing = opened("memory://order/x.tar").listing()
    assert [(i.key, i.split, i.label) for i in listing.items] == [
        (key, split, "ab".index(label)) for key, (split, label, _) in TREE_SEEN.items()
    ]


# --- WebDataset --------------------------------------------------------------------------------------------------


def test_shards_are_read_with_classes_in_numeric_order(tmp_path: Path) -> None:
    labels = [10, 9, 2, 10, 0]
    files = {"set-train-000.tar": shard(0, labels), "set-train-001.tar": shard(5, labels, "label")}
    files |= {"set-validation-0.tar": shard(10, labels, "cls"), "set-test-0.tar": shard(20, [77])}
    source = of_folder(tmp_path, files)
    assert source.listing().classes == ["0", "2", "9", "10"]
    seen = look(source)
    assert splits(seen) == {"train": 10, "val": 5}
    for first, name in ((0, "train-000"), (5, "train-001"), (10, "validation-0")):
        for i, label in enumerate(labels, start=first):
            split = "val" if first == 10 else "train"
            assert seen[f"set-{name}/{i:06d}"] == (split, str(label), image(i))


@pytest.mark.parametrize("names", ["classes.txt", "classnames.txt"])
def test_names_of_classes_beside_the_shards_are_used(tmp_path: Path, names: str) -> None:
    files = {"train/0.tar": shard(0, [0, 2]), "val/0.tar": shard(2, [1], "cls"), names: b"cat\ndog\n\nbird \n"}
    source = of_folder(tmp_path, files)
    assert source.listing().classes == ["cat", "dog", "bird"]
    assert {key: seen[:2] for key, seen in look(source).items()} == {
        "train/0/000000": ("train", "cat"),
        "train/0/000001": ("train", "bird"),
        "val/0/000002": ("val", "dog"),
    }
    write(tmp_path, {"train/0.tar": shard(0, [3])})
    refuses(lambda: opened(tmp_path), "the label 3, but names only 3 classes")


def test_labels_may_be_names_and_cls_counts_before_json(tmp_path: Path) -> None:
    files = tar(
        {
            "1.json": b'{"label": "no"}',
            "1.jpg": image(1),
            "1.cls": b"yes",
            "2.seg.png": b"mask",
            "2.cls": b"maybe",
            "2.PNG": b"png",
            "3.txt": b"no image",
        }
    )
    assert look(of_folder(tmp_path, {"a.tar": files})) == {
        "a/1": ("train", "yes", image(1)),
        "a/2": ("train", "maybe", b"png"),
    }


def test_a_pattern_of_shards_takes_those_and_a_missing_one_is_named(tmp_path: Path) -> None:
    write(tmp_path, {f"set-{i:06d}.tar": shard(i, [i % 2]) for i in range(8, 14)} | {"other.tar": b"no tar"})
    seen = look(opened(tmp_path / "set-{000008..000012}.tar", 0.5))
    assert list(seen) == [f"set-{i:06d}/{i:06d}" for i in range(8, 13)]
    assert splits(seen) == {"train": 3, "val": 2}
    refuses(lambda: opened(tmp_path / "set-{000008..000015}.tar"), r"2 of the 8 shards .* the first set-000014\.tar")
    assert len(look(opened(tmp_path / "set-000008.tar"))) == 1
    squeezed = gzip.compress(shard(0, [1]))
    refuses(lambda: of_file(tmp_path / "set.tar.gz", squeezed), "compressed WebDataset shard: unpack it to a tar")


def test_braces_are_expanded_as_a_shell_does() -> None:
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{x,y}-{1..2}") == ["x-1", "x-2", "y-1", "y-2"]
    assert expand_braces("plain") == ["plain"]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"a.tar": tar({"1.jpg": b"1", "1.json": b"{}"})}, r"a\.tar: 1 has no label"),
        ({"a.tar": tar({"1.jpg": b"1", "1.json": b'{"label": tru'})}, r"a\.tar: 1 has no label"),
        ({"a.tar": tar({"1.jpg": b"1"})}, r"a\.tar: 1 has no label"),
        ({"a.tar": tar({"1.jpg": b"1", "1.cls": b"3", "./1.jpg": b"2"})}, r"a\.tar holds 1\.jpg twice"),
        ({"a.tar": shard(0, [1, "cat"])}, "some images with numbers and others with names"),
        ({"a.tar": shard(0, [1, -1])}, "has the label -1"),
        ({"a.tar": tar({"1.cls": b"1"})}, "hold no member"),
        ({"a.tar": shard(0, [1])[:600]}, r"a\.tar is not whole"),
        ({"train-1.tar": shard(0, [1]), "extra.tar": shard(1, [1])}, r"train-1\.tar, and extra\.tar, whose name"),
        ({"val-1.tar": shard(0, [1])}, "holds no file for training"),
    ],
)
def test_shards_that_cannot_be_used_are_refused(tmp_path: Path, files: Files, told: str) -> None:
    refuses(lambda: of_folder(tmp_path, files), told)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"], ["train", "val"]),
        (["train_000.tar", "val000.tar"], ["train", "val"]),
        (["train/a.tar", "VAL/a.tar"], ["train", "val"]),
        (["train-0.tar", "val-0.tar", "test-0.tar"], ["train", "val", None]),
        (["constraints.tar", "validity.tar"], ["train", "train"]),
    ],
)
def test_splits_are_told_by_the_names_of_files(files: list[str], found: list[str | None]) -> None:
    assert [splits_of_files("x", files).get(file) for file in files] == found


@given(st.lists(st.integers(0, 300), min_size=1), st.randoms())
def test_numbers_without_names_are_classes_in_numeric_order(labels: list[int], rng: random.Random) -> None:
    classes, indexes = index_labels("x", labels, None)
    assert [int(name) for name in classes] == sorted(set(labels))
    assert [int(classes[i]) for i in indexes] == labels
    rng.shuffle(labels)
    assert index_labels("x", labels, None)[0] == classes


# --- Parquet -----------------------------------------------------------------------------------------------------

IMAGES: list[bytes | None] = [image(i) for i in range(10)]
LABELS = [1, 0, 2, 2, 1, 0, 0, 1, 2, 1]
PATHS = [f"n{i:04d}.JPEG" for i in range(10)]


def test_parquet_as_the_hub_lays_it_out_is_read(tmp_path: Path) -> None:
    names = ["tench", "goldfish", "shark"]
    files = {
        "README.md": b"",
        "data/train-00000-of-00002.parquet": parquet(IMAGES[:5], LABELS[:5], names, PATHS[:5]),
        "data/train-00001-of-00002.parquet": parquet(IMAGES[5:8], LABELS[5:8], names, PATHS[5:8]),
        "data/validation-00000-of-00001.parquet": parquet(IMAGES[8:], LABELS[8:], names, PATHS[8:]),
        "data/test-00000-of-00001.parquet": parquet([image(99)], [-1], names, ["x.JPEG"]),
    }
    for root in (write(tmp_path, files), tmp_path / "data"):
        source = opened(root)
        assert source.listing().classes == names
        assert look(source) == {
            PATHS[i]: ("val" if i >= 8 else "train", names[LABELS[i]], IMAGES[i]) for i in range(10)
        }


def test_a_plain_binary_column_with_labels_as_text_is_read_and_a_share_held_out(tmp_path: Path) -> None:
    table = pa.table({"jpg": pa.array(IMAGES, pa.large_binary()), "cls": ["cat", "dog"] * 5})
    seen = look(of_file(tmp_path / "x.parquet", write_parquet(table), 0.4))
    assert seen == {
        f"x.parquet:{i}": ("val" if i in (4, 5, 8, 9) else "train", ["cat", "dog"][i % 2], IMAGES[i]) for i in range(10)
    }


def test_paths_that_occur_twice_are_told_apart(tmp_path: Path) -> None:
    data = parquet(IMAGES[:4], [0, 0, 1, 1], None, ["a.jpg", "b.jpg", "a.jpg", None])
    assert list(look(of_file(tmp_path / "x.parquet", data))) == [
        "a.jpg",
        "a.jpg (x.parquet:2)",
        "b.jpg",
        "x.parquet:3",
    ]


def test_rows_without_bytes_and_damaged_row_groups_are_errors_in_their_places(tmp_path: Path) -> None:
    found = read_all(of_file(tmp_path / "x.parquet", parquet([IMAGES[0], None, IMAGES[2]], [0, 0, 1])))
    assert [isinstance(value, OSError) for value in found.values()] == [False, True, False]
    column = pa.array(IMAGES, pa.binary())
    data = write_parquet(pa.table({"image": column, "label": LABELS}), compression="zstd", use_dictionary=False)
    start = data.index(b"\x28\xb5\x2f\xfd")  # the first compressed page is the images of the first row group
    damaged = data[: start + 12] + bytes(200) + data[start + 212 :]
    found = read_all(of_file(tmp_path / "y.parquet", damaged))
    assert [isinstance(value, OSError) for value in found.values()] == [True] * 3 + [False] * 7
    assert "row group 0 is damaged" in str(found["y.parquet:0"])


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"x.parquet": parquet(IMAGES, LABELS)[:-300]}, r"x\.parquet is not whole"),
        ({"x.parquet": write_parquet(pa.table({"pixels": [1], "label": [0]}))}, "no column of encoded images.*pixels"),
        ({"x.parquet": write_parquet(pa.table({"image": [b"1"], "y": [0]}))}, "no column of labels"),
        ({"x.parquet": write_parquet(pa.table({"image": [b"1"], "label": [0.5]}))}, "other than integers or strings"),
        ({"x.parquet": parquet([b"1"], [5], ["a", "b"])}, "the label 5, but names only 2 classes"),
        ({"x.parquet": parquet([b"1"], [-1], ["a", "b"])}, "the label -1"),
        ({"x.parquet": parquet([], pa.array([], pa.int64()), ["a"])}, "No training images"),
        (
            {"train-0.parquet": parquet([b"1"], [0], ["a"]), "val-0.parquet": parquet([b"1"], [0], ["b"])},
            r"val-0\.parquet names other classes than train-0\.parquet",
        ),
    ],
)
def test_parquet_that_cannot_be_used_is_refused(tmp_path: Path, files: Files, told: str) -> None:
    refuses(lambda: of_folder(tmp_path, files), told)


# --- CIFAR -------------------------------------------------------------------------------------------------------

RELEASES = ["cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary"]


@pytest.mark.parametrize("kind", RELEASES)
@pytest.mark.parametrize("form", ["folder", "parent", "tar.gz"])
def test_every_release_of_cifar_is_read(tmp_path: Path, kind: str, form: str) -> None:
    files, held = cifar(kind)
    inside = {f"{kind}/{name}": data for name, data in files.items()}
    if form == "tar.gz":
        source = of_file(tmp_path / f"{kind}.tar.gz", tar(inside, "w:gz"))
    else:
        write(tmp_path, inside)
        source = opened(tmp_path / kind if form == "folder" else tmp_path)
    seen = look(source)
    assert {key: value[:2] for key, value in seen.items()} == {key: value[:2] for key, value in sorted(held.items())}
    for key, (_, _, data) in seen.items():
        with Image.open(io.BytesIO(data)) as shown:
            difference = np.abs(np.asarray(shown).astype(int) - held[key][2].transpose(1, 2, 0))
        assert difference.max() <= 5 and difference.mean() < 0.6  # of 255: what a JPEG of quality 100 loses


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_asks_for_more_than_arrays_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    files, _ = cifar("cifar-10-batches-py")
    sprung = tmp_path / "sprung"
    trap = python2_pickle({"data": Trap(sprung), "labels": [0]})
    pickle.loads(trap, encoding="bytes")
    sprung.rmdir()  # so it does spring
    refuses(
        lambda: of_folder(tmp_path / "x", files | {"data_batch_2": trap}), r"data_batch_2 asks to load posix\.mkdir"
    )
    assert not sprung.exists()


@pytest.mark.parametrize(
    ("kind", "change", "told"),
    [
        ("cifar-10-batches-bin", {"data_batch_3.bin": None}, r"has no data_batch_3\.bin: unpack"),
        ("cifar-10-batches-bin", {"data_batch_3.bin": bytes(3000)}, r"data_batch_3\.bin is damaged \(its 3,000 bytes"),
        ("cifar-10-batches-bin", {"test_batch.bin": b"\x0a" + bytes(3072)}, "labels do not fit 1 images of 10"),
        ("cifar-10-batches-py", {"test_batch": b"\x80\x02}q"}, r"test_batch is damaged"),
        ("cifar-10-batches-py", {"test_batch": python2_pickle([1])}, "holds no dictionary"),
        ("cifar-10-batches-py", {"test_batch": python2_pickle({"labels": [1]})}, "no 'data' of 3072 bytes"),
        ("cifar-10-batches-py", {"batches.meta": python2_pickle({"x": 1})}, "holds no list label_names"),
        (
            "cifar-100-python",
            {"test": python2_pickle({"data": np.zeros((2, 3072), np.uint8), "fine_labels": [1]})},
            "labels do not fit 2 images",
        ),
    ],
)
def test_a_damaged_release_is_refused(tmp_path: Path, kind: str, change: dict[str, bytes | None], told: str) -> None:
    files = {name: data for name, data in (cifar(kind)[0] | change).items() if data is not None}
    refuses(lambda: of_folder(tmp_path / kind, files), told)


# --- which source it is ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (TREE | {"extra.tar": shard(0, [1])}, r"tars \(extra\.tar\) and images \(train/a/0\.jpg\): give the path"),
        ({"x.parquet": parquet([b"1"], [0]), "a.tar": shard(0, [1])}, r"Parquet files \(x\.parquet\) and tars"),
        (LAYOUTS["tars and kit"] | {"a.tar": shard(0, [1])}, r"ImageNet's own files .* and tars \(a\.tar\)"),
        (
            {f"{kind}/{name}": d for kind in RELEASES[:2] for name, d in cifar(kind)[0].items()},
            "cifar-10-batches-bin/ and cifar-10-batches-py/",
        ),
        ({"cifar-10-python.tar.gz": b""}, r"no images but cifar-10-python\.tar\.gz: give the path of that"),
        ({"readme.txt": b""}, "No training images"),
    ],
)
def test_a_folder_that_might_be_several_sources_or_none_is_refused(tmp_path: Path, files: Files, told: str) -> None:
    refuses(lambda: of_folder(tmp_path, files), told)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("s4://bucket/x", "s4://bucket/x cannot be opened .*check the part before"),
        ("memory://nothing/here", r"There is no memory://nothing/here: check the address"),
        ("/nowhere/at/all", "There is no /nowhere/at/all"),
        ("/nowhere/{0..3}.tar", "There is no /nowhere"),
    ],
)
def test_what_is_nowhere_is_refused(name: str, told: str) -> None:
    refuses(lambda: opened(name), told)


# --- URLs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket; credentials and endpoint are in the environment."""
    values = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**values, "AWS_ENDPOINT_URL": s3_server}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3", endpoint_url=s3_server)
    name = f"bucket-{random.randrange(10**12)}"
    client.create_bucket(Bucket=name)
    yield f"s3://{name}"
    s3fs.S3FileSystem.clear_instance_cache()


def upload(url: str, files: Files) -> None:
    client = boto3.client("s3")
    bucket, _, folder = url.removeprefix("s3://").partition("/")
    for name, data in files.items():
        client.put_object(Bucket=bucket, Key=f"{folder}/{name}", Body=data)


PYTHON10, BINARY100 = cifar(RELEASES[0])[0], cifar(RELEASES[3])[0]
REMOTE: dict[str, tuple[Files, str]] = {
    "tree": (TREE, ""),
    "zip": ({"x.zip": zipped(TREE)}, "/x.zip"),
    "tar": ({"x.tar": tar(TREE)}, "/x.tar"),
    "tgz": ({"x.tgz": tar(TREE, "w:gz")}, "/x.tgz"),
    "ILSVRC2012": (LAYOUTS["tars and kit"], ""),
    "ILSVRC2012 train": ({"ILSVRC2012_img_train.tar": tar(class_tars())}, "/ILSVRC2012_img_train.tar"),
    "flat val": (LAYOUTS["class tars, flat val"], ""),
    "WebDataset": ({f"{s}-{i}.tar": shard(i * 3, [0, 1, 2]) for i, s in enumerate(["train", "val"])}, ""),
    "pattern": ({f"a-{i}.tar": shard(i * 3, [0, 1, 2]) for i in range(3)}, "/a-{0..1}.tar"),
    "Parquet": ({"data/train-0.parquet": parquet(IMAGES, LABELS, list("abc"), PATHS)}, ""),
    "CIFAR-10": ({"cifar-10-python.tar.gz": tar({f"{RELEASES[0]}/{n}": d for n, d in PYTHON10.items()}, "w:gz")},
                 "/cifar-10-python.tar.gz"),
    "CIFAR-100": (BINARY100, ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", REMOTE)
def test_a_source_in_an_object_store_is_what_it_is_on_disk(tmp_path: Path, bucket: str, kind: str) -> None:
    files, what = REMOTE[kind]
    upload(f"{bucket}/some/folder", files)
    there = opened(f"{bucket}/some/folder{what}")
    here = opened(f"{write(tmp_path / 'folder', files)}{what}")
    assert there.name == here.name
    assert there.listing() == here.listing()
    assert look(there) == look(here)
    assert look(opened(f"file://{tmp_path}/folder{what}")) == look(here)


def test_forked_and_spawned_processes_read_from_an_object_store(bucket: str) -> None:
    upload(f"{bucket}/x", {"x.tar": tar(TREE)})
    source = opened(f"{bucket}/x/x.tar")
    items = source.listing().items
    expected = [TREE[item.key] for item in items]
    assert list(source.read(items)) == expected
    for start in ("fork", "spawn"):
        with multiprocessing.get_context(start).Pool(1) as pool:
            assert pool.apply(read_items, (source, items)) == expected


def test_an_object_that_is_gone_is_an_error_in_its_place_and_a_lost_archive_ends_it(bucket: str) -> None:
    upload(f"{bucket}/tree", TREE)
    upload(f"{bucket}/x", {"x.tar": tar(TREE)})
    tree, archive = opened(f"{bucket}/tree"), opened(f"{bucket}/x/x.tar")
    items, members = tree.listing().items, archive.listing().items
    client, name = boto3.client("s3"), bucket.removeprefix("s3://")
    client.delete_object(Bucket=name, Key="tree/train/a/1.jpg")
    assert [isinstance(data, FileNotFoundError) for data in tree.read(items)] == [i == 1 for i in range(12)]
    client.delete_object(Bucket=name, Key="x/x.tar")
    with pytest.raises(LonghaulError, match=rf"There is no {bucket}/x/x\.tar"):
        list(archive.read(members))


def test_what_is_not_in_the_object_store_or_may_not_be_read_is_refused(bucket: str) -> None:
    refuses(lambda: opened(f"{bucket}/nothing.tar"), f"There is no {bucket}/nothing.tar: check the address")
    upload(f"{bucket}/x", {"x.tar": tar(TREE)[:3000]})
    refuses(lambda: opened(f"{bucket}/x/x.tar"), rf"{bucket}/x/x\.tar is not whole")


@pytest.mark.parametrize("kind", ["tree", "zip", "tar", "WebDataset", "Parquet", "CIFAR-100"])
def test_a_store_that_stops_answering_ends_the_reading(bucket: str, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    files, what = REMOTE[kind]
    upload(f"{bucket}/x", files)
    source = opened(f"{bucket}/x{what}")
    items = source.listing().items
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, but nobody listens
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(LonghaulError, match=rf"{bucket}/x.* cannot be read .*AWS_ENDPOINT_URL, then run the same"):
            list(source.read(items))


@given(st.binary(max_size=300), st.lists(st.tuples(st.integers(0, 320), st.integers(1, 40)), max_size=30))
def test_reading_ahead_gives_what_lies_there(data: bytes, requests: list[tuple[int, int]]) -> None:
    read = ReadAhead(lambda offset, size: data[offset : offset + size], 8, 64)
    assert [read(offset, size) for offset, size in requests] == [data[o : o + n] for o, n in requests]


def test_reading_ahead_fetches_little_where_requests_leap_and_much_where_they_follow() -> None:
    fetched: list[int] = []

    def fetch(offset: int, size: int) -> bytes:
        fetched.append(size)
        return bytes(size)

    read = ReadAhead(fetch, 8, 64)
    for offset in range(1000, 5000, 1000):
        read(offset, 4)
    assert fetched == [8] * 4
    for offset in range(4004, 4400, 4):
        read(offset, 4)
    assert fetched[4:] == [16, 32, *[64] * 6]


def test_empty_members_are_empty_in_an_object_store_too(bucket: str) -> None:
    files = {"train/a/1.jpg": b"", "train/a/2.jpg": b"2", "train/b/3.jpg": b""}
    upload(f"{bucket}/x", {"x.tar": tar(files)})
    assert {key: data for key, (_, _, data) in look(opened(f"{bucket}/x/x.tar")).items()} == files


def test_neighbours_are_fetched_together(bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    upload(f"{bucket}/x", {"x.tar": tar(TREE)})
    source = opened(f"{bucket}/x/x.tar")
    items = source.listing().items
    caplog.clear()
    with caplog.at_level("INFO", logger="werkzeug"):
        assert list(source.read(items[::-1])) == [TREE[item.key] for item in items[::-1]]
    assert sum("GET" in record.getMessage() for record in caplog.records) == 1


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """Python's own server, which sends whole files whatever range is asked for."""

    def log_message(self, *args: object) -> None:
        pass


def test_a_server_that_knows_no_ranges_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar(TREE))
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = opened(f"http://127.0.0.1:{server.server_port}/x.tar")
        items = source.listing().items
        with pytest.raises(LonghaulError, match=r"x\.tar does not send parts of files: copy the file here"):
            list(source.read(items[3:5]))
        server.shutdown()
