"""Updates in real runs: what decides the next one is in the checkpoint, and what is not finite is survived."""

import io
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from launch.view import View
from tests import workers
from trainer.checkpoints.manifest import newest_valid
from trainer.engines.ddp import DdpEngine
from trainer.group import free_port
from trainer.job import Job
from trainer.report import write_report
from trainer.rundir import RunDirectory
from trainer.timeline import attempts

# Everything that has a state of its own, at once; the plateau's patience is short enough to be lost twice on the way.
STATEFUL = (
    "ema={decay: 0.9, every: 3it, start: 10it}",
    "gradients.clip_norm=2.0",
    "schedule={kind: plateau, lr: 0.2, patience: 1, threshold: 0.3, hold: {lr: 0.01, train_error: 0.85, window: 7it}}",
    "duration=48it",
    "evaluate.every=8it",
    "evaluate.exact_batch_norm=2",
)


def events(run: RunDirectory, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["event"] == kind]


def history(run: RunDirectory) -> dict[str, Any]:
    saved = newest_valid(run.store())
    assert saved is not None
    return saved.manifest["history"]


@pytest.fixture(scope="module", params=["bf16", "fp16"])
def stateful(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Job:
    """A finished run with all of that, in one worker."""
    more = ["loss_scale={initial: 1048576.0, growth_steps: 10}"] if request.param == "fp16" else []
    job = workers.make_job(
        tmp_path_factory.mktemp("runs") / "whole", digits, f"precision={request.param}", *more, *STATEFUL
    )
    workers.train(job, 1)
    return job


def again(job: Job, path: Path) -> Job:
    path.mkdir(parents=True)
    return Job(job.recipe, job.data, RunDirectory(path), "cpu", threads=1, timeout_seconds=60)


def test_such_a_run_uses_every_state(stateful: Job) -> None:
    rates = [event["lr"] for event in events(stateful.run, "step")]
    assert rates[0] == 0.01, "it begins with the held rate"
    assert {0.2, 0.02} <= set(rates), "it is released, and it meets a plateau"
    assert history(stateful.run)["released"] % 7 == 0
    if stateful.recipe.precision == "fp16":
        scales = [event["loss_scale"] for event in events(stateful.run, "step")]
        assert min(scales) < 1048576.0 and events(stateful.run, "step")[-1]["num_skipped"] > 0, "the scale was too high"
        assert any(after > before for before, after in pairwise(scales)), "and grew again"
    state = workers.final_state(stateful.run)
    assert not torch.equal(state["ema.conv1.weight"], state["model.conv1.weight"])


@pytest.mark.parametrize("sizes", [(2, 1)])
def test_killed_and_resumed_it_ends_with_the_same_bits(stateful: Job, tmp_path: Path, sizes: tuple[int, int]) -> None:
    job = again(stateful, tmp_path / "killed")
    processes = workers.start(job, sizes[0])
    workers.wait_for(lambda: workers.reached(job.run, 25) and newest_valid(job.run.store()))
    workers.kill(processes)
    workers.wait(processes)
    workers.train(job, sizes[1])
    assert events(job.run, "resume")[0]["step"] < 48
    assert workers.different(workers.final_state(job.run), workers.final_state(stateful.run)) == []
    assert history(job.run) == history(stateful.run)


def test_a_recipe_that_diverges_stops_with_the_mend_and_its_weights_are_still_numbers(
    tmp_path: Path, digits: Path
) -> None:
    job = workers.make_job(
        tmp_path / "run", digits, "schedule={kind: constant, lr: 1.0e+30}", "gradients.max_skipped=5",
        "checkpoint.every=1it",
    )  # fmt: skip
    message = workers.refusal(job)
    assert message.startswith("5 updates in a row, from step ") and "lower schedule.lr" in message
    assert all(tensor.isfinite().all() for tensor in workers.final_state(job.run).values())
    assert events(job.run, "step")[-1]["num_skipped"] == 5


def _with_a_fault(job: Job, first: int, last: int) -> None:
    """A worker whose arithmetic is wrong in the steps [first, last), the first time that it comes to them."""
    healthy, done = DdpEngine.update, set()

    def update(self: DdpEngine, step: int, learning_rate: float) -> None:
        if first <= step < last and step not in done:
            done.add(step)
            self._parameters[0].grad[0, 0] = float("nan")  # type: ignore[index]
        healthy(self, step, learning_rate)

    DdpEngine.update = update  # type: ignore[method-assign]
    workers._main(job, 0, 1, free_port())


def shown(run: RunDirectory) -> str:
    """What a terminal that looks on is told of a run from its beginning."""
    console = Console(file=io.StringIO(), width=200)
    view = View(run, console)
    view._offset = 0
    view.follow(lambda: False)
    return console.file.getvalue()  # type: ignore[attr-defined]


def run_with_a_fault(job: Job, first: int, last: int) -> int:
    process = workers._CONTEXT.Process(target=_with_a_fault, args=(job, first, last))
    process.start()
    return workers.wait([process])[0]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> RunDirectory:
    job = workers.make_job(tmp_path_factory.mktemp("runs") / "healthy", digits)
    workers.train(job, 1)
    return job.run


def test_a_machine_that_computes_wrongly_for_a_while_costs_nothing_but_time(
    tmp_path: Path, digits: Path, healthy: RunDirectory
) -> None:
    job = workers.make_job(
        tmp_path / "run", digits, "gradients={max_skipped: 6, when_exceeded: rollback}", "log.every=5it"
    )
    assert run_with_a_fault(job, 40, 46) == 0
    (rollback,) = events(job.run, "rollback")
    assert (rollback["failing_since"], rollback["step"]) == (40, 30)
    assert events(job.run, "resume")[0]["step"] == 30
    assert sum(attempt.lost_steps for attempt in attempts(job.run.events())) == 50 - 30
    assert workers.different(workers.final_state(job.run), workers.final_state(healthy)) == []


def test_a_bad_gradient_is_skipped_and_counted_and_the_run_goes_on(
    tmp_path: Path, digits: Path, healthy: RunDirectory
) -> None:
    job = workers.make_job(tmp_path / "run", digits, "gradients.max_skipped=6")
    assert run_with_a_fault(job, 40, 42) == 0
    assert [e["num_skipped"] for e in events(job.run, "step")][38:44] == [0, 0, 1, 2, 2, 2]
    assert "Updates skipped</dt><dd>2<" in write_report(job.run).read_text()
    assert "Step 42: 2 updates so far skipped" in shown(job.run)
    state = workers.final_state(job.run)
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert workers.different(state, workers.final_state(healthy))
    ledgers = [{k: v for k, v in s.items() if k.startswith("ledger")} for s in (state, workers.final_state(healthy))]
    assert workers.different(*ledgers) == [], "skipped updates have used their samples"


def test_going_back_is_tried_once(tmp_path: Path, digits: Path) -> None:
    job = workers.make_job(
        tmp_path / "run", digits, "schedule={kind: constant, lr: 1.0e+30}",
        "gradients={max_skipped: 5, when_exceeded: rollback}", "checkpoint.every=1it", "checkpoint.keep_last=50",
    )  # fmt: skip
    message = workers.refusal(job)
    assert "as they did before going back" in message and len(events(job.run, "rollback")) == 1
    assert list(job.run.checkpoints.glob("abandoned-*"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible here")
@pytest.mark.parametrize("how", ["eager", "default"])
def test_killed_and_resumed_on_a_gpu_it_ends_with_the_same_bits(tmp_path: Path, digits: Path, how: str) -> None:
    whole, killed = (
        replace(workers.make_job(tmp_path / name, digits, f"compile={how}"), device="cuda") for name in ("a", "b")
    )
    workers.train(whole, 1)
    processes = workers.start(killed, 1)
    workers.wait_for(lambda: workers.reached(killed.run, 37))
    workers.kill(processes)
    workers.wait(processes)
    workers.train(killed, 1)
    assert workers.different(workers.final_state(whole.run), workers.final_state(killed.run)) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_graphs_without_a_gpu_are_refused(tmp_path: Path, digits: Path) -> None:
    job = workers.make_job(tmp_path / "run", digits, "compile=cuda-graphs")
    assert workers.refusal(job) == "compile=cuda-graphs needs a GPU; use compile=default, or compile=eager."


GOOGLENET = "model={name: torchvision:googlenet}", "input.crop={kind: resized_crop}", "batch.size=8", "batch.micro=4"


def test_a_library_network_with_auxiliary_classifiers_trains_on_two_workers(tmp_path: Path, digits: Path) -> None:
    sizes = ("input.size=32", "input.eval_resize=32", "duration=2it", "evaluate.batch=128")
    job = workers.make_job(tmp_path / "run", digits, *GOOGLENET, *sizes)
    workers.train(job, 2)
    assert len(events(job.run, "step")) == 2
    assert {"model.aux1.fc2.weight", "model.fc.weight"} <= workers.final_state(job.run).keys()


def test_a_library_network_that_images_are_too_small_for_is_refused_in_one_sentence(
    tmp_path: Path, digits: Path
) -> None:
    job = workers.make_job(tmp_path / "run", digits, *GOOGLENET, "input.size=8", "input.eval_resize=8")
    assert workers.refusal(job).startswith("The network torchvision:googlenet does not take 8x8 images")


@pytest.mark.slow
def test_a_compiled_run_computes_what_an_eager_one_does(tmp_path: Path, digits: Path) -> None:
    losses = []
    for how in ("eager", "default"):
        # A small network: compiling takes a second for each of its layers.
        job = workers.make_job(
            tmp_path / how, digits, "model={name: timm:resnet10t}", "duration=4it", "precision=fp32", f"compile={how}"
        )
        assert workers.wait(workers.start(job, 1), timeout=280) == [0]
        losses.append([event["loss"] for event in events(job.run, "step")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] != losses[0][-1]
