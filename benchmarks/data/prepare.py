"""Make every format that the arms read, from a tar of JPEGs in class folders.

    python -m benchmarks.data.prepare SCRATCH --tar ../shared/data/imagenet-500.tar

Run it with the interpreter of the peers' environment (README.md). Formats that hold samples in files of their own hold
the list of JPEGs `--repeat` times over, so that an arm needs no second epoch; folders hold it once, and what reads
them repeats the list. `--formats` makes some again.
"""

import argparse
import os
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.data.peers.common import jpeg_paths

SHARDS = 8
MAX_SIDE, QUALITY, RAW_SIDE = 500, 90, 256


class Sample(NamedTuple):
    key: str
    jpeg: bytes
    label: int


class Job(NamedTuple):
    """What a writer is given: the samples in an order shuffled once, and the folder to fill."""

    root: Path
    repeat: int
    out: Path

    def files(self) -> list[tuple[Path, int]]:
        """(path, label) of every JPEG of the folder, once."""
        paths = jpeg_paths(self.root / "folder")
        labels = {folder: label for label, folder in enumerate(sorted({path.parent for path in paths}))}
        return [(path, labels[path.parent]) for path in paths]

    def samples(self) -> list[Sample]:
        many = [(path, label, n) for n in range(self.repeat) for path, label in self.files()]
        random.Random(0).shuffle(many)
        return [Sample(f"{path.stem}-{n}", path.read_bytes(), label) for path, label, n in many]

    def shards(self) -> Iterator[tuple[int, list[Sample]]]:
        samples = self.samples()
        for shard in range(SHARDS):
            yield shard, samples[shard::SHARDS]


def small_folder(job: Job) -> None:
    """The folder with every image at most 500 pixels at quality 90: the very JPEGs that FFCV stores."""
    import numpy as np
    from ffcv.fields.rgb_image import encode_jpeg, resizer
    from PIL import Image

    for path, _ in job.files():
        pixels = resizer(np.array(Image.open(path).convert("RGB")), MAX_SIDE)
        target = job.out / path.relative_to(job.root / "folder")
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(encode_jpeg(pixels, QUALITY).tobytes())


def webdataset(job: Job) -> None:
    import webdataset as wds

    for shard, samples in job.shards():
        with wds.TarWriter(str(job.out / f"train-{shard:06d}.tar")) as writer:
            for key, jpeg, label in samples:
                writer.write({"__key__": key, "jpg": jpeg, "cls": label})


def mds(job: Job) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(job.out), columns={"image": "bytes", "label": "int"}) as writer:
        for _, jpeg, label in job.samples():
            writer.write({"image": jpeg, "label": label})


def read_for_litdata(path_and_label: tuple[str, int]) -> Any:
    from PIL import Image

    return Image.open(path_and_label[0]), path_and_label[1]  # an unread JPEG: LitData stores its bytes


def litdata(job: Job) -> None:
    # LitData empties these before it writes, and they are /tmp/chunks and /tmp/data unless it is told.
    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = str(job.out / "cache" / "chunks")
    os.environ["DATA_OPTIMIZER_DATA_CACHE_FOLDER"] = str(job.out / "cache" / "data")
    import litdata

    litdata.optimize(
        fn=read_for_litdata, inputs=[(str(path), label) for path, label in job.files()] * job.repeat,
        output_dir=str(job.out), chunk_bytes="64MB", num_workers=1, mode="overwrite", verbose=False,
    )  # fmt: skip
    shutil.rmtree(job.out / "cache", ignore_errors=True)


def tfrecord(job: Job) -> None:
    import tensorflow as tf

    for shard, samples in job.shards():
        with tf.io.TFRecordWriter(str(job.out / f"train-{shard:05d}-of-{SHARDS:05d}")) as writer:
            for _, jpeg, label in samples:
                feature = {
                    "image/encoded": tf.train.Feature(bytes_list=tf.train.BytesList(value=[jpeg])),
                    "image/class/label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
                }
                example = tf.train.Example(features=tf.train.Features(feature=feature))
                writer.write(example.SerializeToString())


def parquet(job: Job) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for shard, samples in job.shards():
        table = pa.table({"image": [s.jpeg for s in samples], "label": [s.label for s in samples]})
        # No dictionary: it would store an image once that the list holds ten times.
        path = job.out / f"train-{shard:05d}.parquet"
        pq.write_table(table, path, compression="none", row_group_size=128, use_dictionary=False)


class Images:
    """An indexed dataset of (PIL image, label), as FFCV's writer wants one."""

    def __init__(self, job: Job) -> None:
        self.files = job.files() * job.repeat

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        path, label = self.files[index]
        return Image.open(path).convert("RGB"), label


def ffcv(job: Job) -> None:
    """JPEGs at 500 / q90; raw pixels at 256; half of each at 500 / q90, FFCV's own recipe for ResNet-50."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    for name, options in {
        f"jpg-{MAX_SIDE}-q{QUALITY}": {"write_mode": "jpg", "max_resolution": MAX_SIDE},
        f"raw-{RAW_SIDE}": {"write_mode": "raw", "max_resolution": RAW_SIDE},
        f"half-{MAX_SIDE}-q{QUALITY}": {"write_mode": "proportion", "max_resolution": MAX_SIDE},
    }.items():
        image = RGBImageField(jpeg_quality=QUALITY, compress_probability=0.5, **options)
        writer = DatasetWriter(str(job.out / f"{name}.beton"), {"image": image, "label": IntField()}, num_workers=2)
        writer.from_indexed_dataset(Images(job), chunksize=50)


WRITERS: dict[str, Callable[[Job], None]] = {
    f"folder-{MAX_SIDE}-q{QUALITY}": small_folder,
    "webdataset": webdataset, "mds": mds, "litdata": litdata, "tfrecord": tfrecord, "parquet": parquet, "ffcv": ffcv,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--tar", type=Path, default=Path("../shared/data/imagenet-500.tar"))
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--formats", nargs="+", choices=WRITERS, default=list(WRITERS))
    args = parser.parse_args()
    folder = args.scratch / "folder"
    if not folder.exists():
        folder.mkdir(parents=True)
        with tarfile.open(args.tar) as tar:
            tar.extractall(folder, filter="data")
    for name in args.formats:
        out = args.scratch / name
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        # A process for each: some of these libraries do not bear one another in one process.
        child = os.fork()
        if child == 0:
            WRITERS[name](Job(args.scratch, args.repeat, out))
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            raise SystemExit(f"Writing {name} failed; what it said is above.")
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        print(f"{name}: {size / 1e6:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
