"""`ray up` and `ray submit` on three pretend machines: the run is the cluster's, and no terminal's."""

import json
import subprocess
from collections.abc import Iterator

import pytest

from tests import pretend
from tests.pretend import Cluster, lose_terminal, wait_for

# The first test waits for the cluster as well; half a minute alone, minutes where other work shares the cores.
pytestmark = [pytest.mark.hosts, pytest.mark.slow, pytest.mark.timeout(600)]

# Three workers need three micro-batches at least; one thread each, as the three machines share this one's cores.
SMALL = ("--recipe", "digits", "--workers", "3", "--threads", "1", "batch.micro=16", "log.every=1it")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    reason = pretend.reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    with pretend.cluster() as made:
        yield made


def test_a_run_outlives_the_terminal_and_can_be_followed_again(cluster: Cluster) -> None:
    arguments = (*SMALL, "--name", "lost", "duration=6ep")
    client = cluster.submit(*arguments)
    wait_for(lambda: cluster.events("lost", "step"), 120, "the first step")
    lose_terminal(client)
    steps_then = len(cluster.events("lost", "step"))

    code, output = cluster.submit_to_end("--attach", "lost")
    assert code == 0, output
    assert steps_then < 136, "the run was over before the terminal was lost; make it longer"
    assert "Attempt 1: 3 workers" in output
    assert "of 355 held-out images; 136 steps" in output

    (start,) = cluster.events("lost", "start")
    assert [worker["rank"] for worker in start["workers"]] == [0, 1, 2]
    assert {worker["host"] for worker in start["workers"]} == {"lh1", "lh2", "lh3"}
    result = json.loads((cluster.runs / "lost" / "result.json").read_text())
    assert (result["steps"], result["attempts"], result["num_images"]) == (136, 1, 355)
    assert result["top1"] > 0.6


def test_a_paused_run_saves_a_checkpoint_and_the_same_command_resumes_it(cluster: Cluster) -> None:
    arguments = (*SMALL, "--name", "paused", "duration=8ep", "checkpoint.every=100ep")
    code, output = cluster.submit_to_end(*arguments, "--no-wait")
    assert code == 0, output
    code, output = cluster.submit_to_end(*arguments, "seed=1")
    assert code != 0
    assert "paused is running already, as job paused.1, and not with these arguments." in output

    wait_for(lambda: cluster.events("paused", "step"), 60, "the first step")
    code, output = cluster.submit_to_end("--pause", "paused")
    assert code == 0, output
    assert "Job paused.1: stopped." in output
    (stopped,) = cluster.events("paused", "stopped")
    assert (cluster.runs / "paused" / "checkpoints" / f"step-{stopped['step']:08}" / "manifest.json").is_file()

    code, output = cluster.submit_to_end(*arguments)
    assert code == 0, output
    assert f"Resumed at step {stopped['step']}" in output
    result = json.loads((cluster.runs / "paused" / "result.json").read_text())
    assert (result["steps"], result["attempts"]) == (181, 2)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("--recipe", "digitz"), "Error: There is no recipe 'digitz' (did you mean 'digits'?)"),
        (("--recipe", "digits", "--name", "far", "--data", "/nowhere"), "Error: There is no data set at /nowhere"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(cluster: Cluster, arguments: tuple[str, ...], sentence: str) -> None:
    code, output = cluster.submit_to_end(*arguments)
    assert code != 0
    assert sentence in output
    assert "Traceback" not in output


def test_a_machine_that_loses_power_costs_no_more_than_the_interval_of_the_memory_tier(cluster: Cluster) -> None:
    """The last test: a machine is gone afterwards. One of the three is spare."""
    saving = ("checkpoint.every=100ep", "checkpoint.memory=5it")
    arguments = (*SMALL[:2], "--workers", "2", *SMALL[4:], "--name", "dark", "duration=8ep", *saving)
    client = cluster.submit(*arguments)
    wait_for(lambda: [e for e in cluster.events("dark", "step") if e["step"] >= 40], 120, "step 40")
    hosts = {worker["host"] for worker in cluster.events("dark", "start")[0]["workers"]}
    victim = (hosts - {"lh1"}).pop()  # the head is lh1, and with it the run's driver would go
    subprocess.run([pretend.HOSTS, "kill", victim.removeprefix("lh")], env=cluster.environment, check=True)
    output, _ = client.communicate(timeout=240)
    assert client.returncode == 0, output

    committed = max(e["step"] for e in cluster.events("dark", "memory_save") if e["attempt"] == 1)
    (resumed,) = cluster.events("dark", "resume")
    assert resumed["step"] >= committed and resumed["path"].startswith("memory of 2 machines, ")
    _, again = cluster.events("dark", "start")
    assert {worker["host"] for worker in again["workers"]} == {"lh1", "lh2", "lh3"} - {victim}
    assert json.loads((cluster.runs / "dark" / "result.json").read_text())["steps"] == 181
