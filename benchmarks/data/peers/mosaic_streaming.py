"""MosaicML Streaming: MDS shards on the local disk, shuffled."""

from typing import Any

from streaming import StreamingDataLoader, StreamingDataset
from streaming.base.util import clean_stale_shared_memory

from benchmarks.data.peers.common import arguments, endless, measure
from benchmarks.data.peers.torch_transforms import DECODERS, from_bytes


class Images(StreamingDataset):
    """As in the user guide: transform in `__getitem__`."""

    def __init__(self, decoder: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.transform = from_bytes(decoder)

    def __getitem__(self, at: int) -> Any:
        sample = super().__getitem__(at)
        return self.transform(sample["image"]), sample["label"]


def main() -> None:
    args = arguments(decoder=DECODERS)
    clean_stale_shared_memory()
    dataset = Images(args.decoder, local=str(args.prepared / "mds"), shuffle=True, batch_size=args.batch)
    loader = StreamingDataLoader(dataset, batch_size=args.batch, num_workers=args.threads, drop_last=True)
    measure(
        f"MosaicML Streaming ({args.decoder})", args, endless(loader),
        ("mosaicml-streaming", "torch", "torchvision", "pillow"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
