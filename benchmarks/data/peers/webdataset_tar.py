"""WebDataset: tar shards, split over the workers, shuffled and batched in them."""

import webdataset as wds

from benchmarks.data.peers.common import arguments, measure
from benchmarks.data.peers.torch_transforms import DECODERS, from_bytes


def main() -> None:
    args = arguments(decoder=DECODERS)
    shards = sorted(str(path) for path in (args.prepared / "webdataset").glob("*.tar"))
    dataset = (
        wds.WebDataset(shards, shardshuffle=len(shards))
        .shuffle(1000)
        .to_tuple("jpg", "cls")
        .map_tuple(from_bytes(args.decoder), int)
        .batched(args.batch, partial=False)
        .repeat()
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=args.threads)
    measure(f"WebDataset ({args.decoder})", args, loader, ("webdataset", "torch", "torchvision", "pillow"))


if __name__ == "__main__":
    main()
