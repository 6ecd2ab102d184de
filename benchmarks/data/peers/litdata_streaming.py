"""LitData: an optimised dataset of JPEGs, which LitData decodes into tensors itself; transforms v2.

After its own benchmark (Lightning-AI/litData, benchmarks/litdata/stream_imagenet.py), normalised as well.
"""

from typing import Any

from litdata import StreamingDataLoader, StreamingDataset

from benchmarks.data.peers.common import arguments, endless, measure
from benchmarks.data.peers.torch_transforms import on_tensors


class Images(StreamingDataset):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.on_tensors = on_tensors()

    def __getitem__(self, index: Any) -> Any:
        image, label = super().__getitem__(index)
        return self.on_tensors(image), label


def main() -> None:
    args = arguments()
    dataset = Images(input_dir=str(args.prepared / "litdata"), shuffle=True, drop_last=True)
    loader = StreamingDataLoader(dataset, batch_size=args.batch, num_workers=args.threads, drop_last=True)
    measure("LitData", args, endless(loader), ("litdata", "torch", "torchvision"))


if __name__ == "__main__":
    main()
