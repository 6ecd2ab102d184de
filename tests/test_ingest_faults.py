"""`longhaul prepare` while processes are killed, disks fill up and people lose patience: really done, each of it."""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from configs import LonghaulError
from data_pipeline.ingest import local_processes, prepare
from data_pipeline.shards import Manifest
from data_pipeline.sources import Source, open_source
from tests.test_data import encode, photo, write_tree
from tests.test_ingest import contents
from tests.workers import wait_for

ROOT = Path(__file__).parent.parent
NUM_IMAGES, SHARD = 480, 2**20


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images enough for two dozen shards and a second or two of work."""
    photos = [encode(photo(400, 500, seed), quality=90) for seed in range(4)]
    files = {f"{i % 3}/{i:04d}.jpg": photos[i % 4] for i in range(NUM_IMAGES)}
    return write_tree(tmp_path_factory.mktemp("album") / "album", files)


@pytest.fixture(scope="module")
def calm(album: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What nothing has happened to."""
    out = tmp_path_factory.mktemp("calm") / "out"
    manifest = prepare(opened(album), out, SHARD)
    assert manifest.num_samples("train") + manifest.num_samples("val") == NUM_IMAGES
    assert len(manifest.splits["train"]) > 10
    return contents(out)


def opened(album: Path) -> Source:
    return open_source(str(album), 0.1)


def command(album: Path, out: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "launch.cli", "prepare", str(album), "--out", str(out), "--holdout", "0.1"),
        *("--shard-mib", "1", *more),
    ]


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts commands, each in a process group of its own; what is left of them in the end is killed."""
    processes: list[subprocess.Popen[str]] = []

    def popen(arguments: list[str], limit: int | None = None) -> subprocess.Popen[str]:
        def prepare_child() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a suite started in the background ignores it
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        processes.append(
            subprocess.Popen(
                arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                start_new_session=True, preexec_fn=prepare_child, env={**os.environ, "COLUMNS": "200"},
            )
        )  # fmt: skip
        return processes[-1]

    yield popen
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def finished(out: Path) -> int:
    """How many shards of an unfinished data set are done."""
    return len(list((out.with_name(f".{out.name}.unfinished") / "done").glob("*.json")))


@pytest.mark.slow
def test_killed_at_random_instants_it_goes_on_to_the_same_bytes(
    album: Path, calm: dict[str, str], tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    generator = random.Random(5)
    out = tmp_path / "out"
    done = []
    for _ in range(4):
        process = start(command(album, out, "--jobs", "2"))
        wait_for(lambda p=process: out.with_name(".out.unfinished").exists() or p.poll() is not None, 120, pause=0.001)
        before = finished(out)
        goal = before + generator.randrange(4)
        wait_for(lambda p=process, g=goal: finished(out) >= g or p.poll() is not None, 120, pause=0.001)
        time.sleep(generator.uniform(0, 0.05))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        done.append(finished(out))
    assert done == sorted(done) and done[-1] > 0, "what is finished stays finished"
    assert not out.exists(), "the kills came too late to test anything"
    output, _ = start(command(album, out, "--jobs", "2")).communicate(timeout=120)
    assert f"Going on: {done[-1]} of" in output
    assert contents(out) == calm
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_ctrl_c_leaves_at_once_and_says_how_to_go_on(
    album: Path, calm: dict[str, str], tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    out = tmp_path / "out"
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start(command(album, out, "--jobs", "2"))
        goal = finished(out) + 2
        wait_for(lambda g=goal: finished(out) >= g, 120, pause=0.001)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)  # as a batch system does
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 130, output
        assert "finished shards are kept. Go on with the same command:" in output and "--jobs 2" in output
        assert "Traceback" not in output and not out.exists()
    output, _ = start(command(album, out)).communicate(timeout=120)
    assert "Going on:" in output and contents(out) == calm


def test_a_killed_process_is_replaced(album: Path, calm: dict[str, str], tmp_path: Path, caplog) -> None:  # type: ignore[no-untyped-def]
    killed: list[int] = []

    def kill_one(done: int, total: int) -> None:
        if done >= 100 * (len(killed) + 1) and len(killed) < 2:
            victim = multiprocessing.active_children()[0]
            os.kill(victim.pid or 0, signal.SIGKILL)
            killed.append(done)

    prepare(opened(album), tmp_path / "out", SHARD, kill_one, executor=local_processes(2))
    assert len(killed) == 2
    assert [record.message for record in caplog.records if "SIGKILL" in record.message]
    assert contents(tmp_path / "out") == calm
    assert not multiprocessing.active_children()


def test_processes_that_keep_dying_are_given_up_and_nothing_is_lost(
    album: Path, calm: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def kill_all(done: int, total: int) -> None:
        if done >= 100:
            for child in multiprocessing.active_children():
                os.kill(child.pid or 0, signal.SIGKILL)

    with pytest.raises(LonghaulError, match=r"3 processes that wrote train-\d+.arrow died, the last killed by SIGKILL"):
        prepare(opened(album), out, SHARD, kill_all, executor=local_processes(2))
    assert finished(out) > 0 and not multiprocessing.active_children()
    prepare(opened(album), out, SHARD)
    assert contents(out) == calm


@pytest.mark.slow
def test_processes_end_when_their_parent_is_killed(
    album: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """Or they would write beside those of the command that goes on."""
    out = tmp_path / "out"
    process = start(command(album, out, "--jobs", "2"))
    wait_for(lambda: finished(out) >= 2, 120, pause=0.001)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.kill()
    process.wait()

    def is_gone(pid: str) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    wait_for(lambda: all(map(is_gone, children)), 60)
    assert finished(out) > 0 and not out.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)  # errors hold on to mapped files


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_full_disk_is_one_sentence_and_with_room_it_goes_on(
    album: Path, calm: dict[str, str], small_disk: Path, jobs: int
) -> None:
    out = small_disk / "out"
    with pytest.raises(LonghaulError, match=r"cannot be written \(No space left on device\): make room") as error:
        prepare(opened(album), out, SHARD, executor=local_processes(jobs))
    assert str(out.parent) in str(error.value) and "the same command goes on" in str(error.value)
    kept = finished(out)
    assert kept > 3
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    said: list[str] = []
    prepare(opened(album), out, SHARD, say=said.append)
    assert said[0].startswith(f"Going on: {kept} of")
    assert contents(out) == calm


def test_a_limit_on_the_size_of_files_is_one_sentence(
    album: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start(command(album, tmp_path / "out"), limit=500_000)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    (line,) = [line for line in output.splitlines() if "Error:" in line]
    assert "File too large" in line and "ulimit -f" in line and ".out.unfinished" in line
    assert "Traceback" not in output
    assert start(command(album, tmp_path / "out")).wait(120) == 0


def test_the_command_says_what_became_of_the_images(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    good = encode(photo(300, 400))
    files = {f"{label}/{i}.jpg": good for label in "ab" for i in range(5)}
    source = write_tree(tmp_path / "in", {**files, "a/cut.jpg": good[:2_000], "b/0.png": b"", "b/1.png": b""})
    out = tmp_path / "out"
    arguments = ["--max-side", "100", "--raw", "--upright", "--keep-order"]
    process = start([sys.executable, "-m", "launch.cli", "prepare", str(source), "--out", str(out), *arguments])
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    words = " ".join(output.split())
    assert "10 train; 2 classes" in words and "1 shard;" in words and "images/s" in words
    assert "3 images could not be used and were left out (2 empty, 1 truncated)" in words
    assert "quarantine.tsv" in words
    manifest = Manifest.read(out)
    assert manifest.encoding == "raw" and manifest.options["upright"] and manifest.shuffled is None
    assert json.loads((out / "manifest.json").read_text())["options"]["max_side"] == 100


def test_processes_and_ray_at_once_are_refused(
    album: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start(command(album, tmp_path / "out", "--jobs", "2", "--workers", "2"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "give one of them" in output


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_writes_the_same_bytes_and_its_errors_are_sentences(
    album: Path, calm: dict[str, str], tmp_path: Path
) -> None:
    """In a process of its own, so that Ray leaves nothing in this one."""
    script = f"""
import os, ray
from pathlib import Path
from cluster.ingest import on_ray
from cluster.runner import connect
from configs import LonghaulError
from data_pipeline.ingest import Options, WriteShard, prepare
from data_pipeline.ingest.plan import Task
from data_pipeline.sources import open_source

connect(False)
source = open_source({str(album)!r}, 0.1)
seen = []
prepare(source, Path({str(tmp_path / "out")!r}), {SHARD}, lambda done, total: seen.append(done), executor=on_ray(2))
assert seen[-1] == {NUM_IMAGES} and seen == sorted(seen), seen
work = WriteShard(Path("/nowhere"), "id", source, Options())
task = Task("train-00000.arrow", "train", 0, 1)
for attempt in (lambda: list(on_ray(1)(work, [task], print)), lambda: on_ray(10_000)):
    try:
        attempt()
    except LonghaulError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "does not see what is in /nowhere" in done.stdout and "--workers 10000: the cluster has" in done.stdout
    assert contents(tmp_path / "out") == calm
