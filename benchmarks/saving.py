"""What saving a checkpoint costs: ours against torch.save and torch.distributed.checkpoint's own, interleaved.

Two processes of one thread train a network at 224 in bf16 with DDP, on tensors made beforehand. In every round each arm
saves the same state (weights and momentum) once, at the beginning of a window of steps; the round also has a window
without a save. The stall is how long the call to save holds training up; the time lost is what the window takes longer
than the one without a save, so also what writing behind the steps costs them. All arms write to the same directory;
ours alone hashes its files, forces them to the disk (fsync) and commits by a rename.

    python -m benchmarks.saving [--rounds 5]
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, machine, write

NETWORKS = {"resnet50": (8, 8), "resnet152": (4, 2)}  # micro-batch of each worker, steps of a window
ARMS = ("none", "longhaul", "torch.save", "dcp.save", "dcp.async_save")


def measure(network: str, rounds: int, directory: Path) -> None:
    """One rank's part; rank 0 writes what it found."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    from tests.workers import small_recipe
    from trainer.checkpoints.saver import Checkpointer
    from trainer.checkpoints.state import State
    from trainer.checkpoints.store import DirectoryStore
    from trainer.engines import build_engine
    from trainer.group import Rendezvous, join
    from trainer.memory import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(1)
    micro, window_steps = NETWORKS[network]
    recipe = small_recipe(
        f"model.name={network}", f"batch.size={2 * micro}", f"batch.micro={micro}", "input.size=224", "precision=bf16",
        "deterministic=false",
    )  # fmt: skip
    with join(Rendezvous.from_environment(), torch.device("cpu"), 600) as group:
        engine = build_engine(recipe, 100_000, 1000, group)
        images = torch.randn(micro, 3, 224, 224).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, 1000, (micro,))
        committed: list[float] = []
        checkpointer = Checkpointer(
            DirectoryStore(directory / "longhaul"), group, 1,
            superfluous=lambda store: store.names()[:-1], on_saved=lambda _, seconds: committed.append(seconds),
            on_failed=lambda *why: sys.exit(f"{why}"),
        )  # fmt: skip
        under_way: list[Any] = []
        own = dist.new_group(backend="gloo")

        def step(number: int) -> None:
            engine.forward_backward(images, labels, number, group.rank)
            engine.update(number, 0.01)

        def ours(number: int, state: State) -> None:
            checkpointer.save(number, state, {})

        def theirs(number: int, state: State) -> None:
            if group.rank == 0:
                torch.save(state, directory / f"{number}.pt")
            group.barrier()

        def dcp_sync(number: int, state: State) -> None:
            dcp.save(dict(state), checkpoint_id=directory / f"dcp-{number}")

        def dcp_async(number: int, state: State) -> None:
            under_way.append(dcp.async_save(dict(state), checkpoint_id=directory / f"adcp-{number}", process_group=own))

        save: dict[str, Callable[[int, State], None]] = {
            "longhaul": ours, "torch.save": theirs, "dcp.save": dcp_sync, "dcp.async_save": dcp_async
        }  # fmt: skip
        for number in range(2):
            step(number)
        found = []
        number = 10
        for round_number in range(rounds + 1):  # the first, in which buffers are made, does not count
            for arm in ARMS:
                group.barrier()
                began = time.monotonic()
                stall = 0.0
                if arm != "none":
                    engine.synchronise_buffers()
                    save[arm](number, engine.export_state())
                    stall = time.monotonic() - began
                for _ in range(window_steps):
                    step(number)
                    number += 1
                window = time.monotonic() - began
                checkpointer.wait()
                while under_way:
                    under_way.pop().result()
                done = time.monotonic() - began
                group.barrier()
                if group.rank == 0:
                    for path in [*directory.glob("*.pt"), *directory.glob("*dcp-*")]:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                if round_number:
                    found.append({"arm": arm, "stall": stall, "window": window, "until_written": done})
        if group.rank == 0:
            (newest,) = (directory / "longhaul").glob("step-*")
            sizes = {path.name: path.stat().st_size for path in sorted(newest.iterdir())}
            (directory / "found.json").write_text(
                json.dumps({"windows": found, "files": sizes, "seconds_to_commit": committed[1:]})
            )
        checkpointer.close()


def summarise(found: dict[str, Any], window_steps: int) -> dict[str, Any]:
    """Medians over the rounds, each window against the one without a save of its own round."""
    windows = {arm: [w for w in found["windows"] if w["arm"] == arm] for arm in ARMS}
    bare = [w["window"] for w in windows["none"]]
    step = statistics.median(bare) / window_steps
    rows: dict[str, Any] = {"step_seconds": step, "window_steps": window_steps, "windows_without_a_save_seconds": bare}
    for arm in ARMS[1:]:
        lost = [w["window"] - without for w, without in zip(windows[arm], bare, strict=True)]
        rows[arm] = {
            "stall_seconds": [w["stall"] for w in windows[arm]],
            "median_stall_seconds": statistics.median(w["stall"] for w in windows[arm]),
            "stall_in_steps": statistics.median(w["stall"] for w in windows[arm]) / step,
            "lost_seconds": lost,
            "median_lost_seconds": statistics.median(lost),
            "median_seconds_until_written": statistics.median(w["until_written"] for w in windows[arm]),
        }
    rows["bytes_of_files"] = found["files"]
    rows["seconds_to_commit"] = found["seconds_to_commit"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], options.rounds, Path(options.measure[1]))
        return
    where = machine()
    networks = {}
    for network in options.networks:
        with tempfile.TemporaryDirectory(dir=ROOT.parent) as scratch:
            env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                "2",
                "-m",
                "benchmarks.saving",
            ]
            command += ["--rounds", str(options.rounds), "--measure", network, scratch]
            subprocess.run(command, check=True, cwd=ROOT, env=env)
            networks[network] = summarise(json.loads((Path(scratch) / "found.json").read_text()), NETWORKS[network][1])
        print(network, json.dumps(networks[network], indent=1), flush=True)
    print(write("saving", {"what": __doc__.splitlines()[0], "networks": networks}, where))


if __name__ == "__main__":
    main()
