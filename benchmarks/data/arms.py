"""The arms of the benchmark: which module runs, with which interpreter, on which images."""

from dataclasses import dataclass
from typing import Literal

Images = Literal["original", "500-q90", "raw-256", "500, half raw"]


@dataclass(frozen=True)
class Arm:
    """One process: `PYTHON -m benchmarks.data.MODULE PREPARED_DIR ARGUMENTS`, which prints a JSON line.

    Attributes:
        name: as it stands in the table.
        module: below `benchmarks.data`.
        arguments: after the directory; `--images`, `--threads` and `--batch` follow.
        python: `ours` is the interpreter that runs `benchmarks.data.run`, `peers` that of the peers' environment.
        images: what it reads: the JPEGs as they are, re-encoded at 500 pixels at most, or pixels. Ratios to the limit
            are to the limit on the same images.
        times: how many times `--images` it is timed on, where it would be done in a second.
    """

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    python: Literal["ours", "peers"] = "peers"
    images: Images = "original"
    times: int = 1


TORCHVISION = "torchvision, PIL"
DALI = "DALI's file reader"
LIMITS = {"original": "limit: C loop, antialiased", "500-q90": "limit: C loop, antialiased, 500-q90"}

LIMIT = (
    Arm(LIMITS["original"], "limit", ("--work", "antialias"), "ours", times=4),
    Arm("limit: the same, uint8", "limit", ("--work", "antialias", "--output", "uint8"), "ours", times=4),
    Arm("limit: C loop, two taps", "limit", ("--work", "bilinear"), "ours", times=4),
    Arm("limit: region decode only", "limit", ("--work", "region"), "ours", times=4),
    Arm("limit: full decode only", "limit", ("--work", "full"), "ours", times=4),
    Arm(LIMITS["500-q90"], "limit", ("--work", "antialias", "--source", "folder-500-q90"), "ours", "500-q90", times=4),
)
PEERS = (
    Arm(TORCHVISION, "peers.torchvision_folder"),
    Arm("torchvision, io and transforms v2", "peers.torchvision_folder", ("--decoder", "io")),
    Arm("timm", "peers.timm_loader"),
    Arm("WebDataset, PIL", "peers.webdataset_tar"),
    Arm("WebDataset, torchvision io", "peers.webdataset_tar", ("--decoder", "io")),
    Arm("MosaicML Streaming, PIL", "peers.mosaic_streaming"),
    Arm("MosaicML Streaming, torchvision io", "peers.mosaic_streaming", ("--decoder", "io")),
    Arm("LitData", "peers.litdata_streaming"),
    Arm("Ray Data, PIL", "peers.ray_data"),
    Arm("Ray Data, torchvision io", "peers.ray_data", ("--decoder", "io")),
    Arm("tf.data", "peers.tf_data"),
    Arm(DALI, "peers.dali_reader", (), "ours"),
    Arm("DALI's file reader, 500-q90", "peers.dali_reader", ("--source", "folder-500-q90"), "ours", "500-q90"),
    Arm("FFCV, JPEG 500-q90", "peers.ffcv_beton", ("--file", "jpg-500-q90"), images="500-q90", times=2),
    Arm(
        "FFCV, JPEG 500-q90, uint8", "peers.ffcv_beton", ("--file", "jpg-500-q90", "--output", "uint8"),
        images="500-q90", times=2,
    ),
    Arm("FFCV, half JPEG 500-q90", "peers.ffcv_beton", ("--file", "half-500-q90"), images="500, half raw", times=2),
    Arm("FFCV, raw 256", "peers.ffcv_beton", ("--file", "raw-256"), images="raw-256", times=2),
    Arm(
        "FFCV, raw 256, uint8", "peers.ffcv_beton", ("--file", "raw-256", "--output", "uint8"),
        images="raw-256", times=2,
    ),
)  # fmt: skip

OURS = (
    Arm("Longhaul", "ours", ("--variant", "original"), "ours"),
    Arm("Longhaul, 500-q90", "ours", ("--variant", "500-q90"), "ours", "500-q90", times=2),
    Arm("Longhaul, raw 256", "ours", ("--variant", "raw-256"), "ours", "raw-256", times=2),
)

ARMS = (*OURS, *PEERS, *LIMIT)
