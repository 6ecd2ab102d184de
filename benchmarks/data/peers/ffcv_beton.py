"""FFCV: a .beton file, of JPEGs re-encoded at 500 pixels at most, of raw pixels at 256 at most, or of both kinds.

The pipeline of libffcv/ffcv-imagenet (train_imagenet.py), on the CPU: uint8 from FFCV's own threads, normalised by
`NormalizeImage` in them (`--output float32`) or left to the device, as FFCV does where there is one (`--output uint8`).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage

from benchmarks.data.peers.common import AREA, MEAN, RATIO, SIZE, STD, arguments, measure


def epochs(loader: Loader) -> Iterator[Any]:
    """Epoch after epoch; left in the middle of one, FFCV's thread must end first, or the process aborts."""
    while True:
        epoch = iter(loader)
        try:
            yield from epoch
        finally:
            epoch.terminate_event.set()
            epoch.join()
            epoch.close()


def main() -> None:
    args = arguments(file=("jpg-500-q90", "raw-256", "half-500-q90"), output=("float32", "uint8"))
    image = [RandomResizedCropRGBImageDecoder((SIZE, SIZE), AREA, RATIO), RandomHorizontalFlip()]
    if args.output == "float32":
        image += [NormalizeImage(255 * np.array(MEAN), 255 * np.array(STD), np.float32)]
    image += [ToTensor(), ToTorchImage(convert_back_int16=False)]
    loader = Loader(
        str(args.prepared / "ffcv" / f"{args.file}.beton"), batch_size=args.batch, num_workers=args.threads,
        order=OrderOption.QUASI_RANDOM, os_cache=True, drop_last=True,
        pipelines={"image": image, "label": [IntDecoder(), ToTensor(), Squeeze()]},
    )  # fmt: skip
    measure(f"FFCV {args.file}", args, epochs(loader), ("ffcv", "torch", "numba", "numpy", "opencv-python"))


if __name__ == "__main__":
    main()
