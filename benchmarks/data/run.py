"""ImageNet training input on a CPU, side by side: images/s of Longhaul, of every public peer, and of the limit in C.

    python -m benchmarks.data.run PREPARED_DIR --peers-python VENV/bin/python

Each arm is a process of its own; the arms take turns, in an order rotated from round to round, on files in the page
cache. What counts is the median of the rounds. An arm that fails is reported and stops no other.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, machine, write
from benchmarks.data.arms import ARMS, DALI, LIMITS, TORCHVISION, Arm

TIMEOUT_SECONDS = 600


def warm(prepared: Path) -> None:
    """Read every file once, so that all of them lie in the page cache."""
    for path in prepared.rglob("*"):
        if path.is_file():
            path.read_bytes()


def run_arm(arm: Arm, args: argparse.Namespace) -> dict[str, Any]:
    """The line that the arm prints, or {"error": its last words}; with the load average before it."""
    python = sys.executable if arm.python == "ours" else str(args.peers_python)
    numbers = {"images": args.images * arm.times, "threads": args.threads, "batch": args.batch}
    command = [python, "-m", f"benchmarks.data.{arm.module}", str(args.prepared.resolve()), *arm.arguments]
    for name, number in numbers.items():
        command += [f"--{name}", str(number)]
    load = os.getloadavg()[0]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
            timeout=TIMEOUT_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {TIMEOUT_SECONDS} s", "load_before": load}
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"peer"')]
    if done.returncode or not lines:
        return {"error": done.stderr.strip()[-2000:] or f"exit status {done.returncode}", "load_before": load}
    return {**json.loads(lines[-1]), "load_before": load}


def measure(args: argparse.Namespace, arms: list[Arm]) -> list[dict[str, Any]]:
    """One row an arm: what the rounds gave, and their median."""
    rounds: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
    for number in range(args.rounds):
        turn = number * len(arms) // args.rounds
        for arm in arms[turn:] + arms[:turn]:
            result = run_arm(arm, args)
            rounds[arm.name].append(result)
            said = result.get("images_per_second") or f"failed: {result['error'].splitlines()[-1]}"
            print(f"round {number + 1}  {arm.name}: {said}", file=sys.stderr, flush=True)
    return [row(arm, rounds[arm.name]) for arm in arms]


def row(arm: Arm, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The rounds of one arm as a row of the table."""
    good = [result for result in results if "error" not in result]
    speeds = [result["images"] / result["seconds"] for result in good]
    return {
        "arm": arm.name, "source": arm.images, "module": arm.module, "arguments": arm.arguments,
        "images_per_second": round(statistics.median(speeds), 1) if speeds else None,
        "rounds": [round(speed, 1) for speed in speeds],
        "load_before": [round(result["load_before"], 2) for result in results],
        **{key: good[0].get(key) for key in ("images", "dtype", "layout", "mean", "std", "versions") if good},
        "errors": [result["error"] for result in results if "error" in result],
    }  # fmt: skip


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """To torchvision with PIL, to DALI's reader, and to the limit on the same images; None where there is none."""
    speed = {r["arm"]: r["images_per_second"] for r in rows}
    for r in rows:
        others = {"to_torchvision": TORCHVISION, "to_dali": DALI, "to_limit": LIMITS.get(r["source"])}
        for key, other in others.items():
            base = speed.get(other)
            r[key] = round(r["images_per_second"] / base, 3) if base and r["images_per_second"] else None


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, slowest first; the failed ones last."""
    lines = [
        "| path | images | output | images/s | to torchvision, PIL | to DALI's reader | to the limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: r["images_per_second"] or float("inf")):
        ratios = ["-" if r[key] is None else f"{r[key]:.2f}" for key in ("to_torchvision", "to_dali", "to_limit")]
        speed = f"{r['images_per_second']:,.0f}" if r["images_per_second"] else "failed"
        output = f"{r.get('dtype', '-')} {r.get('layout', '')}".strip()
        lines.append(f"| {r['arm']} | {r['source']} | {output} | {speed} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path, help="what benchmarks.data.prepare made")
    parser.add_argument("--peers-python", type=Path, required=True, help="interpreter of the peers' environment")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=4000, help="timed images an arm and round, after a warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only arms whose names contain one of these")
    parser.add_argument("--name", default="data-train", help="of the file in benchmarks/results")
    args = parser.parse_args()
    arms = [arm for arm in ARMS if not args.only or any(text in arm.name for text in args.only)]
    where = machine()
    warm(args.prepared)
    rows = measure(args, arms)
    add_ratios(rows)
    print(table(rows))
    settings = {key: getattr(args, key) for key in ("rounds", "images", "threads", "batch")}
    print(write(args.name, {"what": __doc__.splitlines()[0], **settings, "rows": rows}, where))


if __name__ == "__main__":
    main()
