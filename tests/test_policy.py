"""When checkpoints are saved, which are kept, and what `every: auto` makes of costs and failures."""

import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from rich.console import Console
from scipy.special import lambertw

from configs import Duration, LonghaulError, Recipe, WallTime, load_recipe
from configs.schema import Auto, Checkpoint
from launch.view import View
from tests import workers
from tests.workers import different, final_state, make_job, start, train, wait, wait_for
from trainer.checkpoints.interval import (
    Failures,
    Pace,
    SaveCost,
    choose,
    daly,
    expected_time,
    failures_in,
    mean_time_between_failures,
    young,
)
from trainer.checkpoints.manifest import FORMAT, MANIFEST, checkpoint_name, open_checkpoint, render
from trainer.checkpoints.policy import Due, SavePolicy
from trainer.checkpoints.retention import Kept, Retention, superfluous
from trainer.checkpoints.store import DirectoryStore
from trainer.report import page
from trainer.rundir import RunDirectory, difference, settle_recipe
from trainer.timeline import Event
from trainer.verify import verify

HOUR = 3600.0


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


# -- what a recipe may say --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90.0), ("30min", 1800.0), ("1.5h", 5400.0), (" 2 h ", 7200.0), ("0.5s", 0.5)]
)
def test_a_time_by_the_clock(text: str, seconds: float) -> None:
    every = load_recipe("digits", [f"checkpoint.every={text}"]).checkpoint.every
    assert isinstance(every, WallTime) and every.seconds == seconds and str(every) == "".join(text.split())


@pytest.mark.parametrize("text", ["1ep", "500it", "1.2Msamples", "30min", "auto"])
def test_every_form_of_every_is_written_as_it_was_given(text: str) -> None:
    recipe = load_recipe("digits", [f"checkpoint.every={text}", "checkpoint.memory=20s"])
    dumped = recipe.model_dump(mode="json")
    assert (dumped["checkpoint"]["every"], dumped["checkpoint"]["memory"]) == (text, "20s")
    assert Recipe.model_validate(dumped) == recipe


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "checkpoint.every=10x",
            "checkpoint.every: '10x' is not an interval: write it as 1ep, 500it, 1.2Msamples, 30m",
        ),
        ("checkpoint.every=30m", "'30m' is not an interval"),
        ("checkpoint.every=0min", "checkpoint.every: '0min' must be more than zero"),
        (
            "checkpoint.memory=auto",
            "checkpoint.memory: 'auto' is not an interval: write it as 1ep, 500it, 1.2Msamples or",
        ),
        ("checkpoint.keep_every=2h", "checkpoint.keep_every: '2h' is not a duration"),
        ("checkpoint.keep_best=-1", "checkpoint.keep_best: "),
        ("checkpoint.auto.longest=9", "checkpoint.auto.longest: '9' is not a time: write it as 90s, 30min or 2h"),
        ("checkpoint.auto.longest=1s", "checkpoint.auto.shortest=30s is more than checkpoint.auto.longest=1s"),
        (
            "duration=2h",
            "duration: '2h' is not a duration: write it as 90ep, 600000it or 1.2Msamples (not by the clock",
        ),
        ("evaluate.every=2h", "evaluate.every: '2h' is not a duration"),
        ("log.every=10s", "log.every: '10s' is not a duration"),
    ],
)
def test_a_bad_interval_is_answered_by_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(LonghaulError) as error:
        load_recipe("digits", [override])
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_what_decides_nothing_of_the_result_may_change_at_a_resume(tmp_path: Path) -> None:
    run, old = RunDirectory(tmp_path), load_recipe("digits", ["precision=fp32"])
    run.write_recipe(old)
    new = load_recipe("digits", ["precision=fp32", "checkpoint.every=auto", "checkpoint.keep_best=3", "log.every=7it"])
    assert difference(old, new) == [] and settle_recipe(run, new, allow_changes=False) == new
    with pytest.raises(LonghaulError, match=r"another recipe: evaluate\.every: 5ep -> 7it"):
        settle_recipe(run, load_recipe("digits", ["evaluate.every=7it", "log.every=7it"]), allow_changes=False)


# -- when to save -----------------------------------------------------------------------------------------------------


DIGITS = load_recipe("digits")


def policy_of(clock: Clock, leads: bool = True, **keys: Any) -> SavePolicy:
    recipe = DIGITS.model_copy(update={"checkpoint": Checkpoint.model_validate(keys)})
    auto = leads and recipe.checkpoint.every == "auto"
    pace = Pace(recipe.checkpoint.auto, Failures(), 1, clock) if auto else None
    return SavePolicy(recipe, 1000, pace, leads, clock)


@given(st.integers(1, 60), st.integers(1, 60), st.booleans())
def test_what_is_due_by_the_step_is_a_function_of_the_step(every: int, keep_every: int, leads: bool) -> None:
    clock = Clock()
    policy = policy_of(clock, leads, every=f"{every}it", keep_every=f"{keep_every}it")
    for step in range(100):
        clock.time += 1000
        assert policy.begin_step(step, saving=step % 2 == 0, copying=False) == (False, False), "no clock is asked"
        due = policy.end_step(step + 1, False, False)
        assert due == Due((step + 1) % every == 0 or (step + 1) % keep_every == 0, False)


@pytest.mark.parametrize("memory", ["20s", "4it"])
def test_what_goes_by_the_clock_goes_by_rank_0s_and_begins_anew_with_every_save(memory: str) -> None:
    clock = Clock()
    policy, other = (policy_of(clock, leads, every="60s", memory=memory) for leads in (True, False))
    saved, copied = [], []
    for step in range(1, 41):
        asked = policy.begin_step(step - 1, saving=False, copying=False)
        assert other.begin_step(step - 1, saving=False, copying=False) == (False, False)
        clock.time += 5
        due = policy.end_step(step, *asked)
        assert other.end_step(step, *asked) == due, "all ranks do what rank 0 says"
        if due.copy:
            policy.saved(0.0, in_memory=True)
            copied.append(step)
        if due.save or step == 30:  # at 30 for another reason: a stop, a best score
            policy.saved(0.0, in_memory=False)
            saved.append(step)
    assert saved == [13, 26, 30]
    assert copied == {"20s": [5, 10, 15, 20, 25, 30, 35, 40], "4it": [4, 8, 12, 16, 20, 24, 28, 32, 36, 40]}[memory]


def test_neither_waits_for_what_is_under_way() -> None:
    clock = Clock()
    policy = policy_of(clock, every="60s", memory="5it")
    clock.time += 600
    assert policy.begin_step(3, saving=True, copying=False) == (False, False)
    assert policy.begin_step(4, saving=True, copying=False) == (False, False), "the fifth step's copy is put off"
    assert policy.begin_step(5, saving=False, copying=True) == (True, False)
    assert policy.begin_step(6, saving=False, copying=False) == (True, True)
    assert policy.end_step(7, save=True, copy=True) == Due(save=True, copy=False), "one of both, the one that lasts"
    policy.saved(0.1, in_memory=False)
    assert policy.begin_step(7, saving=False, copying=False) == (False, True), "and then the other"


@given(st.lists(st.integers(0, 20), max_size=12), st.integers(0, 4))
def test_an_evaluation_among_the_best_is_one_that_retention_would_keep(counts: list[int], keep_best: int) -> None:
    policy = policy_of(Clock(), keep_best=keep_best)
    scores = [(10 * number, count, 20) for number, count in enumerate(counts, start=1)]
    for until in range(1, len(scores) + 1):
        step = scores[until - 1][0]
        best = sorted(scores[:until], key=lambda score: (score[1], score[0]))[-keep_best:] if keep_best else []
        assert policy.is_best(scores[:until], step) == (step in [kept for kept, _, _ in best])
        assert not policy.is_best(scores[:until], step + 1), "not evaluated at this step"


# -- what to keep -----------------------------------------------------------------------------------------------------

CHECKPOINTS = st.lists(
    st.tuples(st.integers(1, 80), st.none() | st.integers(0, 5).map(lambda n: n / 5)), max_size=20
).map(
    lambda drawn: [Kept(f"{step:04d}-{n:02d}", step, score) for n, (step, score) in enumerate(sorted(drawn, key=str))]
)
POLICIES = st.tuples(st.integers(1, 5), st.integers(0, 4), st.none() | st.integers(1, 40).map(lambda n: f"{n}it"))


def removed_of(checkpoints: Sequence[Kept], policy: tuple[int, int, str | None]) -> list[str]:
    keep_last, keep_best, every = policy
    length = None if every is None else Duration.parse(every)
    ordered = sorted(checkpoints, key=lambda kept: kept.name)
    return superfluous(ordered, keep_last, keep_best, length, batch_size=32, num_samples=1000)


@given(CHECKPOINTS, POLICIES)
def test_what_stays_is_what_was_asked_for_and_no_more(
    checkpoints: list[Kept], policy: tuple[int, int, str | None]
) -> None:
    keep_last, keep_best, every = policy
    gone = removed_of(checkpoints, policy)
    stay = {kept.step: kept for kept in checkpoints if kept.name not in gone}
    newest_of = {kept.step: kept for kept in sorted(checkpoints, key=lambda kept: kept.name)}
    assert len(gone) + len(stay) == len(checkpoints) and len(set(gone)) == len(gone)
    assert all(newest_of[step] == kept for step, kept in stay.items()), "of one step the newest"
    newest = set(sorted(newest_of)[-keep_last:])
    ranking = sorted((kept.score, step) for step, kept in newest_of.items() if kept.score is not None)
    best = {step for _, step in ranking[len(ranking) - keep_best :]} if keep_best < len(ranking) else {
        step for _, step in ranking if keep_best
    }  # fmt: skip
    assert newest | best <= set(stay)
    for step in set(stay) - newest - best:
        assert every is not None
        border = step - step % int(every[:-2])
        assert border > 0 and not [other for other in newest_of if border <= other < step], "the first since a multiple"


@given(CHECKPOINTS, POLICIES)
def test_retention_has_nothing_more_to_say_after_it_was_heard(
    checkpoints: list[Kept], policy: tuple[int, int, str | None]
) -> None:
    gone = removed_of(checkpoints, policy)
    assert removed_of([kept for kept in checkpoints if kept.name not in gone], policy) == []


@given(
    st.lists(st.tuples(st.integers(1, 5), st.none() | st.integers(0, 50)), max_size=40),
    POLICIES,
)
def test_save_by_save_the_same_stay_as_if_all_had_been_kept_until_the_end(
    saves: list[tuple[int, int | None]], policy: tuple[int, int, str | None]
) -> None:
    """Nothing is removed on the way that the policy would want at the end."""
    step, every, kept = 0, [], []
    for apart, score in saves:
        step += apart
        every.append(Kept(checkpoint_name(step), step, None if score is None else score / 50))
        kept.append(every[-1])
        gone = removed_of(kept, policy)
        assert every[-1].name not in gone, "the newest is what a failure goes back to"
        kept = [one for one in kept if one.name not in gone]
    gone = removed_of(every, policy)
    assert kept == [one for one in every if one.name not in gone]


class CountingStore(DirectoryStore):
    """Counts what is read of it, and fails when told to."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reads: Counter[str] = Counter()
        self.down = False

    def names(self) -> list[str]:
        if self.down:
            raise OSError("the storage does not answer")
        return super().names()

    def open(self, name: str, file: str) -> BinaryIO:
        self.reads[name] += 1
        if self.down:
            raise OSError("the storage does not answer")
        return super().open(name, file)

    def put(self, step: int, **extra: Any) -> str:
        manifest = render({"format": FORMAT, "step": step, "world_size": 1, "files": {}, **extra})
        self.begin(f"draft-{step}")
        return self.commit(f"draft-{step}", checkpoint_name(step), manifest)


def test_each_manifest_is_read_once_and_a_broken_one_is_none_of_those_kept(tmp_path: Path) -> None:
    store = CountingStore(tmp_path)
    recipe = load_recipe("digits", ["checkpoint.keep_last=2", "checkpoint.keep_best=1", "checkpoint.keep_every=40it"])
    retention = Retention(recipe, num_samples=1000)
    for step in range(10, 60, 10):
        store.put(step, **({"score": {"num_top1": 7, "num_images": 10}} if step == 10 else {}))
    (tmp_path / checkpoint_name(50) / MANIFEST).write_text("{}")
    assert retention(store) == [checkpoint_name(20)], "10 is the best, 30 and 40 the newest that can be read"
    store.remove(checkpoint_name(20))
    store.put(60)
    assert retention(store) == [checkpoint_name(30)], "40 is a multiple, and as 50 counts for nothing one of the newest"
    store.put(70)
    assert retention(store) == [checkpoint_name(30)], "40 is a multiple"
    assert {store.reads[checkpoint_name(step)] for step in (10, 20, 30, 40, 60, 70)} == {1}
    store.down = True
    assert retention(store) == []


# -- every: auto ------------------------------------------------------------------------------------------------------


@given(st.floats(-6, 1.5), st.floats(-2, 8))
def test_dalys_interval_costs_a_run_no_more_than_a_fifth_of_a_per_cent_over_the_best_there_is(
    log_ratio: float, log_mtbf: float
) -> None:
    mtbf = 10**log_mtbf
    cost = mtbf * 10**log_ratio
    best = mtbf * (1 + float(lambertw(-math.exp(-1 - cost / mtbf)).real))  # where the derivative is zero
    least = expected_time(best, cost, mtbf)
    assert least <= min(expected_time(best * factor, cost, mtbf) for factor in (0.9, 0.99, 1.01, 1.1)) * (1 + 1e-9)
    assert expected_time(daly(cost, mtbf), cost, mtbf) <= 1.002 * least


@pytest.mark.parametrize(("hours", "minutes"), [(24, 117), (6, 57), (0.25, 9.1)])
def test_dalys_interval_is_what_his_figures_3_to_5_say(hours: float, minutes: float) -> None:
    assert daly(5, 60 * hours) == pytest.approx(minutes, rel=0.006), "for a dump of five minutes"


@given(st.floats(1e-3, 1e3), st.floats(1e2, 1e9), st.floats(1.01, 100))
def test_the_interval_grows_with_the_cost_and_with_the_time_between_failures(
    cost: float, mtbf: float, factor: float
) -> None:
    assume(cost * factor < mtbf / 10)
    assert daly(cost * factor, mtbf) > daly(cost, mtbf) and daly(cost, mtbf * factor) > daly(cost, mtbf)
    assert abs(daly(cost, mtbf) / young(cost, mtbf) - 1) < math.sqrt(cost / mtbf), "Young's is the first order of it"


def test_a_simulated_run_with_failures_takes_as_long_as_the_formula_says() -> None:
    generator = np.random.default_rng(3)
    interval, cost, mtbf, segments = 300.0, 40.0, 900.0, 20_000
    tries = generator.geometric(math.exp(-(interval + cost) / mtbf), segments)  # until one gets as far as the save
    lost = generator.exponential(mtbf, 4 * int(tries.sum()))
    lost = lost[lost < interval + cost][: int(tries.sum()) - segments]
    took = segments * (interval + cost) + lost.sum()
    assert took / (segments * interval) == pytest.approx(expected_time(interval, cost, mtbf), rel=0.02)


@given(st.floats(0, 1e4), st.floats(1, 1e9))
def test_the_interval_keeps_to_its_bounds_and_these_never_cost_more_than_a_per_cent(cost: float, mtbf: float) -> None:
    bounds = Auto()
    interval = choose(cost, mtbf, bounds)
    assert interval >= bounds.shortest.seconds
    if interval > bounds.longest.seconds:
        assert cost / interval >= 0.01 * (1 - 1e-9)
    if interval < daly(cost, mtbf):
        assert cost / interval <= 0.01 * (1 + 1e-9), (
            "shorter than the best for a run only where it costs next to nothing"
        )


def test_the_failure_rate_begins_with_the_published_one_and_ends_with_the_runs_own() -> None:
    prior = Auto().worker_mtbf.seconds
    assert mean_time_between_failures(Failures(), prior, 1024) == pytest.approx(prior / 1024)
    assert prior == pytest.approx(54 * 24 * HOUR * 16_384 / 419, rel=0.02), "Llama 3's 419 interruptions"
    # Eight spot instances, taken away every five hours: after a few times that is what is reckoned with.
    after = [mean_time_between_failures(Failures(n, n * 5 * HOUR * 8), prior, 8) / HOUR for n in (1, 5, 20)]
    assert after[0] < 100 and after[1] < 20 and after[2] < 9
    quiet = mean_time_between_failures(Failures(0, 1000 * HOUR), prior, 8)
    assert quiet > mean_time_between_failures(Failures(), prior, 8), "time without failures counts too"


def begun(time: float, attempt: int, workers: int = 2) -> Event:
    return {"event": "start", "time": time, "attempt": attempt, "step": 0, "world_size": workers}


def test_failures_are_what_machines_did_not_what_people_did() -> None:
    events = [
        begun(0, 1), {"event": "step", "time": 10, "attempt": 1, "step": 3},  # killed: nothing was written about it
        begun(20, 2, 3), {"event": "failure", "time": 30, "attempt": 2, "rank": 0, "error": "RuntimeError: gloo"},
        begun(40, 3), {"event": "step", "time": 50, "attempt": 3, "step": 3}, {"event": "worker_failure", "time": 51},
        begun(60, 4), {"event": "stopped", "time": 70, "attempt": 4, "step": 9},  # a preemption loses nothing
        begun(80, 5), {"event": "failure", "time": 90, "attempt": 5, "error": "KeyboardInterrupt: "},
        begun(100, 6), {"event": "failure", "time": 110, "attempt": 6, "error": "LonghaulError: lower schedule.lr"},
        begun(200, 7), {"event": "step", "time": 500, "attempt": 7, "step": 3},  # the one under way
    ]  # fmt: skip
    assert failures_in(events) == Failures(3, 2 * 10 + 3 * 10 + 2 * 11 + 3 * 2 * 10)
    assert failures_in([]) == failures_in(events[-2:]) == Failures()


def test_the_cost_is_the_stall_and_what_the_steps_behind_it_are_slower() -> None:
    cost = SaveCost()
    assert cost.seconds is None
    for _ in range(20):
        cost.step(0.5, saving=False)
    for stall, slow in ((9.0, 9.0), (0.2, 0.6), (0.3, 0.6), (0.2, 0.6)):  # the first makes room for the copies
        cost.save_began(stall)
        for _ in range(3):
            cost.step(slow, saving=True)
        cost.step(0.5, saving=False)
    assert cost.seconds == pytest.approx(0.2 + 3 * 0.1) and cost.step_seconds == 0.5
    cost.save_began(0.2)
    cost.step(0.4, saving=True)  # by chance faster than most: that does not make a save cheaper than its stall
    for _ in range(5):
        cost.save_began(0.2)
        cost.step(0.4, saving=True)
    assert cost.seconds is not None and cost.seconds >= 0.2


def drive(pace_clock: Clock, policy: SavePolicy, steps: int, seconds: float, writes: int) -> list[float]:
    """Train `steps` steps with saves whose writing takes `writes` of them; returns when they were begun."""
    saved, left = [], 0
    for step in range(1, steps + 1):
        asked = policy.begin_step(step - 1, saving=left > 0, copying=False)
        pace_clock.time += seconds * (1.5 if left > 0 else 1.0)
        left = max(0, left - 1)
        if policy.end_step(step, *asked).save:
            pace_clock.time += 0.4
            policy.saved(0.4, in_memory=False)
            saved.append(pace_clock.time)
            left = writes
    return saved


def test_auto_measures_early_and_then_keeps_to_the_interval_that_costs_least() -> None:
    clock = Clock()
    policy = policy_of(clock, every="auto", auto={"worker_mtbf": "20h"})
    assert policy.news() is None
    saved = drive(clock, policy, steps=20_000, seconds=0.5, writes=4)
    assert 30 <= saved[0] - 100 <= 32, "the first one at the shortest interval"
    told = policy.news()
    assert told is not None and told["cost_seconds"] == pytest.approx(0.4 + 4 * 0.25) and told["num_failures"] == 0
    assert told["mtbf_seconds"] == pytest.approx((0.01 * 20 * HOUR + clock.time - 100) / 0.01, rel=0.01)
    assert told["steps"] == pytest.approx(told["seconds"] / 0.5, abs=1)
    gaps = [later - earlier for earlier, later in pairwise(saved[1:])]
    assert all(gap >= daly(1.4, 20 * HOUR) for gap in gaps), "time without failures lengthens it"
    assert policy.news() is None, "said once"


def test_slow_steps_are_measured_before_the_first_save() -> None:
    clock = Clock()
    assert drive(clock, policy_of(clock, every="auto"), steps=11, seconds=60.0, writes=1) == [clock.time]


def test_what_the_terminal_and_the_report_say_of_the_interval(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.write_recipe(load_recipe("digits"))
    interval = {
        "event": "checkpoint_interval", "time": 60.0, "attempt": 1, "step": 70, "seconds": 750.0, "steps": 1500,
        "cost_seconds": 1.2, "mtbf_seconds": 30240, "num_failures": 2,
    }  # fmt: skip
    copied = {"event": "memory_save_started", "attempt": 1, "step": 5, "stall_seconds": 0.25}
    out = io.StringIO()
    view = View(run, Console(file=out, width=200))
    lines = [begun(0, 1) | {"workers": []}, interval, *({**copied, "time": 70.0 + n} for n in range(2))]
    run.events_file.write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    view.follow(lambda: False)
    sentence = (
        "A checkpoint every 12 min 30 s, about 1,500 steps: a save costs 1.2 s of training, and a failure is to be "
        "expected every 8 h 24 min (2 so far)."
    )
    assert out.getvalue().strip() == sentence
    run.events_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = page(run, now=80.0)
    assert (
        sentence in shown
        and "2 copies were made into the memory of other machines; steps stood still for 500 ms" in shown
    )
    assert "not committed so far" not in shown, "copies are no rows of the table of saves"


# -- real runs --------------------------------------------------------------------------------------------------------


def saved_steps(run: RunDirectory) -> list[int]:
    return [event["step"] for event in run.events() if event["event"] == "checkpoint"]


def test_no_policy_changes_what_a_run_computes(digits: Path, tmp_path: Path) -> None:
    """Saving by the clock, which no two runs do alike, against saving at a step; two workers each."""
    common = ("duration=32it", "evaluate.every=8it")
    plain = make_job(tmp_path / "plain", digits, *common, "checkpoint.every=32it")
    train(plain, 2)
    policy = ("every=0.001s", "keep_last=1", "keep_best=2", "keep_every=13it")
    timed = make_job(tmp_path / "timed", digits, *common, *(f"checkpoint.{key}" for key in policy))
    train(timed, 2)
    assert saved_steps(plain.run) == [32]
    assert different(final_state(plain.run), final_state(timed.run)) == []
    assert all(finding.holds for finding in verify(timed.run))

    run, store = timed.run, timed.run.store()
    evaluations = {e["step"]: round(e["top1"] * e["num_images"]) for e in run.events() if e["event"] == "evaluation"}
    assert saved_steps(run)[0] <= 2 and {13, 26} < set(saved_steps(run))
    best = sorted(evaluations, key=lambda step: (evaluations[step], step))[-2:]
    assert store.names() == [checkpoint_name(step) for step in sorted({*best, 13, 26, 32})]
    for name in store.names():
        saved = open_checkpoint(store, name)
        expected = {"num_top1": evaluations.get(saved.step), "num_images": 355}
        assert saved.manifest.get("score") == (expected if saved.step in evaluations else None)


def events_of(run: RunDirectory, kind: str) -> list[Event]:
    return [event for event in run.events() if event["event"] == kind]


def test_auto_in_a_run_that_is_killed_and_resumed_with_another_policy(digits: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", digits, "duration=100000it", "checkpoint.every=5it")
    processes = start(job, 2)
    wait_for(lambda: saved_steps(job.run))
    workers.kill(processes)
    wait(processes)
    auto = ("checkpoint.every=auto", "checkpoint.auto.shortest=0.3s", "checkpoint.auto.longest=0.5s")
    job = make_job(tmp_path / "run", digits, "duration=100000it", *auto)
    processes = start(job, 2)
    wait_for(lambda: events_of(job.run, "checkpoint_interval") and len(saved_since(job.run, 2)) >= 3)
    job.run.stop_file.touch()
    assert wait(processes) == [0, 0]
    told = events_of(job.run, "checkpoint_interval")[0]
    assert told["num_failures"] == 1 and told["seconds"] >= 0.3 and told["cost_seconds"] > 0 and told["steps"] > 0
    assert str(job.run.recipe().checkpoint.every) == "auto"
    assert all(finding.holds for finding in verify(job.run))


def saved_since(run: RunDirectory, attempt: int) -> list[Event]:
    return [event for event in events_of(run, "checkpoint") if event["attempt"] == attempt]
