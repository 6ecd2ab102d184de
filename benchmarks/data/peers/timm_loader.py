"""timm: its ImageDataset and create_loader. Workers hand over uint8; the prefetcher normalises the batch."""

import torch
from timm.data import create_loader
from timm.data.dataset import ImageDataset
from timm.data.readers import create_reader

from benchmarks.data.peers.common import AREA, MEAN, RATIO, SIZE, STD, arguments, measure, repeats


def main() -> None:
    args = arguments(prefetcher=("yes", "no"))
    reader = create_reader("", root=str(args.prepared / "folder"))
    reader.samples = list(reader.samples) * repeats(args)
    loader = create_loader(
        ImageDataset(str(args.prepared / "folder"), reader=reader),
        input_size=(3, SIZE, SIZE), batch_size=args.batch, is_training=True, scale=AREA, ratio=RATIO,
        color_jitter=0, interpolation="bilinear", mean=MEAN, std=STD, num_workers=args.threads,
        device=torch.device("cpu"), use_prefetcher=args.prefetcher == "yes",
    )  # fmt: skip
    measure("timm", args, loader, ("timm", "torch", "torchvision", "pillow"))


if __name__ == "__main__":
    main()
