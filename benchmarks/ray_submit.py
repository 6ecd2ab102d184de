"""Seconds from `ray submit` to the first step, and from `ray up` to a whole cluster, on three pretend machines.

The machines are namespaces of this one (tests/hosts), so all three share its cores; each runs one worker of one thread.
The environment is installed beforehand. The first step is when the step's event is written, after its update.

    python -m benchmarks.ray_submit --times 5      (as root)
"""

import argparse
import subprocess
import sys
import time

from benchmarks.common import machine, write
from tests import pretend
from tests.pretend import Cluster, wait_for

ARGUMENTS = (
    "--recipe",
    "digits",
    "--workers",
    "3",
    "--threads",
    "1",
    "batch.micro=16",
    "log.every=1it",
    "duration=1ep",
)


def joined_after(cluster: Cluster, began: float) -> float:
    """Seconds from `began` until Ray lists all machines as alive."""

    def all_there() -> bool:
        listing = subprocess.run(
            [pretend.HOSTS, "ssh", "1", "bash -lic 'ray list nodes --filter state=ALIVE' 2>/dev/null"],
            env=cluster.environment, capture_output=True, text=True,
        ).stdout  # fmt: skip
        return all(address in listing for address in pretend.ADDRESSES)

    wait_for(all_there, 120, "all machines in the cluster")
    return time.time() - began


def submit_once(cluster: Cluster, name: str) -> dict[str, float]:
    """One run: seconds from the command to the start event, to the first step, and to the command's return."""
    began = time.time()
    code, output = cluster.submit_to_end(*ARGUMENTS, "--name", name)
    if code:
        sys.exit(output)
    moments = {
        "workers_ready": cluster.events(name, "start")[0]["time"],
        "first_step": cluster.events(name, "step")[0]["time"],
        "returned": time.time(),
    }
    return {what: round(moment - began, 1) for what, moment in moments.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    times = parser.parse_args().times
    reason = pretend.reason_to_skip()
    if reason is not None:
        sys.exit(reason)
    where = machine()
    with pretend.cluster() as cluster:
        joined = joined_after(cluster, time.time() - cluster.up_seconds)
        runs = [submit_once(cluster, f"run{i}") for i in range(times)]
    figures = {
        "ray_up_seconds": round(cluster.up_seconds, 1),
        "all_machines_joined_seconds": round(joined, 1),
        "from_ray_submit_seconds": runs,
    }
    print(figures)
    print(write("ray-submit", figures, where))


if __name__ == "__main__":
    main()
