"""A Ray cluster on pretend machines (`tests/hosts`), made as a user makes one: `ray up`, then `ray submit`."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from getpass import getuser
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
HOSTS = ROOT / "tests" / "hosts"
VENV = Path(sys.prefix)
HEAD, *OTHERS = ADDRESSES = ["10.77.0.11", "10.77.0.12", "10.77.0.13"]


def reason_to_skip() -> str | None:
    """Why pretend machines cannot be made here, or None where they can."""
    if os.geteuid() != 0:
        return "pretend machines need root"
    for tool, package in {
        "ip": "iproute2",
        "sshd": "openssh-server",
        "rsync": "rsync",
        "nsenter": "util-linux",
    }.items():
        if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            return f"pretend machines need {tool} (Debian package {package})"
    if subprocess.run(["unshare", "-m", "-n", "-u", "-p", "-f", "true"], capture_output=True).returncode:
        return "pretend machines need namespaces, which this machine does not allow"
    if subprocess.run(["ip", "link", "show", "lhbr0"], capture_output=True).returncode == 0:
        return "other pretend machines are up (`tests/hosts down` removes them)"
    return None


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The condition's first true value; raises TimeoutError, naming `what`, when it stays false."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise TimeoutError(f"{what}: not within {seconds:.0f} s")


class Cluster:
    """Machines that `ray up` has set up. `storage` is what all of them share.

    Attributes:
        runs: where runs live.
        up_seconds: how long `ray up` took.
    """

    def __init__(self, storage: Path) -> None:
        self.name = f"pretend-{os.getpid()}"
        self.storage, self.runs = storage, storage / "runs"
        self.environment = {**os.environ, "HOSTS_DIR": str(storage / "hosts")}  # for calls of `hosts`
        self.config = storage / "cluster.yaml"
        self.config.write_text(yaml.safe_dump(self._adapted(), width=10_000))
        self._clients: list[subprocess.Popen[str]] = []
        self.up_seconds = 0.0

    def _adapted(self) -> dict[str, Any]:
        """launch/imagenet.yaml with the edits that a user makes, one core a machine, and the Python that is here."""
        config = yaml.safe_load((ROOT / "launch" / "imagenet.yaml").read_text())
        config["cluster_name"] = self.name
        config["provider"] |= {"head_ip": HEAD, "worker_ips": OTHERS}
        config["auth"] = {"ssh_user": "root", "ssh_private_key": str(self.storage / "hosts" / "ssh" / "id")}
        setup = [line.replace("$HOME/longhaul-runs", str(self.runs)) for line in config["setup_commands"]]
        config["setup_commands"] = [f"ln -sfn {VENV} ~/longhaul/.venv", *setup]
        for key in ("head_start_ray_commands", "worker_start_ray_commands"):
            config[key] = [line.replace("ray start", "ray start --num-cpus=1") for line in config[key]]
        return config

    def up(self) -> None:
        """`ray up`, which returns when the head is there; the other machines join later."""
        began = time.monotonic()
        with (self.storage / "up.log").open("w") as log:
            self._ray(["up", "-y", "--no-config-cache", str(self.config)], stdout=log).wait()
        self.up_seconds = time.monotonic() - began
        text = (self.storage / "up.log").read_text()
        assert self._clients[-1].returncode == 0, text[-3000:]

    def submit(self, *arguments: str) -> subprocess.Popen[str]:
        """`ray submit ... launch/train.py ARGUMENTS`, in a process group of its own, as in a terminal of its own."""
        return self._ray(["submit", "--no-config-cache", str(self.config), "launch/train.py", *arguments])

    def submit_to_end(self, *arguments: str, seconds: float = 240) -> tuple[int, str]:
        """The exit code of `ray submit` and everything it printed."""
        client = self.submit(*arguments)
        output, _ = client.communicate(timeout=seconds)
        return client.returncode, output

    def _ray(self, arguments: list[str], stdout: Any = subprocess.PIPE) -> subprocess.Popen[str]:
        client = subprocess.Popen(
            [VENV / "bin" / "ray", *arguments],
            cwd=ROOT, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        self._clients.append(client)
        return client

    def events(self, run: str, kind: str) -> list[dict[str, Any]]:
        """The events of one kind in a run's events.jsonl so far."""
        path = self.runs / run / "events.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        events = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in events if event["event"] == kind]

    def close(self) -> None:
        """End the clients that are still there, and remove what `ray up` keeps on this side."""
        for client in self._clients:
            if client.poll() is None:
                os.killpg(client.pid, signal.SIGKILL)
                client.wait()
        for path in Path("/tmp/ray").glob(f"cluster-{self.name}.*"):
            path.unlink()
        user, cluster = (hashlib.sha256(name.encode()).hexdigest()[:10] for name in (getuser(), self.name))
        shutil.rmtree(f"/tmp/ray_ssh_{user}/{cluster}", ignore_errors=True)


def lose_terminal(client: subprocess.Popen[str]) -> None:
    """Kill `ray submit` and its ssh at once, as when the machine that someone typed it on loses power."""
    os.killpg(client.pid, signal.SIGKILL)
    client.wait()


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Three pretend machines with Ray on them; everything is removed at the end."""
    storage = Path(tempfile.mkdtemp(prefix="longhaul-pretend-", dir="/tmp"))  # /tmp is what the machines share
    made = Cluster(storage)
    try:
        subprocess.run([HOSTS, "up", str(len(ADDRESSES))], env=made.environment, check=True, timeout=60)
        made.up()
        yield made
    finally:
        made.close()
        subprocess.run([HOSTS, "down"], env=made.environment, check=True, timeout=60)
        shutil.rmtree(storage)
