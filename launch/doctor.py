"""`longhaul doctor`: what is there, and what will be used."""

import importlib.metadata
import importlib.util
import os
import platform

from rich.console import Console
from rich.table import Table

Row = tuple[str, str, str]


def examine(console: Console) -> None:
    """Print a table: component, what was found, what follows from it."""
    rows = [_python(), *_torch(), _dali(), _deepspeed(), _apex(), _ray()]
    table = Table("component", "found", "so")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Row:
    return (
        "Python",
        platform.python_version(),
        f"{len(os.sched_getaffinity(0))} CPU cores to share among workers",
    )


def _torch() -> list[Row]:
    import torch
    import torch.distributed as dist

    from trainer.run import has_fast_bf16

    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    precision = "bf16 autocast" if has_fast_bf16(device) else "fp32 (no bf16 in this hardware)"
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if gpus and dist.is_nccl_available() else "not usable"
    return [
        ("torch", torch.__version__, f"precision auto means {precision}, channels-last"),
        ("CUDA", ", ".join(gpus) or "no GPU visible", "trains on GPUs" if gpus else "trains on the CPU"),
        ("NCCL", nccl, "gradients through NCCL" if gpus else "gradients through gloo"),
    ]


def _dali() -> Row:
    names = [f"nvidia-dali-cuda{major}0" for major in (13, 12, 11)]
    found = next((v for name in names if (v := _version(name)) is not None), None)
    if found is None:
        return "DALI", "missing", "training cannot start: make install"
    import torch

    return "DALI", found, "decodes on the GPU" if torch.cuda.is_available() else "decodes on the CPU"


def _deepspeed() -> Row:
    found = _version("deepspeed")
    return (
        "DeepSpeed",
        found or "missing",
        "installed, no engine uses it yet" if found else "not needed by engine ddp",
    )


def _apex() -> Row:
    # The extension, not the package: a Python-only build imports, then fails; the index's `apex` is another thing.
    found = importlib.util.find_spec("amp_C") is not None
    return (
        "apex (amp_C)",
        "there" if found else "not there",
        "optimizer.implementation=apex uses it; torch's fused kernels do the same work",
    )


def _ray() -> Row:
    address = os.environ.get("RAY_ADDRESS")
    return (
        "Ray",
        _version("ray") or "missing",
        f"joins {address}" if address else "joins a running cluster, or starts one here",
    )
