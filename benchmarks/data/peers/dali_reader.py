"""NVIDIA DALI: its file reader and its random-crop decoder, on the CPU.

The pipeline of DALI's ResNet-50 example (docs/examples/use_cases/pytorch/resnet50/main.py), with DALI's default
antialiased linear resize. Batches become tensors without a copy (dlpack).
"""

import importlib.metadata
from collections.abc import Iterator
from typing import Any

import torch
from nvidia.dali import fn, pipeline_def, types

from benchmarks.data.peers.common import AREA, MEAN, RATIO, SIZE, STD, arguments, measure


@pipeline_def
def training(root: str, source: str) -> Any:
    jpegs, labels = fn.readers.file(file_root=f"{root}/{source}", random_shuffle=True, name="Reader")
    images = fn.decoders.image_random_crop(
        jpegs, device="cpu", output_type=types.RGB, random_area=AREA, random_aspect_ratio=RATIO, num_attempts=100
    )
    images = fn.resize(images, resize_x=SIZE, resize_y=SIZE, interp_type=types.INTERP_LINEAR)
    images = fn.crop_mirror_normalize(
        images, dtype=types.FLOAT, output_layout="CHW", mirror=fn.random.coin_flip(),
        mean=[255 * m for m in MEAN], std=[255 * s for s in STD],
    )  # fmt: skip
    return images, labels


def main() -> None:
    args = arguments(source=("folder", "folder-500-q90"))
    pipeline = training(
        root=str(args.prepared), source=args.source, batch_size=args.batch, num_threads=args.threads, device_id=None
    )
    pipeline.build()

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            images, labels = pipeline.run()
            yield torch.from_dlpack(images.as_tensor()), torch.from_dlpack(labels.as_tensor())

    dali = next(d.name for d in importlib.metadata.distributions() if (d.name or "").startswith("nvidia-dali-cuda"))
    measure("DALI's file reader", args, batches(), (dali, "torch"))


if __name__ == "__main__":
    main()
