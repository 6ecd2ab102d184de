"""`longhaul prepare` against a bare decode-verify loop, images/s on one core, interleaved.

Bare: Pillow's `Image.open(...).load()` over images that are in memory already, and nothing else. Ours: all of `prepare`
in this process (listing, reading, decoding, statistics, checksums, writing, synchronising the disk). Both in processor
seconds and in wall seconds; the images are those of the source, several times over.

    python -m benchmarks.ingest ../shared/data/imagenet-500.tar
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.common import machine, write
from data_pipeline.ingest import Options, prepare
from data_pipeline.sources import Item, Listing, Source, open_source

FORMS = {
    "as they are": Options(),
    "max side 500, quality 90": Options(max_side=500, quality=90),
    "raw, max side 256": Options(max_side=256, raw=True),
}


class Repeated:
    """A source several times over, so that what a `prepare` costs once weighs as little as in a real one."""

    sequential = False

    def __init__(self, source: Source, times: int) -> None:
        self.name, self._source, self._times = source.name, source, times

    def listing(self) -> Listing:
        once = self._source.listing()
        items = [replace(item, key=f"{item.key}#{i}") for i in range(self._times) for item in once.items]
        return Listing(once.classes, items)

    def read(self, items: list[Item]) -> Iterator[bytes | OSError]:
        return self._source.read(items)


def bare(images: list[bytes]) -> None:
    for data in images:
        with Image.open(io.BytesIO(data)) as image:
            image.load()


def rate(count: int, work: Any) -> dict[str, float]:
    """Images a processor second and a wall second."""
    cpu, wall = time.process_time(), time.monotonic()
    work()
    return {"cpu": count / (time.process_time() - cpu), "wall": count / (time.monotonic() - wall)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--times", type=int, default=8)
    options = parser.parse_args()
    where = machine()
    source = Repeated(open_source(options.source, 0.0), options.times)
    items = source.listing().items
    images = [data for data in source.read(items) if isinstance(data, bytes)]
    rounds: list[dict[str, dict[str, float]]] = []
    bytes_an_image: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(options.rounds):
            result = {"bare": rate(len(images), lambda: bare(images))}
            for name, form in FORMS.items():
                out = Path(scratch) / f"{number}-{name}"
                result[name] = rate(len(items), lambda out=out, form=form: prepare(source, out, options=form))
                shards = [path for path in out.glob("*.arrow") if "index" not in path.name]
                bytes_an_image[name] = sum(path.stat().st_size for path in shards) / len(items)
            rounds.append(result)
            print({name: round(value["cpu"]) for name, value in result.items()}, flush=True)
    ratios = {
        name: {clock: statistics.median(r[name][clock] / r["bare"][clock] for r in rounds) for clock in ("cpu", "wall")}
        for name in FORMS
    }
    figures = {
        "what": f"images/s of one core, {len(items)} images of {Path(options.source).name}, {options.times} times over",
        "rounds": rounds,
        "ratio_to_bare": ratios,
        "bytes_an_image": {"source": sum(map(len, images)) / len(images), **bytes_an_image},
    }
    print(write("ingest", figures, where), ratios, figures["bytes_an_image"])


if __name__ == "__main__":
    main()
