"""torchvision: ImageFolder and PyTorch's DataLoader, with PIL, or with torchvision.io and transforms v2."""

from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg, read_file

from benchmarks.data.peers.common import arguments, measure, repeats
from benchmarks.data.peers.torch_transforms import DECODERS, on_pil_images, on_tensors


def read(path: str | Path) -> torch.Tensor:
    return decode_jpeg(read_file(str(path)), mode=ImageReadMode.RGB)


def main() -> None:
    args = arguments(decoder=DECODERS)
    if args.decoder == "pil":
        dataset = ImageFolder(args.prepared / "folder", on_pil_images())
    else:
        dataset = ImageFolder(args.prepared / "folder", on_tensors(), loader=read)
    dataset.samples *= repeats(args)
    loader = DataLoader(dataset, args.batch, shuffle=True, num_workers=args.threads, drop_last=True)
    measure(f"torchvision ({args.decoder})", args, loader, ("torch", "torchvision", "pillow"))


if __name__ == "__main__":
    main()
