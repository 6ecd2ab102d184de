"""Data sets on remote storage: the same samples as from a directory, through a bounded cache, whatever fails."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import LonghaulError
from data_pipeline.cache import Cache, parse_bytes
from data_pipeline.feed import sound
from data_pipeline.ingest import prepare
from data_pipeline.order import Order, WindowedOrder
from data_pipeline.remote import RemoteShards, sequential_windows, two_windows_bytes
from data_pipeline.shards import Manifest, Shard
from data_pipeline.sources import open_source
from data_pipeline.split import Split
from data_pipeline.storage import Store, parse_location
from launch.cli import main
from launch.train import describe_run, parse
from tests import workers
from tests.fetcher import start_fetchers
from tests.s3 import Proxy, serve, upload
from tests.workers import different, final_state, make_job, refusal, start, train, wait, wait_for
from trainer.fetching import is_sorted, require_room, warn_of_sorted_shards
from trainer.job import Job
from trainer.rundir import RunDirectory
from trainer.score import How, Target, score_checkpoints
from trainer.telemetry import Telemetry
from trainer.verify import verify

URL = "s3://bucket/digits"
WINDOW = 4
WINDOWED = ("order.kind=windowed", f"order.shards={WINDOW}")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "digits"
    prepare(open_source("digits", 0.0), out, shard_bytes=30_000)
    return out


@pytest.fixture(scope="module")
def server(digits: Path) -> Iterator[tuple[Proxy, dict[str, str]]]:
    with pytest.MonkeyPatch.context() as patch, serve() as (proxy, environment):
        for name, value in environment.items():
            patch.setenv(name, value)
        upload(digits, URL)
        yield proxy, environment


@pytest.fixture
def proxy(server: tuple[Proxy, dict[str, str]]) -> Iterator[Proxy]:
    """The way to the server, working and with nothing counted."""
    proxy, _ = server
    proxy.gets.clear()
    yield proxy
    proxy.bytes_per_second = 0
    for thread in threading.enumerate():
        if thread.name.startswith("shards"):  # what a closed split was still fetching must not count for the next test
            thread.join(timeout=30)


@pytest.fixture(scope="module")
def environment(server: tuple[Proxy, dict[str, str]]) -> dict[str, str]:
    return server[1]


@pytest.fixture(scope="module")
def manifest(digits: Path) -> Manifest:
    return Manifest.read(digits)


def small_limit(manifest: Manifest) -> int:
    """Room for what a windowed run needs, and little more: much less than the data set."""
    needed = two_windows_bytes(manifest.splits["train"], WINDOW) + two_windows_bytes(manifest.splits["val"], 4)
    limit = needed + sum(index.bytes for index in manifest.indexes.values())
    assert limit < 0.6 * sum(shard.bytes for shards in manifest.splits.values() for shard in shards)
    return limit


def size_of(cache: Path) -> int:
    total = 0
    for path in cache.iterdir():
        with suppress(FileNotFoundError):  # renamed or evicted by now
            total += path.stat().st_size
    return total


def mapped_files(cache: Path) -> int:
    """How many files of the cache this process has mapped, evicted ones too."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split(maxsplit=5)[5] for line in lines if str(cache) in line})


# --- places and sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("200GB", 200 * 10**9), ("1.5TB", 15 * 10**11), ("64GiB", 64 * 2**30), ("64 gib", 64 * 2**30), ("10", 10),
        ("3M", 3 * 10**6), ("7kB", 7_000), ("12B", 12),
    ],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "0GB", "-1GB", "1PB", "1,5GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(LonghaulError, match=r"is not a size: write it as 200GB"):
        parse_bytes(text)


def test_a_url_stays_as_it_is_and_a_directory_becomes_absolute() -> None:
    assert parse_location("s3://bucket/data/") == "s3://bucket/data"
    assert parse_location("data/x") == Path.cwd() / "data/x"
    assert parse_location("file:///data/x") == Path("/data/x")


# --- reading -------------------------------------------------------------------------------------------------------


def test_a_split_at_a_url_is_the_split_in_the_directory(digits: Path, proxy: Proxy, tmp_path: Path) -> None:
    for name in ("train", "val"):
        local, remote = Split(digits, name), Split(URL, name, Cache(tmp_path))
        assert len(remote) == len(local) and remote.fingerprint == local.fingerprint
        assert np.array_equal(remote.labels, local.labels) and np.array_equal(remote.sizes, local.sizes)
        assert not any(file.startswith(f"{name}-") for file in proxy.shard_gets()), "only the index so far"
        for ids in np.array_split(np.arange(len(local)), 20):
            for one, other in zip(remote.images(ids), local.images(ids), strict=True):
                assert np.array_equal(one, other)
        assert remote.key(len(local) - 1) == local.key(len(local) - 1)
        remote.close()
    assert set(proxy.shard_gets().values()) == {1}, "each file was fetched once"


def test_the_cache_keeps_its_limit_and_views_outlive_the_shards_that_they_look_into(
    digits: Path, proxy: Proxy, manifest: Manifest, tmp_path: Path
) -> None:
    limit = small_limit(manifest)
    local, remote = Split(digits, "train"), Split(URL, "train", Cache(tmp_path, limit))
    order = WindowedOrder(3, len(local), 32, 32, tuple(shard.rows for shard in local.shards), WINDOW)
    assert remote.remote is not None
    remote.remote.follow(order.windows(0, 90))
    first = order.micro_batch(0, 0)[1]
    views = remote.images(first)
    for step in range(1, 90):  # two epochs
        ids = order.micro_batch(step, 0)[1]
        for one, other in zip(remote.images(ids), local.images(ids), strict=True):
            assert np.array_equal(one, other)
        assert size_of(tmp_path) <= limit
        # The windows being read and fetched, those that `views` hold, and the index.
        assert mapped_files(tmp_path) <= 2 * WINDOW + WINDOW + 1
    assert not any((tmp_path / remote.shards[shard].sha256).exists() for shard in next(order.windows(0, 1)))
    for view, other in zip(views, local.images(first), strict=True):
        assert np.array_equal(view, other), "evicted and closed, but still readable"
    remote.close()
    del views, view
    assert mapped_files(tmp_path) <= 2 * WINDOW + 1
    assert remote.remote.traffic["evicted_bytes"] > limit


@settings(max_examples=25)
@given(st.data())
def test_any_walk_through_any_windows_gives_the_right_shards(digits: Path, data: st.DataObject) -> None:
    """Batches that skip windows, span several, come late or are not foreseen: every shard is the one asked for."""
    manifest = Manifest.read(digits)
    shards = manifest.splits["train"]
    numbers = st.lists(st.integers(0, len(shards) - 1), min_size=1, max_size=6, unique=True)
    windows = data.draw(st.lists(numbers, max_size=8))
    cache = digits.parent / "cache"
    remote = RemoteShards(Store(f"file://{digits}"), shards, Cache(cache, 2**30))
    remote.follow(windows)
    for batch in data.draw(st.lists(numbers, max_size=10)):
        mapped = remote.batch(batch)
        for number in batch:
            first = sum(shard.rows for shard in shards[:number])
            assert mapped[number].key(first) == Split(digits, "train").key(first)
    remote.close()


def test_a_shard_is_fetched_before_it_is_asked_for(proxy: Proxy, manifest: Manifest, tmp_path: Path) -> None:
    shards = manifest.splits["train"]
    remote = RemoteShards(Store(URL), shards, Cache(tmp_path))
    remote.follow([[7, 3], [5, 1], [2]])
    assert not proxy.gets
    remote.batch([3])
    wait_for(lambda: len(proxy.shard_gets()) == 4)
    remote.batch([1])
    wait_for(lambda: len(proxy.shard_gets()) == 5)
    remote.close()
    assert proxy.shard_gets() == {shards[number].file: 1 for number in (7, 3, 5, 1, 2)}


# --- the cache -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_that_want_the_same_shards_fetch_each_once(proxy: Proxy, tmp_path: Path) -> None:
    """At full speed, many times: what is decided in moments goes wrong now and then only."""
    assert wait(start_fetchers(3, URL, tmp_path, proxy, rounds=12)) == [0] * 3
    gets = proxy.shard_gets()
    assert len(gets) == 36 and set(gets.values()) == {12}, gets
    assert not list(tmp_path.glob("*/*.part"))


def test_processes_that_meet_at_slow_downloads_fetch_each_once(proxy: Proxy, tmp_path: Path) -> None:
    assert wait(start_fetchers(2, URL, tmp_path, proxy, bytes_per_second=300_000)) == [0] * 2
    gets = proxy.shard_gets()
    assert len(gets) == 36 and set(gets.values()) == {1}, gets


def test_a_kill_while_fetching_leaves_nothing_wrong(digits: Path, proxy: Proxy, tmp_path: Path) -> None:
    processes = start_fetchers(2, URL, tmp_path, proxy, bytes_per_second=10_000)
    wait_for(lambda: any(part.stat().st_size for part in tmp_path.glob("*.part")))
    workers.kill(processes, signal.SIGKILL)
    wait(processes)
    assert list(tmp_path.glob("*.part")), "the kill fell into a download"
    proxy.bytes_per_second = 0
    cache = Cache(tmp_path)
    assert not list(tmp_path.glob("*.part"))
    local, remote = Split(digits, "train"), Split(URL, "train", cache)
    ids = np.arange(len(local))
    assert all(np.array_equal(a, b) for a, b in zip(remote.images(ids), local.images(ids), strict=True))
    remote.close()


def test_a_process_takes_over_what_a_killed_one_was_fetching(proxy: Proxy, tmp_path: Path) -> None:
    victim, survivor = start_fetchers(2, URL, tmp_path, proxy, bytes_per_second=10_000)
    wait_for(lambda: list(tmp_path.glob("*.part")))
    workers.kill([victim])
    proxy.bytes_per_second = 0
    assert wait([survivor]) == [0]
    wait([victim])


def one_shard(manifest: Manifest) -> Shard:
    return manifest.splits["train"][0]


def test_a_copy_that_was_cut_short_is_fetched_again(proxy: Proxy, manifest: Manifest, tmp_path: Path) -> None:
    shard, cache = one_shard(manifest), Cache(tmp_path)
    for _ in range(2):
        with cache.hold(Store(URL), shard) as path:
            os.truncate(path, shard.bytes - 1)
    with cache.hold(Store(URL), shard) as path:
        assert path.stat().st_size == shard.bytes
    assert proxy.shard_gets() == {shard.file: 3}


def test_a_copy_that_cannot_be_read_is_fetched_again(digits: Path, proxy: Proxy, tmp_path: Path) -> None:
    split = Split(URL, "train", Cache(tmp_path))
    split.images(np.array([0]))
    split.close()
    for name in (split.shards[0].sha256, split.manifest.indexes["train"].sha256):
        copy = tmp_path / name
        copy.write_bytes(copy.read_bytes()[:-100] + bytes(100))
    again = Split(URL, "train", Cache(tmp_path))
    assert np.array_equal(again.images(np.array([0]))[0], Split(digits, "train").images(np.array([0]))[0])
    again.close()
    gets = proxy.shard_gets()
    assert gets["train.index.arrow"] == gets["train-00000.arrow"] == 2 and gets["train-00001.arrow"] == 1


def test_a_damaged_image_is_found_and_its_copy_dropped(proxy: Proxy, tmp_path: Path) -> None:
    split = Split(URL, "train", Cache(tmp_path))
    copy = tmp_path / split.shards[0].sha256
    image = bytes(split.images(np.array([0]))[0])
    content = bytearray(copy.read_bytes())
    content[content.index(image) + 20] ^= 1
    copy.write_bytes(content)
    ids = np.array([1, 0])
    assert split.damaged(ids, split.images(ids)) == [1]
    assert not copy.exists() and "s3://bucket/digits/train-00000.arrow, row 0" in split.where(0)
    split.close()


def test_training_over_a_damaged_copy_fetches_it_again_and_substitutes_nothing(proxy: Proxy, tmp_path: Path) -> None:
    split = Split(URL, "train", Cache(tmp_path))
    ids = np.array([1, 0])
    image = bytes(split.images(ids)[1])
    copy = tmp_path / split.shards[0].sha256
    with copy.open("r+b") as file:  # in place: what is mapped changes too
        file.seek(copy.read_bytes().index(image) + 20)
        file.write(b"\xff\xff")
    for policy in ("fail", "substitute"):
        found = sound(split, ids, policy)
        assert found.ids.tolist() == [1, 0] and bytes(found.images[1]) == image
    assert proxy.shard_gets()["train-00000.arrow"] == 2
    split.close()


def test_bytes_damaged_on_the_way_are_fetched_once_more(proxy: Proxy, manifest: Manifest, tmp_path: Path) -> None:
    shard = manifest.splits["train"][20]
    proxy.damage[shard.file] = 1
    with Cache(tmp_path).hold(Store(URL), shard):
        assert proxy.shard_gets() == {shard.file: 2}


def test_bytes_that_are_wrong_in_the_store_are_refused(manifest: Manifest, proxy: Proxy, tmp_path: Path) -> None:
    shard = Shard("train-00001.arrow", 1, 100, "0" * 64)
    with pytest.raises(LonghaulError, match=r"s3://bucket/digits/train-00001\.arrow does not have the bytes"):
        with Cache(tmp_path).hold(Store(URL), shard):
            pass
    assert proxy.shard_gets() == {shard.file: 2}
    assert not list(tmp_path.glob("*.part"))


def test_the_least_recently_used_goes_first_and_what_is_held_stays(
    proxy: Proxy, manifest: Manifest, tmp_path: Path
) -> None:
    a, b, c, d = manifest.splits["train"][:4]
    cache, store = Cache(tmp_path, a.bytes + b.bytes + c.bytes + 100), Store(URL)

    def use(*shards: Shard) -> set[str]:
        for shard in shards:
            with cache.hold(store, shard):
                pass
        return {path.name for path in tmp_path.iterdir()} - {".lock"}

    with cache.hold(store, a):
        assert use(b, c, d) == {a.sha256, c.sha256, d.sha256}, "a is older than b, but held"
    assert use(c, b) == {b.sha256, c.sha256, d.sha256}
    assert use(d, a) == {a.sha256, b.sha256, d.sha256}, "c was used before b"
    assert cache.traffic.evicted_bytes == a.bytes + b.bytes + c.bytes
    assert (cache.traffic.hits, cache.traffic.fetched_files) == (2, 6)


def test_a_file_larger_than_the_limit_is_refused(manifest: Manifest, proxy: Proxy, tmp_path: Path) -> None:
    with pytest.raises(LonghaulError, match=r"train-00000\.arrow has 3\d\.\d kB, .* --cache-bytes more than 10 kB"):
        with Cache(tmp_path, 10_000).hold(Store(URL), one_shard(manifest)):
            pass


def test_by_default_the_cache_leaves_a_fifth_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGHAUL_CACHE", str(tmp_path / "cache"))
    cache = Cache()
    assert cache.directory == tmp_path / "cache"
    found = os.statvfs(tmp_path)
    assert 0.7 < cache.limit / (found.f_bavail * found.f_frsize) < 0.9


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LonghaulError, match=r"The cache .*/file/cache cannot be written .*: give another --cache-dir"):
        Cache(tmp_path / "file" / "cache")


def test_a_full_disk_is_told(manifest: Manifest, proxy: Proxy, tmp_path: Path) -> None:
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20k", "tmpfs", tmp_path]).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(LonghaulError, match=r"The disk of the cache .* is full: give a smaller --cache-bytes"):
            with Cache(tmp_path, 10**9).hold(Store(URL), one_shard(manifest)):
                pass
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


# --- the store -----------------------------------------------------------------------------------------------------


def test_a_store_that_stays_away_is_named(proxy: Proxy) -> None:
    store = Store(URL, delays=(0.01, 0.01))
    proxy.stop()
    try:
        with pytest.raises(LonghaulError, match=r"s3://bucket/digits/manifest\.json cannot be read, after 3 attempts"):
            store.read("manifest.json")
    finally:
        proxy.start()
    assert store.retries == 2
    assert json.loads(store.read("manifest.json"))["classes"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/nothing", r"There is no s3://bucket/nothing/manifest\.json: give --data the URL of a whole data"),
        ("s3://no-bucket/x", r"There is no s3://no-bucket/x/manifest\.json"),
        ("nonsense://x", r"--data nonsense://x: Protocol not known: nonsense"),
    ],
)
def test_a_url_without_a_data_set_is_refused_at_once(url: str, message: str, proxy: Proxy, tmp_path: Path) -> None:
    with pytest.raises(LonghaulError, match=message):
        Split(url, "train", Cache(tmp_path))


def test_a_machine_without_credentials_is_told_so(environment: dict[str, str], tmp_path: Path) -> None:
    """In a process of its own: clients keep the credentials that they once had."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    bare |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL": environment["AWS_ENDPOINT_URL"]}
    bare |= {"HOME": str(tmp_path), "AWS_DEFAULT_REGION": "us-east-1"}
    command = "from data_pipeline.split import read_manifest; read_manifest('s3://bucket/digits')"
    found = subprocess.run([sys.executable, "-c", command], env=bare, capture_output=True, text=True)
    assert "manifest.json needs credentials, and this machine has none." in found.stderr


# --- what must fit -------------------------------------------------------------------------------------------------


def splits(tmp_path: Path) -> tuple[Split, Split]:
    return Split(URL, "train", Cache(tmp_path)), Split(URL, "val", Cache(tmp_path))


def test_a_cache_too_small_for_two_windows_is_refused_and_the_mend_works(proxy: Proxy, tmp_path: Path) -> None:
    train_split, val_split = splits(tmp_path)
    rows = tuple(shard.rows for shard in train_split.shards)

    def order(shards: int) -> WindowedOrder:
        return WindowedOrder(0, len(train_split), 64, 32, rows, shards)

    cache = Cache(tmp_path, 700_000)
    with pytest.raises(LonghaulError, match=r"order\.shards=16 .*MB beside \d+ kB .* limit of 700 kB") as found:
        require_room(train_split, val_split, order(16), cache)
    mend = int(str(found.value).split("set order.shards to ")[1].split()[0])
    require_room(train_split, val_split, order(mend), cache)
    with pytest.raises(LonghaulError, match="keeps two windows"):
        require_room(train_split, val_split, order(mend + 2), cache)
    assert sequential_windows(9) == [range(0, 4), range(4, 8), range(8, 9)]


def test_a_global_order_that_does_not_fit_is_refused(
    proxy: Proxy, environment: dict[str, str], manifest: Manifest, tmp_path: Path
) -> None:
    job = make_job(tmp_path / "run", URL, cache_directory=tmp_path / "cache", cache_bytes=small_limit(manifest))
    message = refusal(job, 2, environment)
    assert "order.kind=global" in message and "set order.kind=windowed" in message and "--cache-bytes" in message


# --- whole runs ----------------------------------------------------------------------------------------------------


def remote_job(path: Path, cache: Path, limit: int | None, *overrides: str) -> Job:
    return make_job(path, URL, *overrides, cache_directory=cache, cache_bytes=limit)


def kinds(run: RunDirectory, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["event"] == kind]


@pytest.fixture(scope="module")
def from_directory(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """An undisturbed run of two workers on the local data set, in the windowed order."""
    job = make_job(tmp_path_factory.mktemp("local") / "run", digits, *WINDOWED)
    train(job, 2)
    return job


@pytest.mark.slow
def test_a_run_from_a_url_is_the_run_from_the_directory(
    from_directory: Job, proxy: Proxy, environment: dict[str, str], manifest: Manifest, tmp_path: Path
) -> None:
    """Two processes share a cache of half the data set: the same ledger, the same bits."""
    limit = small_limit(manifest)
    job = remote_job(tmp_path / "run", tmp_path / "cache", limit, *WINDOWED)
    train(job, 2, environment)
    assert different(final_state(job.run), final_state(from_directory.run)) == []
    assert size_of(tmp_path / "cache") <= limit
    assert all(finding.holds for finding in verify(job.run)), "from the URL in the run's events"
    steps = kinds(job.run, "step")
    assert {"shard_wait_seconds", "shard_fetched_bytes", "shard_hits", "shard_evicted_bytes"} <= steps[0].keys()
    assert steps[0]["shard_wait_seconds"] > 0
    data_bytes = sum(shard.bytes for shard in manifest.splits["train"])
    assert data_bytes < sum(step["shard_fetched_bytes"] for step in steps) < 5 * data_bytes, "3.6 epochs"
    gets = proxy.shard_gets()
    assert max(count for name, count in gets.items() if name.startswith("train-")) <= 5, "no more than once an epoch"
    how = How("cpu", 1, cache_directory=tmp_path / "cache", cache_bytes=limit)
    _, score = score_checkpoints([Target(job.run)], how=how)
    assert score.num_images == 355
    assert not kinds(job.run, "warning")


@pytest.mark.slow
def test_a_store_that_dies_and_comes_back_changes_nothing(
    from_directory: Job, proxy: Proxy, environment: dict[str, str], manifest: Manifest, tmp_path: Path
) -> None:
    job = remote_job(tmp_path / "run", tmp_path / "cache", small_limit(manifest), *WINDOWED)
    processes = start(job, 2, environment)
    wait_for(lambda: workers.reached(job.run, 10))
    proxy.stop()
    time.sleep(3)
    reached = max(event["step"] for event in kinds(job.run, "step"))
    assert reached < 80, "it waits"
    proxy.start()
    assert wait(processes) == [0, 0]
    assert sum(event["shard_retries"] for event in kinds(job.run, "step")) > 0
    assert different(final_state(job.run), final_state(from_directory.run)) == []


@pytest.mark.slow
def test_a_run_killed_while_fetching_goes_on_with_the_same_bits(
    from_directory: Job, proxy: Proxy, environment: dict[str, str], manifest: Manifest, tmp_path: Path
) -> None:
    job = remote_job(tmp_path / "run", tmp_path / "cache", small_limit(manifest), *WINDOWED)
    processes = start(job, 2, environment)
    wait_for(lambda: len(list(job.run.checkpoints.glob("step-*"))) >= 1)
    proxy.bytes_per_second = 10_000
    wait_for(lambda: list((tmp_path / "cache").glob("*.part")))
    workers.kill(processes)
    wait(processes)
    proxy.bytes_per_second = 0
    train(job, 2, environment)
    assert kinds(job.run, "resume")
    assert different(final_state(job.run), final_state(from_directory.run)) == []
    assert all(finding.holds for finding in verify(job.run))


@pytest.mark.slow
def test_a_global_order_fetches_all_at_the_start(
    digits: Path, proxy: Proxy, environment: dict[str, str], manifest: Manifest, tmp_path: Path
) -> None:
    local = make_job(tmp_path / "local", digits, "duration=10it")
    train(local, 1)
    job = remote_job(tmp_path / "remote", tmp_path / "cache", None, "duration=10it")
    train(job, 2, environment)
    assert different(final_state(job.run), final_state(local.run)) == []
    total = sum(shard.bytes for shard in manifest.splits["train"])
    assert kinds(job.run, "step")[0]["shard_fetched_bytes"] > total
    assert kinds(job.run, "fetching")[-1]["bytes"] == kinds(job.run, "fetching")[-1]["total_bytes"] == total
    assert set(proxy.shard_gets().values()) == {1}


def test_the_commands_take_a_url(
    proxy: Proxy,
    manifest: Manifest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def longhaul(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["longhaul", *arguments, "--runs", str(tmp_path / "runs")])
        ended = 0
        try:
            main()
        except SystemExit as leaving:
            ended = int(leaving.code or 0)
        printed = capsys.readouterr()
        assert ended == code, printed
        return printed.out + printed.err

    cache = ("--cache-dir", str(tmp_path / "cache"), "--cache-bytes", f"{small_limit(manifest)}B")
    begin = ("train", "digits", *WINDOWED, "duration=6it", "--name", "r", "--local", "--threads", "1")
    assert "--cache-bytes lots is not a size" in longhaul(*begin, "--data", URL, "--cache-bytes", "lots", code=2)
    assert "of 355 held-out images; 6 steps" in longhaul(*begin, "--data", f"{URL}/", *cache)
    assert "355 images" in longhaul("eval", "r", *cache)
    assert "every step saw the samples" in longhaul("verify", "r")
    assert size_of(tmp_path / "cache") <= small_limit(manifest)


def test_ray_submit_hands_a_url_on_as_it_is(tmp_path: Path) -> None:
    options = parse(["--recipe", "digits", "--data", URL, "--cache-dir", "/nvme", "--cache-bytes", "200GB"])
    assert f"--data {URL} --cache-dir /nvme --cache-bytes 200GB" in describe_run(options).entrypoint
    options = parse(["--recipe", "digits", "--data", "here", "--checkpoints", "s3://bucket/runs"])
    assert "--checkpoints s3://bucket/runs" in describe_run(options).entrypoint
    assert f"--data {Path.cwd() / 'here'}" in describe_run(options).entrypoint


def test_sorted_shards_are_told_from_shuffled_ones(digits: Path) -> None:
    labels = Split(digits, "train").labels
    assert is_sorted(np.sort(labels)) and not is_sorted(np.random.default_rng(0).permutation(labels))
    assert not is_sorted(np.zeros(10, np.int32)) and not is_sorted(np.array([3], np.int32))


def test_a_windowed_order_over_sorted_shards_is_warned_of(digits: Path, tmp_path: Path) -> None:
    manifest = json.loads((digits / "manifest.json").read_text())
    for shuffled, expected in ((False, 1), (True, 0), (None, 0)):
        data = tmp_path / str(shuffled)
        data.mkdir()
        for path in digits.iterdir():
            (data / path.name).symlink_to(path)
        (data / "manifest.json").unlink()
        (data / "manifest.json").write_text(json.dumps(manifest | {"shuffled": shuffled}))
        run = RunDirectory(tmp_path / f"run-{shuffled}")
        run.path.mkdir()
        telemetry = Telemetry(run, 1, 0, enabled=True)
        rows = tuple(shard["rows"] for shard in manifest["splits"]["train"])
        split = Split(data, "train")
        warn_of_sorted_shards(split, WindowedOrder(0, len(split), 64, 32, rows, WINDOW), telemetry)
        warn_of_sorted_shards(split, WindowedOrder(0, len(split), 64, 32, rows, len(rows)), telemetry)
        warn_of_sorted_shards(split, Order(0, len(split), 64, 32), telemetry)
        telemetry.close()
        warnings = kinds(run, "warning")
        assert len(warnings) == expected
    assert (
        f"mixes 4 of {len(rows)} shards at a time"
        in kinds(RunDirectory(tmp_path / "run-False"), "warning")[0]["message"]
    )
