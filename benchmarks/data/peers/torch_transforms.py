"""The training transform as PyTorch users write it: bytes of a JPEG -> float32 [3, 224, 224], normalised."""

import io
from collections.abc import Callable

import torch
from PIL import Image
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from benchmarks.data.peers.common import AREA, MEAN, RATIO, SIZE, STD

DECODERS = ("pil", "io")


def on_pil_images() -> transforms.Compose:
    """For PIL images, as in pytorch/examples (imagenet/main.py)."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, AREA, RATIO),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def on_tensors() -> v2.Compose:
    """For uint8 tensors, as torchvision's documentation recommends for speed (Transforms v2, "Performance")."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, AREA, RATIO, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def from_bytes(decoder: str) -> Callable[[bytes], torch.Tensor]:
    """Decode with PIL, or with torchvision.io (libjpeg-turbo, straight into a tensor), and transform."""
    if decoder == "pil":
        transform = on_pil_images()
        return lambda jpeg: transform(Image.open(io.BytesIO(jpeg)).convert("RGB"))
    on_tensor = on_tensors()

    def decode(jpeg: bytes) -> torch.Tensor:
        pixels = decode_jpeg(torch.frombuffer(bytearray(jpeg), dtype=torch.uint8), mode=ImageReadMode.RGB)
        result: torch.Tensor = on_tensor(pixels)
        return result

    return decode
