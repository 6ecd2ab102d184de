"""The report of a run: the analysis of its events, and the page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import LonghaulError, load_recipe
from trainer.charts import thin, ticks
from trainer.report import duration, page, write_report
from trainer.rundir import RunDirectory
from trainer.timeline import (
    CATEGORIES,
    CHECKPOINT,
    DATA_WAIT,
    EVALUATION,
    LOST,
    OTHER,
    PRODUCTIVE,
    Event,
    attempts,
    mean_rate,
    shares,
    status,
    surviving,
    time_ledger,
    verdict,
)


def start(time: float, attempt: int, step: int = 0, workers: int = 2) -> Event:
    listed = [{"rank": r, "host": f"node-{r}", "pid": 100 + r, "device": "cpu", "threads": 1} for r in range(workers)]
    return {
        "event": "start", "time": time, "attempt": attempt, "step": step, "world_size": workers, "workers": listed,
    }  # fmt: skip


def steps(time: float, attempt: int, step: int, seconds: float = 0.5, wait: float = 0.1, **more: Any) -> Event:
    return {
        "event": "step", "time": time, "attempt": attempt, "step": step, "total_steps": 40, "epoch": step / 10,
        "lr": 0.1, "loss": 2.0 / step, "train_top1": 0.5, "images_per_second": 64 / seconds, "step_seconds": seconds,
        "gradient_norm": 1.0,
        "data_wait_seconds": wait, **more,
    }  # fmt: skip


def evaluation(time: float, attempt: int, step: int, seconds: float) -> Event:
    return {
        "event": "evaluation", "time": time, "attempt": attempt, "step": step, "epoch": step / 10, "seconds": seconds,
        "top1": 0.75, "top5": 0.9, "loss": 1.5, "num_images": 12345,
    }  # fmt: skip


def saving(time: float, attempt: int, step: int, stall: float) -> Event:
    return {"event": "checkpoint_started", "time": time, "attempt": attempt, "step": step, "stall_seconds": stall}


def saved(time: float, attempt: int, step: int) -> Event:
    path = f"/runs/x/checkpoints/step-{step:08d}"
    return {"event": "checkpoint", "time": time, "attempt": attempt, "step": step, "seconds": 1.25, "path": path}


# Attempt 1: 2 s to the first step, 20 steps of 0.5 s, a pause for evaluation and checkpoint at step 10, lost 3 s after
# step 20. Attempt 2 goes on from step 10 after 5 s.
CRASHED: list[Event] = [
    start(100, 1),
    steps(107, 1, 10),
    evaluation(109, 1, 10, seconds=2.0),
    saving(109.5, 1, 10, stall=0.5),
    saved(111, 1, 10),
    steps(114.5, 1, 20),
    {"event": "failure", "time": 117.5, "attempt": 1, "rank": 0, "error": "RuntimeError: <peer> & co. went away"},
    {"event": "worker_failure", "time": 118, "rank": 1, "error": "WorkerDied: killed"},
]
RESUMED: list[Event] = [
    *CRASHED,
    start(122.5, 2, step=10, workers=1),
    {"event": "resume", "time": 122.5, "attempt": 2, "step": 10, "path": "/runs/x/checkpoints/step-00000010"},
    steps(134.5, 2, 20, seconds=1.0, wait=0.0),
    steps(144.5, 2, 30, seconds=1.0, wait=0.5),
    steps(154.5, 2, 40, seconds=1.0, wait=0.0),
    evaluation(157.5, 2, 40, seconds=3.0),
    {"event": "finished", "time": 158, "attempt": 2, "step": 40},
]


def make_run(folder: Path, events: list[Event] | None, result: dict[str, Any] | None = None) -> RunDirectory:
    run = RunDirectory(folder / "nightly")
    run.write_recipe(load_recipe("digits"))
    if events is not None:
        run.events_file.write_text("".join(json.dumps(event) + "\n" for event in events))
    if result is not None:
        run.result_file.write_text(json.dumps(result))
    return run


def test_every_second_of_a_crashed_run_is_in_its_place() -> None:
    ledger = time_ledger(RESUMED)
    assert ledger == pytest.approx(
        {
            PRODUCTIVE: 10 * 0.4 + 10 * 1.0 + 10 * 0.5 + 10 * 1.0,
            DATA_WAIT: 10 * 0.1 + 10 * 0.5,
            EVALUATION: 2.0 + 3.0,
            CHECKPOINT: 0.5,
            LOST: 10 * 0.5,
            OTHER: 58 - 29 - 6 - 5 - 0.5 - 5,
        }
    )
    assert list(ledger) == list(CATEGORIES)


def test_a_resume_inside_a_window_loses_its_later_part_only() -> None:
    events = [start(0, 1), steps(10, 1, 10, seconds=1.0, wait=0.0), start(10, 2, step=7)]
    assert time_ledger(events) == pytest.approx(dict.fromkeys(CATEGORIES, 0.0) | {PRODUCTIVE: 7.0, LOST: 3.0})


def test_work_is_lost_to_a_resume_two_attempts_later() -> None:
    """Attempt 3 finds the checkpoint that attempt 2 began from broken, and goes back further."""
    events = [
        start(0, 1), steps(20, 1, 20, seconds=1.0, wait=0.0),
        start(20, 2, step=20), evaluation(25, 2, 20, seconds=5.0),
        start(25, 3, step=5), steps(30, 3, 10, seconds=1.0, wait=0.0),
    ]  # fmt: skip
    ledger = time_ledger(events)
    assert (ledger[PRODUCTIVE], ledger[LOST], ledger[EVALUATION]) == pytest.approx((10.0, 20.0, 0.0))
    assert [e["step"] for e in surviving(events, "step")] == [10]


def test_steps_after_the_last_step_event_count_at_its_pace() -> None:
    events = [start(0, 1), steps(5, 1, 10), {"event": "finished", "time": 9, "attempt": 1, "step": 14}]
    ledger = time_ledger(events)
    assert ledger[PRODUCTIVE] == pytest.approx(14 * 0.4)
    assert ledger[DATA_WAIT] == pytest.approx(14 * 0.1)
    sooner = [*events[:2], {"event": "finished", "time": 6, "attempt": 1, "step": 14}]
    assert sum(time_ledger(sooner).values()) == pytest.approx(6)
    assert time_ledger(sooner)[OTHER] == pytest.approx(0)


def test_nothing_is_known_before_the_first_start() -> None:
    assert time_ledger([]) == dict.fromkeys(CATEGORIES, 0.0)
    early = [{"event": "error", "time": 3.0, "message": "no such data"}]
    assert sum(time_ledger(early).values()) == 0
    assert (status([]), status(early), status(CRASHED), status(RESUMED)) == (
        "not started", "failed", "failed", "finished",
    )  # fmt: skip
    assert status(CRASHED[:3]) == "running"


_kinds = st.sampled_from(["start", "step", "evaluation", "checkpoint_started", "failure", "stopped", "finished"])


@st.composite
def histories(draw: st.DrawFn) -> list[Event]:
    """Events of any kind in any order, some without their figures, as after crashes and torn lines."""
    time, attempt, events = 0.0, 0, []
    for kind in draw(st.lists(_kinds, max_size=30)):
        time += draw(st.floats(0, 50))
        attempt += kind == "start"
        event: Event = {"event": kind, "time": time, "attempt": attempt, "step": draw(st.integers(0, 100))}
        for key in ("step_seconds", "data_wait_seconds", "seconds", "stall_seconds", "images_per_second"):
            if draw(st.booleans()):
                event[key] = draw(st.floats(0, 20))
        events.append(event)
    return events


@given(histories())
def test_the_ledger_adds_up_to_the_wall_time(events: list[Event]) -> None:
    ledger = time_ledger(events)
    first = next((e["time"] for e in events if e["event"] == "start"), None)
    wall = 0.0 if first is None else events[-1]["time"] - first
    assert sum(ledger.values()) == pytest.approx(wall, abs=1e-6)
    assert min(ledger.values()) >= 0
    percents = shares(ledger)
    assert round(sum(percents.values()), 6) == (100 if sum(ledger.values()) > 0 else 0)
    assert all(abs(percents[c] - 100 * ledger[c] / wall) < 0.1 + 1e-9 for c in CATEGORIES if wall)
    assert verdict(ledger, attempts(events)).endswith(".")


@given(histories())
def test_what_survives_goes_forward_only(events: list[Event]) -> None:
    found = [e["step"] for e in surviving(events, "step")]
    assert found == sorted(set(found))


def test_attempts_know_what_they_did() -> None:
    first, second = attempts(RESUMED)
    assert (first.from_step, first.reached, first.lost_steps, first.ending) == (0, 20, 10, "failed")
    assert (second.from_step, second.reached, second.lost_steps, second.ending) == (10, 40, 0, "finished")
    assert (first.seconds, second.seconds) == (18, 35.5)
    silent, _ = attempts([start(0, 1), steps(5, 1, 10), start(9, 2)])
    assert silent.ending == "cut"
    assert mean_rate(RESUMED) == pytest.approx((20 * 64 + 30 * 64) / (20 * 0.5 + 30 * 1.0))
    assert mean_rate([]) is None


def test_an_attempt_that_never_started_does_not_change_the_one_before() -> None:
    refused = {"event": "failure", "time": 900.0, "attempt": 3, "rank": 0, "error": "LonghaulError: other data"}
    assert status([*RESUMED, refused]) == "finished"
    assert attempts([*RESUMED, refused])[-1].seconds == 35.5


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({DATA_WAIT: 5.0, OTHER: 5.0}, "Compute bound: 90.0 % of"),
        ({DATA_WAIT: 30.0}, "Input bound: workers waited for data during 25.0 %"),
        ({EVALUATION: 30.0}, "Limited by evaluation: it took 25.0 %"),
        ({CHECKPOINT: 30.0}, "Limited by checkpoints: steps stood still for 25.0 %"),
        ({OTHER: 30.0}, "Limited by start-up: start-up, restarts and idle time took 25.0 %"),
        ({PRODUCTIVE: 0.0, OTHER: 9.0}, "No step has been measured yet"),
    ],
)
def test_the_verdict_names_the_limit_and_its_numbers(changed: dict[str, float], said: str) -> None:
    ledger = dict.fromkeys(CATEGORIES, 0.0) | {PRODUCTIVE: 90.0} | changed
    sentence = verdict(ledger, [attempts(RESUMED)[1]])
    assert sentence.replace("\N{NO-BREAK SPACE}", " ").startswith(said)


def test_the_verdict_tells_failures_from_pauses() -> None:
    assert "failures (1 of 2 attempts" in verdict(time_ledger(RESUMED), attempts(RESUMED))
    paused = [
        start(0, 1), steps(10, 1, 10, seconds=1.0), {"event": "stopped", "time": 10, "attempt": 1, "step": 10},
        start(5000, 2, step=10), steps(5010, 2, 20, seconds=1.0),
    ]  # fmt: skip
    assert "pauses (4,990 s" in verdict(time_ledger(paused), attempts(paused))


class Balance(HTMLParser):
    """Fails on a tag that is closed out of order or left open; collects text and references."""

    VOID = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("line", "circle", "polyline", "polygon")
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)


def read(html: str) -> str:
    """The page's text, after checking that it is well-formed and needs nothing else."""
    parser = Balance()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    assert not re.search(r"https?://|url\(|@import|\$\{?[a-z]", html)
    assert not [value for name, value in parser.attributes if name in ("src", "href", "srcset", "action")]
    return " ".join(" ".join(parser.words).replace("\N{NO-BREAK SPACE}", " ").split())


def test_the_page_of_a_finished_run(tmp_path: Path) -> None:
    result = {"top1": 0.7654, "top5": 0.91, "loss": 1.2, "num_images": 50000, "steps": 40, "attempts": 2}
    run = make_run(tmp_path, RESUMED, result)
    assert write_report(run) == run.report_file
    html = run.report_file.read_text()
    text = read(html)
    for said in (
        "nightly finished", "ResNet-20 on scikit-learn's digits", "Top-1 76.54 % held out", "Top-5 91.00 %",
        "Images evaluated 50,000", "Steps 40 of 40", "Wall time 58.0 s", "Workers 1 1 to 2 over the attempts",
        "Attempts 2", "Engine ddp", "Limited by failures", "lost work 5.00 s 8.6 %", "100.0 %",
        "rank 1: node-1, pid 101, cpu, threads 1", "failed: RuntimeError: <peer> & co. went away",
        "WorkerDied: killed", "12,345", "weight_decay: 0.0005",
    ):  # fmt: skip
        assert said in text
    assert "<peer>" not in html
    assert html.count('class="mark failure"') == html.count('class="mark resume"') == 5  # in each chart


def test_a_checkpoint_that_was_not_saved_is_not_why_an_attempt_failed(tmp_path: Path) -> None:
    full = {"event": "checkpoint_failed", "time": 110.0, "attempt": 1, "step": 10, "reason": "No space left"}
    text = read(page(make_run(tmp_path, [*CRASHED[:4], full, *CRASHED[5:]]), now=120.0))
    assert "failed: RuntimeError: <peer> & co. went away Failures" in text
    assert "500 ms failed: No space left" in text


def test_everything_that_comes_from_outside_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>\"&"
    began = start(0, 1)
    began["workers"] = [{"rank": 0, "host": evil, "pid": 1, "device": evil, "threads": 1}]
    events = [
        began,
        steps(5, 1, 10),
        saving(6, 1, 10, stall=0.1),
        {"event": "checkpoint_failed", "time": 7.0, "attempt": 1, "step": 10, "reason": evil},
        {"event": "checkpoint_broken", "time": 7.0, "attempt": 1, "path": f"/runs/{evil}", "reason": evil},
        {"event": "error", "time": 8.0, "rank": evil, "message": evil},
    ]
    run = make_run(tmp_path, events)
    run.write_recipe(load_recipe("digits").model_copy(update={"description": evil}))
    html = page(run, now=10.0)
    assert "alert('x')" in read(html)
    assert "<script>alert" not in html


def test_an_unfinished_run_shows_its_latest_evaluation(tmp_path: Path) -> None:
    text = read(page(make_run(tmp_path, RESUMED[:-3]), now=150.0))
    assert "nightly running" in text
    assert "Top-1 75.00 % held out, at step 10" in text
    assert "Steps 30 of 40" in text
    assert "No event for" not in text


def test_a_run_that_fell_silent_is_called_that(tmp_path: Path) -> None:
    text = read(page(make_run(tmp_path, RESUMED[:-3]), now=144.5 + 7320))
    assert "No event for 2 h 02 min" in text


def test_a_run_without_evaluation_and_with_a_loss_that_is_no_number(tmp_path: Path) -> None:
    events = [start(0, 1), steps(5, 1, 10, loss=float("nan")), steps(10, 1, 20), steps(15, 1, 30, loss=float("inf"))]
    text = read(page(make_run(tmp_path, events), now=16.0))
    assert "Top-1 \N{EM DASH} held out" in text
    assert "Evaluations None so far." in text
    assert "loss 0.1 at step 20 (epoch 2.0)" in text


@pytest.mark.parametrize("events", [None, []])
def test_before_anything_has_happened(tmp_path: Path, events: list[Event] | None) -> None:
    text = read(page(make_run(tmp_path, events), now=0.0))
    assert "nightly not started" in text
    assert "Nothing has happened yet" in text
    assert "weight_decay" in text


def test_an_error_before_the_first_start_is_shown(tmp_path: Path) -> None:
    text = read(page(make_run(tmp_path, [{"event": "error", "time": 1.0, "message": "no such data"}]), now=2.0))
    assert "no such data" in text
    assert "nightly failed" in text


def test_bare_events_make_a_page(tmp_path: Path) -> None:
    kinds = ("start", "resume", "step", "evaluation", "checkpoint_started", "checkpoint", "checkpoint_failed",
             "checkpoint_broken", "failure", "worker_failure", "error", "stopped", "finished")  # fmt: skip
    read(page(make_run(tmp_path, [{"event": kind, "time": 1.0} for kind in kinds]), now=2.0))


def test_where_there_is_no_run_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(LonghaulError, match="no run at"):
        write_report(RunDirectory(tmp_path / "nightly"))
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.floats(-1e6, 1e6), max_size=2000), st.integers(1, 300))
def test_thinning_keeps_the_range_and_the_end(values: list[float], most: int) -> None:
    buckets = thin(list(enumerate(values, start=1)), most)
    assert len(buckets) <= most
    assert all(b.low <= b.mean + 1e-6 and b.mean <= b.high + 1e-6 for b in buckets)
    if values:
        assert buckets[-1].step == len(values)
        assert (min(b.low for b in buckets), max(b.high for b in buckets)) == (min(values), max(values))


@given(st.floats(1e-6, 1e9))
def test_ticks_are_few_and_inside(top: float) -> None:
    found = ticks(top)
    assert found[0] == 0
    assert 2 <= len(found) <= 6
    assert found[-1] <= top * (1 + 1e-6)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 ms"), (0.048, "48 ms"), (13.68, "13.7 s"), (59.99, "1 min 00 s"), (3599.7, "1 h 00 min"),
     (7320, "2 h 02 min"), (200_000, "2 d 7 h")],
)  # fmt: skip
def test_durations_read_like_speech(seconds: float, said: str) -> None:
    assert duration(seconds) == said
