"""Ray Data: Parquet files of JPEGs, decoded and transformed in `map_batches`, read by `iter_torch_batches`.

At most two tasks run at a time, and the batches cross Ray's object store.
"""

from typing import Any

import numpy as np
import ray
import torch

from benchmarks.data.peers.common import arguments, endless, measure
from benchmarks.data.peers.torch_transforms import DECODERS, from_bytes


def transform(batch: dict[str, Any], decoder: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    decode = from_bytes(decoder)
    return {"image": np.stack([decode(jpeg).numpy() for jpeg in batch["image"]]), "label": batch["label"]}


def main() -> None:
    args = arguments(decoder=DECODERS)
    ray.init(num_cpus=args.threads, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.read_parquet(str(args.prepared / "parquet"), shuffle="files").map_batches(
        transform, batch_size=args.batch, fn_kwargs={"decoder": args.decoder}
    )
    batches = dataset.iter_torch_batches(batch_size=args.batch, prefetch_batches=2, drop_last=True)
    measure(
        f"Ray Data ({args.decoder})", args, endless(batches), ("ray", "torch", "torchvision", "pyarrow"),
        images_of=lambda batch: batch["image"],
    )  # fmt: skip


if __name__ == "__main__":
    main()
