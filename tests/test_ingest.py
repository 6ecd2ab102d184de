"""`longhaul prepare`: the same bytes whoever writes them and whatever happens meanwhile, and every bad image named."""

import hashlib
import io
import os
import pickle
import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from configs import LonghaulError
from data_pipeline.ingest import Options, WriteShard, fingerprint, local_processes, prepare, quarantine_counts
from data_pipeline.ingest.plan import Plan, Settings, Task, make_plan
from data_pipeline.ingest.shard import PixelSums, ShardReport, read_ahead
from data_pipeline.ingest.verify import StoredImage, Unfit, strict_decoding, verify
from data_pipeline.shards import Manifest
from data_pipeline.sources import Item, Listing, open_source
from data_pipeline.split import Split
from tests.test_data import decode, encode, everything, keys, photo, small_tree, write_tree, write_zip

SHARD = 4_000  # bytes: a few images of `small_tree`


def contents(directory: Path) -> dict[str, str]:
    """The SHA-256 of every file of a data set."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def tree(directory: Path, per_class: int = 8) -> Path:
    return write_tree(directory / "source", small_tree(per_class))


class Broken:
    """A source of given bytes, one image each, all for training but those of `val`."""

    name = "given"
    sequential = False

    def __init__(self, images: Sequence[bytes | OSError], val: Sequence[bytes | OSError] = ()) -> None:
        self._images = [*images, *val]
        self._num_train = len(images)

    def listing(self) -> Listing:
        splits = ["train" if i < self._num_train else "val" for i in range(len(self._images))]
        sizes = [100 if isinstance(image, OSError) else len(image) for image in self._images]
        return Listing(
            ["only"], [Item(s, 0, f"{i:04d}", str(i), n) for i, (s, n) in enumerate(zip(splits, sizes, strict=True))]
        )

    def read(self, items: list[Item]) -> Iterator[bytes | OSError]:
        return (self._images[int(item.path)] for item in items)


# --- the plan ----------------------------------------------------------------------------------------------------


class Sizes:
    """A source that can only be listed: images of these sizes."""

    name = "sizes"
    sequential = False

    def __init__(self, train: list[int], val: list[int]) -> None:
        self.items = [
            Item(split, i % 3, f"{split}/{i}", str(i), size)
            for split, sizes in (("train", train), ("val", val))
            for i, size in enumerate(sizes)
        ]

    def listing(self) -> Listing:
        return Listing(["a", "b", "c"], self.items)

    def read(self, items: list[Item]) -> Iterator[bytes | OSError]:
        raise NotImplementedError


def settings(
    shard_bytes: int = SHARD, shuffled: bool = True, options: Options | None = None, **identity: Any
) -> Settings:
    return Settings("sizes", options or Options(), shard_bytes, shuffled, identity)


@given(
    st.lists(st.integers(0, 500), min_size=1, max_size=60),
    st.lists(st.integers(0, 500), max_size=20),
    st.integers(1, 3_000),
    st.booleans(),
)
def test_a_plan_holds_every_image_once_in_shards_of_even_size(
    train: list[int], val: list[int], shard_bytes: int, shuffled: bool
) -> None:
    source = Sizes(train, val)
    plan = make_plan(source, settings(shard_bytes, shuffled))
    planned = [(task, plan.items(task)) for task in plan.tasks]
    assert [item for split in ("train", "val") for item in source.items if item.split == split] == sorted(
        (item for _, items in planned for item in items), key=lambda item: (item.split, int(item.path))
    )
    for split, sizes in (("train", train), ("val", val)):
        shards = [items for task, items in planned if task.split == split]
        names = [task.file for task in plan.tasks if task.split == split]
        assert names == [f"{split}-{i:05d}.arrow" for i in range(len(shards))]
        for items in shards:
            assert 0 < sum(max(item.size, 1) for item in items) < shard_bytes + max([*sizes, 1])
        if not shuffled or split == "val":
            assert [int(item.path) for items in shards for item in items] == list(range(len(sizes)))


def test_a_plan_is_the_same_every_time_and_shuffles_well(tmp_path: Path) -> None:
    source = Sizes([100] * 2_000, [100] * 50)
    plan = make_plan(source, settings(20_000))
    plan.write(tmp_path / "plan.arrow")
    read = Plan.read(tmp_path / "plan.arrow")
    assert (read.id, read.classes, read.settings, read.tasks) == (plan.id, plan.classes, plan.settings, plan.tasks)
    again = make_plan(source, settings(20_000))
    assert [again.items(task) for task in again.tasks] == [read.items(task) for task in read.tasks]
    places = np.array([int(item.path) for task in plan.tasks if task.split == "train" for item in plan.items(task)])
    assert np.abs(np.corrcoef(places, np.arange(2_000))[0, 1]) < 0.1
    for task in plan.tasks[:10]:  # every shard draws from all over the source
        first = [int(item.path) for item in plan.items(task)]
        assert len(first) == 200 and min(first) < 200 and max(first) > 1_800


def test_shards_of_pixels_are_planned_by_their_size(tmp_path: Path) -> None:
    source = Sizes([1_000] * 100, [])
    assert len(make_plan(source, settings(100_000)).tasks) == 1
    assert len(make_plan(source, settings(100_000, options=Options(raw=True))).tasks) == 5
    assert len(make_plan(source, settings(100_000, options=Options(raw=True, max_side=20))).tasks) == 2  # 1,200 each


# --- one image ---------------------------------------------------------------------------------------------------


def checked(data: bytes, **options: Any) -> StoredImage:
    with strict_decoding():
        return verify(data, Options(**options), True)


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@cache
def bad_images() -> dict[str, tuple[str, bytes]]:
    """Really broken images, each with the kind of reason it is to be left out for."""
    jpeg, whole_png = encode(photo(60, 60)), encode(photo(60, 60), "PNG")
    tiff = io.BytesIO()
    Image.fromarray(np.ones((4, 4), np.float32)).save(tiff, "TIFF")
    middle = len(whole_png) // 2
    return {
        "half a JPEG": ("truncated", jpeg[: len(jpeg) // 2]),
        "JPEG without its end": ("truncated", jpeg[:-60]),
        "half a PNG": ("truncated", whole_png[: len(whole_png) // 2]),
        "no byte": ("empty", b""),
        "garbage": ("no image", bytes(range(256)) * 4),
        "a web page": ("no image", b"<html>404 not found</html>"),
        "a JPEG's first bytes": ("no image", jpeg[:3]),
        "PostScript, which Pillow would run": ("no image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        "a bomb": ("too large", png(14_000, 14_000, 1, 0, b"\0" * 1_751 * 14_000)),
        "a smaller bomb, of which Pillow only warns": ("too large", png(12_000, 8_000, 1, 0, b"\0" * 1_501 * 8_000)),
        "16 bits of grey": ("deep", png(2, 1, 16, 0, b"\0" + struct.pack(">HH", 999, 60_000))),
        "floating point": ("deep", tiff.getvalue()),
        "a PNG with a flipped bit": (
            "damaged",
            whole_png[:middle] + bytes([whole_png[middle] ^ 1]) + whole_png[middle + 1 :],
        ),
    }


@pytest.mark.parametrize("name", bad_images())
def test_a_broken_image_is_refused_with_the_reason(name: str) -> None:
    kind, data = bad_images()[name]
    with pytest.raises(Unfit) as refused:
        checked(data)
    assert (refused.value.kind, bool(str(refused.value))) == (kind, True)
    assert " at 0x" not in str(refused.value)  # an address would make two data sets of the same source differ


@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_a_damaged_jpeg_is_stored_as_it_is_or_refused_but_stops_nothing(seed: int, flips: int) -> None:
    generator = random.Random(seed)
    data = bytearray(encode(photo(24, 24)))
    for _ in range(flips):
        data[generator.randrange(len(data))] = generator.randrange(256)
    try:
        image = checked(bytes(data))
    except Unfit as error:
        assert error.kind in ("truncated", "no image", "damaged", "too large", "deep")
    else:
        assert decode(image.data).shape == (image.height, image.width, 3)


def test_colours_of_16_bits_keep_their_upper_half() -> None:
    values = [(999, 60_000, 256), (65_535, 0, 255)]
    data = png(2, 1, 16, 2, b"\0" + b"".join(struct.pack(">HHH", *v) for v in values))
    pixels = np.frombuffer(checked(data, raw=True).data, np.uint8).reshape(1, 2, 3)
    assert pixels[0].tolist() == [[v >> 8 for v in value] for value in values]


def oriented(orientation: int, size: tuple[int, int] = (40, 64)) -> tuple[np.ndarray, bytes]:
    pixels = photo(*size, seed=3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return pixels, encode(pixels, quality=95, subsampling=0, exif=exif.tobytes())


TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # EXIF 2.32, table 6
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_ignored_unless_images_are_to_be_upright(orientation: int) -> None:
    pixels, data = oriented(orientation)
    stored = checked(data)
    assert stored.data == data and (stored.height, stored.width) == pixels.shape[:2]

    upright = checked(data, upright=True)
    expected = TURNS[orientation](pixels)
    assert (upright.height, upright.width) == expected.shape[:2]
    assert np.abs(decode(upright.data).astype(int) - expected).mean() < 3
    with Image.open(io.BytesIO(upright.data)) as image:
        assert image.getexif().get(0x0112, 1) == 1  # or whoever honours it would turn it again
    assert (upright.data == data) == (orientation == 1)


def test_only_images_that_are_too_large_are_scaled_and_encoded_again(tmp_path: Path) -> None:
    small, large = encode(photo(50, 40)), encode(photo(100, 60))
    assert checked(small, max_side=50).data == small
    stored = checked(large, max_side=50)
    assert (stored.height, stored.width) == (50, 30)
    with Image.open(io.BytesIO(large)) as image:
        expected = np.asarray(image.resize((30, 50), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(decode(stored.data) - expected).mean() < 2
    assert (checked(encode(photo(4, 900)), max_side=50).height, checked(encode(photo(4, 900)), max_side=50).width) == (
        1,
        50,
    )


def test_a_quality_encodes_every_image_again() -> None:
    data = encode(photo(64, 64), quality=98)
    worse = checked(data, quality=30)
    assert len(worse.data) < len(data) / 2
    assert checked(data, quality=90).data == encode(decode(data), quality=90, subsampling="4:2:0")
    grey = checked(encode(photo(64, 64), mode="L"), quality=90)
    with Image.open(io.BytesIO(grey.data)) as image:
        assert image.mode == "L"


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_raw_pixels_are_what_pillow_decodes(mode: str) -> None:
    data = encode(photo(30, 20), mode=mode)
    stored = checked(data, raw=True)
    np.testing.assert_array_equal(np.frombuffer(stored.data, np.uint8).reshape(30, 20, 3), decode(data))


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from(["RGB", "L"]), st.integers(0, 1_000))
def test_sums_are_exact(height: int, width: int, mode: str, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    stored = checked(encode(pixels, "PNG", mode), raw=True)
    assert stored.histogram is not None
    flat = np.frombuffer(stored.data, np.uint8).reshape(-1, 3).astype(np.int64)
    sums = PixelSums.of_histogram(np.array(stored.histogram).reshape(3, 256))
    assert (sums.count, sums.values, sums.squares) == (len(flat), flat.sum(0).tolist(), (flat**2).sum(0).tolist())
    assert (sums + PixelSums()) == sums


# --- whole data sets ---------------------------------------------------------------------------------------------


def test_any_number_of_processes_writes_the_same_bytes(tmp_path: Path) -> None:
    source = open_source(str(tree(tmp_path)), 0.0)
    one = prepare(source, tmp_path / "one", SHARD)
    seen: list[tuple[int, int]] = []
    three = prepare(
        source, tmp_path / "three", SHARD, lambda *now: seen.append(now), executor=local_processes(3)
    )  # fmt: skip
    assert one == three and len(one.splits["train"]) > 3
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert seen[0] == (0, 32) and seen[-1] == (32, 32) and seen == sorted(seen)
    assert not list(tmp_path.glob(".*"))
    assert one.options == {
        "shard_bytes": SHARD, "max_side": None, "quality": None, "raw": False, "upright": False,
    }  # fmt: skip
    assert one.source_bytes == sum(item.size for item in source.listing().items)


def test_the_training_split_is_shuffled_and_the_held_out_one_is_not(tmp_path: Path) -> None:
    source = open_source(str(tree(tmp_path)), 0.0)
    prepare(source, tmp_path / "shuffled", SHARD)
    prepare(source, tmp_path / "ordered", SHARD, shuffle=False)
    listed = {split: [i.key for i in source.listing().items if i.split == split] for split in ("train", "val")}
    assert keys(tmp_path / "ordered", "train") == listed["train"]
    assert keys(tmp_path / "shuffled", "train") != listed["train"]
    assert sorted(keys(tmp_path / "shuffled", "train")) == sorted(listed["train"])
    assert keys(tmp_path / "shuffled", "val") == keys(tmp_path / "ordered", "val") == listed["val"]
    assert Manifest.read(tmp_path / "shuffled").shuffled and Manifest.read(tmp_path / "ordered").shuffled is None


def test_a_source_that_must_be_read_in_its_order_is_not_shuffled_unless_asked_for(tmp_path: Path) -> None:
    source = Broken([encode(photo(8, 8, seed)) for seed in range(20)])
    source.sequential = True
    said: list[str] = []
    prepare(source, tmp_path / "kept", say=said.append)
    prepare(source, tmp_path / "shuffled", shuffle=True)
    assert keys(tmp_path / "kept", "train") == sorted(keys(tmp_path / "shuffled", "train"))
    assert keys(tmp_path / "kept", "train") != keys(tmp_path / "shuffled", "train")
    assert len(said) == 1 and "--shuffle" in said[0]


def test_raw_shards_hold_the_pixels_at_the_size_asked_for(tmp_path: Path) -> None:
    files = {"train/a/x.png": encode(photo(40, 20), "PNG"), "train/b/y.png": encode(photo(10, 16), "PNG")}
    source = open_source(str(write_tree(tmp_path / "source", files)), 0.0)
    manifest = prepare(source, tmp_path / "out", options=Options(raw=True, max_side=20), shuffle=False)
    assert (manifest.encoding, manifest.options["max_side"]) == ("raw", 20)
    split = Split(tmp_path / "out", "train")
    assert split.sizes.tolist() == [[20, 10], [10, 16]]
    first, second = split.images(everything(split))
    assert first.shape == (20, 10, 3)
    np.testing.assert_array_equal(second, decode(files["train/b/y.png"]))
    assert split.damaged(everything(split), [first, second]) == []


def test_the_quarantine_is_in_the_manifest_and_in_a_report_for_people(tmp_path: Path) -> None:
    bad = bad_images()
    good = [encode(photo(20, 20, seed)) for seed in range(4)]
    source = Broken([*(data for _, data in bad.values()), *good, OSError("Input/output\terror")], [good[0]])
    manifest = prepare(source, tmp_path / "out")
    assert manifest.num_samples("train") == 4
    expected = Counter([kind for kind, _ in bad.values()] + ["unreadable"])
    assert quarantine_counts(manifest) == expected
    header, *lines = (tmp_path / "out" / "quarantine.tsv").read_text().splitlines()
    assert header == "kind\tkey\treason" and len(lines) == len(bad) + 1
    assert Counter(line.split("\t")[0] for line in lines) == expected
    assert any(line.startswith("unreadable\t") and line.endswith("\tInput/output error") for line in lines)
    prepare(source, tmp_path / "again")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_a_shard_without_a_usable_image_leaves_a_gap_in_the_names_and_none_in_the_samples(tmp_path: Path) -> None:
    good = [encode(photo(20, 20, seed)) for seed in range(9)]
    images = [*good[:3], *(b"x" * len(good[0]) for _ in range(6)), *good[3:]]
    source = Broken(images, [b"nothing to see"])
    manifest = prepare(source, tmp_path / "out", 3 * len(good[0]), shuffle=False)
    names = [shard.file for shard in manifest.splits["train"]]
    planned = make_plan(source, settings(3 * len(good[0]), shuffled=False))
    lost = [
        t.file
        for t in planned.tasks
        if t.split == "train" and all(int(i.path) in range(3, 9) for i in planned.items(t))
    ]
    assert lost and not set(lost) & set(names)
    assert len(manifest.quarantined) == 7 and "val" not in manifest.splits
    split = Split(tmp_path / "out", "train")
    assert [split.key(i) for i in range(len(split))] == [f"{i:04d}" for i in (*range(3), *range(9, 15))]
    assert [bytes(view) for view in split.images(everything(split))] == good


@pytest.mark.parametrize(
    ("images", "told"),
    [
        ([], "There are no images"),
        ([b"no"], r"No image of 'given' could be decoded.*0000: its format is unknown"),
    ],
)
def test_a_source_without_a_training_image_is_refused_and_leaves_nothing(
    tmp_path: Path, images: list[bytes], told: str
) -> None:
    with pytest.raises(LonghaulError, match=told):
        prepare(Broken(images), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_source_that_is_gone_is_told_apart_from_bad_images(tmp_path: Path) -> None:
    source = Broken([OSError("Stale file handle")] * 3)
    with pytest.raises(LonghaulError, match=r"None of the 3 images of train-00000.arrow.*Stale file handle"):
        prepare(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_archive_that_is_gone_is_one_sentence_and_it_goes_on_when_it_is_back(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", small_tree(8))
    source = open_source(str(archive), 0.0)
    with pytest.raises(Stop):
        prepare(source, tmp_path / "out", SHARD, stop_at(20))
    archive.rename(tmp_path / "b.zip")
    for jobs in (1, 2):
        with pytest.raises(LonghaulError, match=r"a\.zip cannot be read \(No such file"):
            prepare(source, tmp_path / "out", SHARD, executor=local_processes(jobs))
    (tmp_path / "b.zip").rename(archive)
    prepare(source, tmp_path / "out", SHARD)
    prepare(source, tmp_path / "calm", SHARD)
    assert contents(tmp_path / "out") == contents(tmp_path / "calm")


def test_more_pixels_than_a_shard_can_hold_are_refused_with_the_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain PNG has a thousand times fewer bytes than pixels, which no plan can foresee."""
    monkeypatch.setattr("data_pipeline.ingest.shard._OFFSET_LIMIT", 2**20)  # instead of 2 GiB, for speed
    image = encode(np.zeros((400, 400, 3), np.uint8), "PNG")
    with pytest.raises(LonghaulError, match=r"train-00000.arrow would hold more than 2 GiB.*--shard-mib"):
        prepare(Broken([image] * 11), tmp_path / "out", options=Options(raw=True))
    assert prepare(Broken([image] * 2), tmp_path / "other", options=Options(raw=True)).num_samples("train") == 2


# --- going on ----------------------------------------------------------------------------------------------------


class Stop(Exception):
    """What interrupts a `prepare` here."""


def stop_at(images: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == images:
            raise Stop

    return progress


def test_an_interrupted_prepare_goes_on_without_listing_or_reading_anew(tmp_path: Path) -> None:
    root = tree(tmp_path)
    source = open_source(str(root), 0.0)
    prepare(source, tmp_path / "calm", SHARD)
    with pytest.raises(Stop):
        prepare(source, tmp_path / "out", SHARD, stop_at(20))
    assert not (tmp_path / "out").exists()
    done = [path.stem for path in (tmp_path / ".out.unfinished" / "done").glob("*.json")]
    assert done

    read: list[Item] = []

    class Watched(type(source)):  # type: ignore[misc]
        def __init__(self) -> None:
            self.__dict__.update(source.__dict__)

        def listing(self) -> Listing:
            raise AssertionError("the source is listed again")

        def read(self, items: list[Item]) -> Iterator[bytes | OSError]:
            read.extend(items)
            return super().read(items)

    said: list[str] = []
    seen: list[int] = []
    prepare(Watched(), tmp_path / "out", SHARD, lambda now, _: seen.append(now), say=said.append)
    assert len(read) == 32 - seen[0] and seen[0] > 0 and seen[-1] == 32
    assert said == [
        f"Going on: {len(done)} of {len(list((tmp_path / 'out').glob('*-0*.arrow')))} shards are finished already."
    ]
    assert contents(tmp_path / "out") == contents(tmp_path / "calm")
    assert not list(tmp_path.glob(".*"))


def test_a_finished_shard_that_was_removed_or_cut_is_written_anew(tmp_path: Path) -> None:
    source = open_source(str(tree(tmp_path)), 0.0)
    prepare(source, tmp_path / "calm", SHARD)
    with pytest.raises(Stop):
        prepare(source, tmp_path / "out", SHARD, stop_at(30))
    first, second, *_ = sorted((tmp_path / ".out.unfinished" / "data").iterdir())
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    prepare(source, tmp_path / "out", SHARD)
    assert contents(tmp_path / "out") == contents(tmp_path / "calm")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"options": Options(max_side=10)}, "max_side: None -> 10"),
        ({"shard_bytes": 5_000}, "shard_bytes: 4000 -> 5000"),
        ({"shuffle": False}, "shuffled: True -> False"),
        ({"identity": {"holdout": 0.2}}, "holdout: 0.1 -> 0.2"),
    ],
)
def test_another_source_or_option_is_refused_until_it_is_to_begin_anew(
    tmp_path: Path, changed: dict[str, Any], told: str
) -> None:
    source = open_source(str(tree(tmp_path)), 0.0)
    given: dict[str, Any] = {"shard_bytes": SHARD, "identity": {"holdout": 0.1}}
    with pytest.raises(Stop):
        prepare(source, tmp_path / "out", progress=stop_at(20), **given)
    given |= changed
    with pytest.raises(LonghaulError, match="begun differently") as refused:
        prepare(source, tmp_path / "out", **given)
    assert f"({told})" in str(refused.value) and "--restart" in str(refused.value)
    prepare(source, tmp_path / "out", restart=True, **given)
    prepare(source, tmp_path / "fresh", **given)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_restart_that_was_killed_leaves_nothing_that_counts(tmp_path: Path) -> None:
    source = open_source(str(tree(tmp_path)), 0.0)
    with pytest.raises(Stop):
        prepare(source, tmp_path / "out", SHARD, stop_at(20))
    (tmp_path / ".out.unfinished" / "plan.arrow").unlink()  # the first thing that it does
    prepare(source, tmp_path / "out", 2 * SHARD)
    prepare(source, tmp_path / "fresh", 2 * SHARD)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_plan_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    source = open_source(str(tree(tmp_path)), 0.0)
    with pytest.raises(Stop):
        prepare(source, tmp_path / "out", SHARD, stop_at(20))
    plan = tmp_path / ".out.unfinished" / "plan.arrow"
    plan.write_bytes(plan.read_bytes()[:100])
    with pytest.raises(LonghaulError, match=r"plan.arrow cannot be read.*--restart"):
        prepare(source, tmp_path / "out", SHARD)


def test_a_source_is_known_by_its_place_and_time(tmp_path: Path) -> None:
    root, out = tree(tmp_path), tmp_path / "out"
    before = fingerprint(str(root), out)
    assert fingerprint(str(root), out) == before
    os.utime(root / "train" / "cat", (1, 2_000_000_000))  # as when a file is added to it
    assert fingerprint(str(root), out) != before
    archive = write_zip(tmp_path / "a.zip", small_tree(1))
    before = fingerprint(str(archive), out)
    archive.write_bytes(archive.read_bytes() + b"x")
    assert fingerprint(str(archive), out)["size of the source"] == before["size of the source"] + 1
    assert fingerprint("s3://bucket/x", out) == {"source": "s3://bucket/x"}
    # The unfinished directory appears in the folder around `out`, which is no change of the source.
    before = fingerprint(str(tmp_path), tmp_path / "out")
    (tmp_path / ".out.unfinished").mkdir()
    os.utime(tmp_path, (1, 2_100_000_000))
    assert fingerprint(str(tmp_path), tmp_path / "out")["source"] == before["source"]


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    source = open_source(str(tree(tmp_path)), 0.0)
    refused: list[str] = []

    def second(done: int, total: int) -> None:
        if done == 10:
            with pytest.raises(LonghaulError) as error:
                prepare(source, tmp_path / "out", SHARD, restart=True)
            refused.append(str(error.value))

    prepare(source, tmp_path / "out", SHARD, second)
    assert refused == [f"Another `prepare` is writing {tmp_path / 'out'}: wait for it or stop it."]
    assert Manifest.read(tmp_path / "out").num_samples("train") == 16


def test_what_a_kill_at_the_very_end_leaves_is_tidied(tmp_path: Path) -> None:
    source = open_source(str(tree(tmp_path)), 0.0)
    prepare(source, tmp_path / "out", SHARD)
    (tmp_path / ".out.unfinished" / "done").mkdir(parents=True)  # `data` has been renamed, the rest not yet removed
    with pytest.raises(LonghaulError, match="exists already"):
        prepare(source, tmp_path / "out", SHARD)
    assert not list(tmp_path.glob(".*"))


def test_a_worker_on_another_machine_without_the_directory_says_so(tmp_path: Path) -> None:
    source = open_source(str(tree(tmp_path)), 0.0)
    work = pickle.loads(pickle.dumps(WriteShard(tmp_path / "elsewhere", "id", source, Options())))
    task = Task("train-00000.arrow", "train", 0, 1)
    with pytest.raises(LonghaulError, match=r"does not see what is in .*elsewhere.*storage that all of them share"):
        work(task, lambda _: None)
    (tmp_path / "elsewhere").mkdir()
    make_plan(source, settings()).write(tmp_path / "elsewhere" / "plan.arrow")  # another data set
    with pytest.raises(LonghaulError, match="does not see"):
        work(task, lambda _: None)


def test_reports_survive_their_file() -> None:
    report = ShardReport("train-00000.arrow", None, 3, 99, PixelSums(1, [1, 2, 3], [4, 5, 6]), [{"key": "x"}])
    assert ShardReport.from_json(report.to_json()) == report


@given(st.integers(0, 100))
def test_reading_ahead_changes_neither_order_nor_errors(count: int) -> None:
    assert list(read_ahead(iter(range(count)))) == list(range(count))

    def failing() -> Iterator[int]:
        yield from range(count)
        raise Stop

    with pytest.raises(Stop):
        list(read_ahead(failing()))
