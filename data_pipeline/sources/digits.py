"""scikit-learn's digits, the embedded data set."""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from data_pipeline.sources.base import Item, Listing


class Digits:
    """scikit-learn's digits: 1,797 real 8x8 grey scans (Alpaydin & Kaynak 1998), every fifth of a class held out."""

    name = "digits"
    sequential = False

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self._images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        self._labels = digits.target

    def listing(self) -> Listing:
        seen = np.zeros(10, int)
        items = []
        for index, label in enumerate(self._labels):
            split = "val" if seen[label] % 5 == 4 else "train"
            seen[label] += 1
            items.append(Item(split, int(label), f"{split}/{label}/{index:04d}.jpg", str(index), 720))
        return Listing([str(digit) for digit in range(10)], items)

    def read(self, items: list[Item]) -> Iterator[bytes | OSError]:
        for item in items:
            buffer = io.BytesIO()
            # 4:4:4 at quality 100: an 8x8 image is a single block, so nothing of note is lost.
            Image.fromarray(self._images[int(item.path)]).convert("RGB").save(
                buffer, "JPEG", quality=100, subsampling=0
            )
            yield buffer.getvalue()
