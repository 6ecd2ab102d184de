"""What every benchmark writes beside its figures: the machine and the versions."""

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "ray", "pyarrow", "numpy")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, Python and package versions, commit and time."""
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def write(name: str, figures: dict[str, Any], where: dict[str, Any]) -> Path:
    """Write `benchmarks/results/NAME.json`; `where` is what `machine()` said before measuring."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**figures, "machine": where}, indent=1) + "\n")
    return path


def events(run: Path) -> list[dict[str, Any]]:
    """The events of a run's directory."""
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
