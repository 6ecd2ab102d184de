"""Hands a run to a Ray cluster and follows it: `ray submit launch/imagenet.yaml launch/train.py --recipe resnet50`.

`ray submit` copies this one file to the head and runs it there over ssh, so it needs nothing but Python and finds the
rest in ~/longhaul, where `ray up` has put the repository. The run becomes a job of Ray's job server: what happens to
the ssh connection, and to this process, does not touch it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

COMMAND = "ray submit launch/imagenet.yaml launch/train.py"
SERVER = "http://127.0.0.1:8265"
STOP_SECONDS = 600  # how long a stopped run may take over its checkpoint before Ray kills it; by default 3
JOIN_SECONDS = 600  # how long machines may take to join: the first `ray up` installs some GB on each
EXCLUDED = ["/.venv", "/.git", "/runs", "/data", "/build", "__pycache__", ".*_cache", ".hypothesis"]
RETRIES = 30  # a second apart, when the connection to the job server breaks
SHOWN_LINES = 20  # of the log so far, when a running job is followed again


class UserError(Exception):
    """Something the user can mend; the message says how."""


@dataclass(frozen=True)
class Run:
    """A run as the job server knows it: where it lives, and the command that trains it."""

    path: Path
    entrypoint: str

    @property
    def name(self) -> str:
        return self.path.name


def main(arguments: list[str]) -> int:
    """Submit, attach or pause as the arguments say; returns the exit code."""
    try:
        home = find_home()
        use_its_python(home, arguments)
        options = parse(arguments)
        client = connect()
        if options.attach is not None:
            return follow(client, choose_job(client, options.attach), SHOWN_LINES)
        if options.pause is not None:
            return pause(client, choose_job(client, options.pause))
        return train(client, home, options)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130


def find_home() -> Path:
    """The repository on this machine: $LONGHAUL_HOME, the one this file lies in, or ~/longhaul."""
    beside = Path(__file__).resolve().parent.parent
    fallback = beside if (beside / "launch" / "cli.py").is_file() else Path.home() / "longhaul"
    home = Path(os.environ.get("LONGHAUL_HOME", fallback)).absolute()
    if not (home / "launch" / "cli.py").is_file():
        raise UserError(f"Longhaul is not in {home} on this machine: `ray up launch/imagenet.yaml` puts it there.")
    return home


def use_its_python(home: Path, arguments: list[str]) -> None:
    """Go on in the repository's own Python, in place of whichever `python` the login shell found."""
    python = home / ".venv" / "bin" / "python"
    if python.is_file() and not Path(sys.prefix).samefile(home / ".venv"):
        os.execv(python, [str(python), __file__, *arguments])
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # as launch/imagenet.yaml has it; read when Ray is imported


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `python launch/train.py --help` shows what there is.")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line, checked as far as it can be without the cluster."""
    parser = _Parser(
        usage=f"{COMMAND} --recipe NAME [options] [key=value ...]",
        description="Train a recipe on the cluster, or go on with a run that is there.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    add("--recipe", help="a recipe's name, or a YAML file in the repository")
    add("--name", help="the run's name (default: the recipe's); the same name again resumes it")
    add("--data", help="the data set: a directory on storage that all machines share, or a URL (s3://...)")
    add("--cache-dir", help="where each machine keeps shards of a URL (default: ~/.cache/longhaul)")
    add("--cache-bytes", help="the most they may take on each machine, as 200GB (default: 80 %% of what is free)")
    add("--checkpoints", help="a directory or URL under which checkpoints go, rather than into the run's own")
    add("--runs", type=Path, help="where runs live, shared too (default: LONGHAUL_RUNS in launch/imagenet.yaml)")
    add("--workers", help="training processes (default: one for each GPU of the cluster, else for each core)")
    add("--machines", type=int, help="start when so many machines are there (default: all in launch/imagenet.yaml)")
    add("--device", choices=("auto", "cpu", "cuda"), help="default: auto")
    add("--threads", help="CPU threads of a worker")
    add("--max-failures", help="how often workers may be lost before giving up")
    add("--allow-changes", action="store_true", help="resume although the recipe changed")
    add("--no-wait", action="store_true", help="submit, and do not follow")
    add("--attach", nargs="?", const="", metavar="NAME", help="follow a run that is under way")
    add(
        "--pause", nargs="?", const="", metavar="NAME", help="save a checkpoint and end a run; the same name resumes it"
    )
    options = parser.parse_intermixed_args(arguments)
    if options.attach is None and options.pause is None:
        _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    if not options.recipe:
        raise UserError("--recipe is missing, for example --recipe resnet50.")
    stray = [text for text in options.overrides if "=" not in text]
    if stray:
        raise UserError(
            f"'{stray[0]}' is neither an option nor key=value; `ray submit` splits arguments at spaces, quoted or not."
        )
    options.name = options.name or Path(options.recipe).stem
    if not re.fullmatch(r"\w[\w.-]*", options.name, re.ASCII):
        raise UserError(f"--name {options.name}: use letters, digits, '-', '_' and '.' only.")


def connect() -> JobSubmissionClient:
    """The head's job server, which listens on the head itself only."""
    from ray.job_submission import JobSubmissionClient

    for module in ("", ".dashboard.modules.job.sdk", ".dashboard.modules.dashboard_sdk"):  # of packages and sockets
        logging.getLogger(f"ray{module}").setLevel(logging.ERROR)
    address = os.environ.get("RAY_API_SERVER_ADDRESS", SERVER)
    try:
        return JobSubmissionClient(address)
    except ConnectionError:
        raise UserError(f"Ray does not answer at {address}: `ray up launch/imagenet.yaml` starts it.") from None


def train(client: JobSubmissionClient, home: Path, options: argparse.Namespace) -> int:
    """Submit the run, or find the job that is at it already, and follow it."""
    check_recipe(home, options)
    run = describe_run(options)
    running = [job for job in our_jobs(client) if is_alive(job) and _path(job) == str(run.path)]
    if running and running[0].entrypoint != run.entrypoint:
        raise UserError(
            f"{run.name} is running already, as job {running[0].submission_id}, and not with these arguments. "
            f"Follow it with --attach {run.name}, or end it with --pause {run.name} first."
        )
    if running:
        print(f"{run.name} is running already; this is job {running[0].submission_id}.", flush=True)
        return 0 if options.no_wait else follow(client, str(running[0].submission_id), SHOWN_LINES)
    wait_for_machines(expected_machines(), options.machines)
    job_id = submit(client, home, run)
    print(
        f"{run.name} is now job {job_id} of the cluster and goes on without this terminal.\n"
        f"  follow it again:  {COMMAND} --attach {run.name}\n"
        f"  pause it:         {COMMAND} --pause {run.name}",
        flush=True,
    )
    return 0 if options.no_wait else follow(client, job_id)


def check_recipe(home: Path, options: argparse.Namespace) -> None:
    """Refuse a wrong recipe now, and not in a job seconds later. A file is looked for in the repository."""
    if options.recipe.endswith((".yaml", ".yml")):
        options.recipe = str(home / options.recipe)
    sys.path.insert(0, str(home))
    from configs import LonghaulError, load_recipe

    try:
        load_recipe(options.recipe, options.overrides)
    except LonghaulError as error:
        raise UserError(str(error)) from None


def describe_run(options: argparse.Namespace) -> Run:
    """The command that the job runs. Its own directory is a copy that goes away, so every path in it is absolute."""
    runs = options.runs or Path(os.environ.get("LONGHAUL_RUNS", "~/longhaul-runs"))
    path = runs.expanduser().absolute() / options.name
    words = [sys.executable, "-m", "launch.cli", "train", options.recipe, *options.overrides]
    words += ["--name", options.name, "--runs", str(path.parent)]
    for option in ("data", "checkpoints"):
        value = getattr(options, option)
        if value is not None:
            words += [f"--{option}", value if "://" in value else str(Path(value).expanduser().absolute())]
    for option in ("workers", "device", "threads", "max_failures", "cache_dir", "cache_bytes"):
        value = getattr(options, option)
        if value is not None:
            words += [f"--{option.replace('_', '-')}", str(value)]
    if options.allow_changes:
        words.append("--allow-changes")
    return Run(path, f"exec {shlex.join(words)}")  # exec: a stop reaches the trainer itself, with no shell between


def expected_machines() -> list[str]:
    """The addresses in the YAML file that `ray up` was given; none where Ray was started by hand."""
    config = Path.home() / "ray_bootstrap_config.yaml"  # written by `ray up`, as JSON
    if not config.is_file():
        return []
    provider = json.loads(config.read_text())["provider"]
    return [provider["head_ip"], *provider["worker_ips"]] if "head_ip" in provider else []


def wait_for_machines(expected: list[str], enough: int | None) -> None:
    """`ray up` returns when the head is up, and the others join half a minute later; a run counts what is there."""
    enough = len(expected) if enough is None else enough
    deadline = time.monotonic() + JOIN_SECONDS
    told = False
    while len(there := machines_there()) < enough:
        missing = ", ".join(sorted(set(expected) - there)) or "more machines"
        if not told:
            print(
                f"{len(there)} of {enough} machines are there; waiting for {missing}. Nothing is submitted yet. "
                f"(--machines {len(there)} starts without waiting.)",
                flush=True,
            )
            told = True
        if time.monotonic() > deadline:
            raise UserError(
                f"{missing} did not join within {JOIN_SECONDS // 60} minutes; why is told by "
                f"`ray exec launch/imagenet.yaml 'tail -n 100 /tmp/ray/session_latest/logs/monitor*'`. "
                f"--machines {len(there)} starts without."
            )
        time.sleep(1)


def machines_there() -> set[str]:
    """Addresses of the machines that are in the cluster now."""
    from ray.util.state import list_nodes

    nodes = list_nodes(os.environ.get("RAY_API_SERVER_ADDRESS", SERVER), filters=[("state", "=", "ALIVE")])
    return {node.node_ip for node in nodes}


def submit(client: JobSubmissionClient, home: Path, run: Run) -> str:
    """Start the job and return its id: the run's name and a number, so that two cannot start the same at once."""
    earlier = [str(job.submission_id) for job in client.list_jobs()]
    numbers = [int(job.rpartition(".")[2]) for job in earlier if re.fullmatch(rf"{re.escape(run.name)}\.\d+", job)]
    job_id = f"{run.name}.{max(numbers, default=0) + 1}"
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), "LONGHAUL_COMMAND": f"{COMMAND} {_typed()}"}
    try:
        return client.submit_job(
            entrypoint=run.entrypoint,
            submission_id=job_id,
            metadata={"longhaul_run": str(run.path)},
            runtime_env={"working_dir": str(home), "excludes": EXCLUDED, "env_vars": environment},
        )
    except RuntimeError as error:
        raise UserError(f"Ray refused the job: {_first_line(error)}") from error


def _typed() -> str:
    return shlex.join(sys.argv[1:])


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def our_jobs(client: JobSubmissionClient) -> list[JobDetails]:
    """The jobs that this program submitted, newest first."""
    jobs = [job for job in client.list_jobs() if _path(job)]
    return sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)


def _path(job: JobDetails) -> str:
    return (job.metadata or {}).get("longhaul_run", "")


def is_alive(job: JobDetails) -> bool:
    return not job.status.is_terminal()


def choose_job(client: JobSubmissionClient, name: str) -> str:
    """The newest job of the run (or with the id) `name`; without a name the only run under way, or the last one."""
    jobs = our_jobs(client)
    running = [job for job in jobs if is_alive(job)]
    if not name and len(running) > 1:
        names = ", ".join(Path(_path(job)).name for job in running)
        raise UserError(f"{len(running)} runs are under way; name one of {names}.")
    matching = [job for job in jobs if name in ("", Path(_path(job)).name, job.submission_id)]
    if not matching:
        known = ", ".join(sorted({Path(_path(job)).name for job in jobs}))
        raise UserError(f"No run {name or 'at all'} on this cluster" + (f"; there are {known}." if known else "."))
    return str((running or matching)[0].submission_id if not name else matching[0].submission_id)


def pause(client: JobSubmissionClient, job_id: str) -> int:
    """Ask the run to save a checkpoint and end, and show how it does."""
    if client.get_job_status(job_id).is_terminal():
        raise UserError(f"{job_id} is not running.")
    seen = len(client.get_job_logs(job_id))
    client.stop_job(job_id)
    _show(client, job_id, seen)
    status = client.get_job_status(job_id)
    print(f"Job {job_id}: {status.value.lower()}.", flush=True)
    return 0 if status.value in ("STOPPED", "SUCCEEDED") else 1


def follow(client: JobSubmissionClient, job_id: str, last_lines: int | None = None) -> int:
    """Show the job's log to its end (from the beginning, or the last lines of what there is), and how it ended."""
    seen = 0
    if last_lines is not None:
        log = client.get_job_logs(job_id)
        seen = len(log)
        print("".join(log.splitlines(keepends=True)[-last_lines:]), end="", flush=True)
    try:
        _show(client, job_id, seen)
    except KeyboardInterrupt:
        print(f"\nLeft {job_id}, which goes on; {COMMAND} --attach follows it again.", flush=True)
        return 0
    return conclude(client, job_id)


def conclude(client: JobSubmissionClient, job_id: str) -> int:
    """Say what the log could not, and turn the job's end into an exit code."""
    details = client.get_job_info(job_id)
    if details.status.value == "FAILED" and details.driver_exit_code is None:  # it ended without a word in the log
        print(f"Error: job {job_id}: {details.message}", file=sys.stderr)
    if details.status.value == "STOPPED":
        print(f"Job {job_id} was stopped; the same command resumes the run.", flush=True)
    return 0 if details.status.value == "SUCCEEDED" else (details.driver_exit_code or 1)


def _show(client: JobSubmissionClient, job_id: str, seen: int) -> None:
    """Print the log from character `seen` on until the job has ended, however often the connection breaks."""
    failures = 0
    while failures < RETRIES:
        before = seen
        seen, complete = asyncio.run(_show_connected(client, job_id, seen))
        if complete:
            return
        failures = 1 if seen > before else failures + 1
        time.sleep(1)
    raise UserError(f"The head's job server does not answer; {job_id} may go on: --attach follows it again.")


async def _show_connected(client: JobSubmissionClient, job_id: str, seen: int) -> tuple[int, bool]:
    """Print what the job server sends after character `seen`; returns the new `seen`, and whether that was all."""
    import aiohttp

    position = 0
    try:
        async for text in client.tail_job_logs(job_id):  # always from the beginning
            print(text[max(0, seen - position) :], end="", flush=True)
            position += len(text)
    except (RuntimeError, aiohttp.ClientError):
        return max(seen, position), False
    return max(seen, position), True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
