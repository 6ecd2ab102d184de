"""`longhaul report`: one self-contained HTML page about a run, from its events, its result and its recipe alone."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from configs import Recipe
from trainer.charts import Axis, Mark, Series, figure
from trainer.rundir import RunDirectory, write_atomically
from trainer.timeline import (
    CATEGORIES,
    FAILURES,
    Attempt,
    Event,
    attempts,
    mean_rate,
    shares,
    status,
    surviving,
    time_ledger,
    verdict,
)

_TEMPLATE = Path(__file__).with_name("report.html")
_SILENT_SECONDS = 900.0  # longer than a collective waits for a lost worker before the run fails
_NUMBER, _WIDE, _PLAIN = "number", "wide", ""


class Html(str):
    """Text that is markup already; any other text is escaped."""


def write_report(run: RunDirectory) -> Path:
    """Write the page about a run, finished or not, and return its path. Raises LonghaulError where there is no run."""
    write_atomically(run.report_file, page(run, time.time()))
    return run.report_file


def page(run: RunDirectory, now: float) -> str:
    """The whole page, as of `now` (seconds since 1970)."""
    recipe = run.recipe()
    events = [e for e in run.events() if isinstance(e, dict) and "event" in e and "time" in e]
    body = [_header(run, recipe, events, now)]
    if attempts(events):
        body += [
            _verdict(events),
            _figures(recipe, run.result() or {}, events),
            _section("Curves", _curves(events)),
            _section("Where the wall time went", _ledger(events)),
            _section("Attempts", _attempts(events)),
            _section("Failures", _failures(events)),
            _section("Evaluations", _evaluations(events)),
            _section("Checkpoints", _checkpoints(events)),
        ]
    else:
        body += [Html('<p class="card verdict">Nothing has happened yet: no attempt has started.</p>')]
        body += [_section("Failures", _failures(events))] if events else []
    body.append(_section("Recipe", _recipe(run)))
    return Template(_TEMPLATE.read_text()).substitute(
        title=escape(f"{run.name} \N{MIDDLE DOT} Longhaul run"), body="\n".join(body)
    )


def _section(title: str, content: str) -> Html:
    return Html(f"<section><h2>{escape(title)}</h2>\n{content}</section>")


def _header(run: RunDirectory, recipe: Recipe, events: Sequence[Event], now: float) -> Html:
    state = status(events)
    times = f"Page written {_when(now)} UTC."
    if events:
        times = f"From {_when(events[0]['time'])} to {_when(events[-1]['time'])} UTC. {times}"
    silent = now - events[-1]["time"] if events and state == "running" else 0.0
    warning = ""
    if silent > _SILENT_SECONDS:
        warning = f'<p class="bad">No event for {duration(silent)}: the run may have died without a word.</p>'
    return Html(
        f'<header><h1>{escape(run.name)}<span class="badge {state.replace(" ", "-")}">{state}</span></h1>'
        f'<p>{escape(recipe.description)}</p><p class="soft">{times}</p>{warning}</header>'
    )


def _verdict(events: Sequence[Event]) -> Html:
    return Html(f'<p class="card verdict">{escape(verdict(time_ledger(events), attempts(events)))}</p>')


def _figures(recipe: Recipe, result: Mapping[str, Any], events: Sequence[Event]) -> Html:
    """The headline. Scores come from the result, and while there is none from the latest evaluation."""
    tries, steps = attempts(events), surviving(events, "step")
    latest = (surviving(events, "evaluation") or [{}])[-1]
    score = result if result.get("top1") is not None else latest
    at = "held out" if score is not latest or not latest else f"held out, at step {latest['step']:,}"
    images, rate, wall = score.get("num_images"), mean_rate(events), sum(time_ledger(events).values())
    done = result.get("steps", tries[-1].reached)
    total = f"of {steps[-1]['total_steps']:,}" if steps and "total_steps" in steps[-1] else ""
    sizes = [int(attempt.start.get("world_size", 0)) for attempt in tries]
    spread = f"{min(sizes)} to {max(sizes)} over the attempts" if min(sizes) < max(sizes) else _devices(tries[-1])
    items = [
        ("Top-1", percent(score.get("top1")), at),
        ("Top-5", percent(score.get("top5")), at),
        ("Images evaluated", "\N{EM DASH}" if images is None else f"{images:,}", ""),
        ("Steps", f"{done:,}", total),
        ("Wall time", duration(wall), "first start to last event"),
        ("Mean throughput", "\N{EM DASH}" if rate is None else f"{rate:,.0f}", "images/s while training"),
        ("Workers", f"{sizes[-1]:,}", spread),
        ("Attempts", f"{len(tries):,}", ""),
        ("Engine", recipe.engine.name, ""),
        ("Precision", recipe.precision, ""),
    ]
    skipped = int(steps[-1].get("num_skipped", 0)) if steps else 0
    if skipped:
        items.append(("Updates skipped", f"{skipped:,}", "their gradients were not finite"))
    cells = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in items
    )
    return Html(f'<dl class="figures">{"".join(cells)}</dl>')


def _devices(attempt: Attempt) -> str:
    kinds = {str(worker.get("device", "")).partition(":")[0] for worker in attempt.start.get("workers", [])}
    return "on " + " and ".join(sorted(kinds)) if kinds - {""} else ""


def _curves(events: Sequence[Event]) -> Html:
    steps, evaluations, marks = surviving(events, "step"), surviving(events, "evaluation"), _marks(attempts(events))
    known = [e for e in [*steps, *evaluations] if e["step"] and "epoch" in e]
    last = max([e["step"] for e in [*steps, *evaluations]] + [mark.step for mark in marks], default=0)
    axis = Axis(last, known[-1]["epoch"] / known[-1]["step"] if known else 0.0)

    def series(name: str, css: str, found: Iterable[Event], key: str, dots: bool = False) -> Series:
        return Series(name, css, [(e["step"], float(e[key])) for e in found if e.get(key) is not None], dots)

    accuracy = [
        series("training", "one", steps, "train_top1"),
        series("held out", "two", evaluations, "top1", dots=True),
    ]
    charts = [
        figure("Training loss", [series("loss", "one", steps, "loss")], axis, marks, lambda v: f"{v:,.4g}"),
        figure("Top-1", accuracy, axis, marks, percent, 1.0, lambda v: f"{v:.0%}"),
        figure("Learning rate", [series("rate", "one", steps, "lr")], axis, marks, lambda v: f"{v:,.4g}"),
        figure("Gradient norm", [series("norm", "one", steps, "gradient_norm")], axis, marks, lambda v: f"{v:,.4g}"),
        figure(
            "Throughput", [series("images/s", "one", steps, "images_per_second")], axis, marks, lambda v: f"{v:,.0f}"
        ),
    ]
    note = (
        '<p class="legend">Dashed red lines: an attempt was cut short. Dotted lines: a later one resumed there. Work '
        "that was done twice is shown once, as it became part of the run.</p>"
        if marks
        else ""
    )
    return Html(f'{note}<div class="curves">{"".join(charts)}</div>')


def _marks(tries: Sequence[Attempt]) -> list[Mark]:
    resumed = [
        Mark(attempt.from_step, "resume", f"attempt {attempt.number} resumed at step {attempt.from_step:,}")
        for attempt in tries[1:]
    ]
    failed = [
        Mark(attempt.reached, "failure", f"attempt {attempt.number} was cut short after step {attempt.reached:,}")
        for attempt in tries
        if attempt.was_cut
    ]
    return resumed + failed


def _ledger(events: Sequence[Event]) -> Html:
    ledger = time_ledger(events)
    share = shares(ledger)
    bar = "".join(
        f'<span class="c{index}" style="width:{share[name]:.1f}%" title="{name}: {share[name]:.1f} %"></span>'
        for index, name in enumerate(CATEGORIES)
        if share[name]
    )
    rows: list[Sequence[str]] = [
        (Html(f'<span class="swatch c{index}"></span>{name}'), _seconds(ledger[name]), f"{share[name]:.1f} %")
        for index, name in enumerate(CATEGORIES)
    ]
    total = ("sum: first start to last event", _seconds(sum(ledger.values())), f"{sum(share.values()):.1f} %")
    columns = {"": _PLAIN, "Time": _NUMBER, "Share": _NUMBER}
    return Html(f'<div class="card"><div class="bar">{bar}</div>{_table(columns, rows, total)}</div>')


def _attempts(events: Sequence[Event]) -> Html:
    columns = {
        "Attempt": _NUMBER, "Started (UTC)": _PLAIN, "Lasted": _NUMBER, "From step": _NUMBER, "To step": _NUMBER,
        "Steps lost": _NUMBER, "Workers": _NUMBER, "Where": _PLAIN, "How it ended": _WIDE,
    }  # fmt: skip
    rows = [
        (
            f"{attempt.number:,}", _when(attempt.start["time"]), duration(attempt.seconds),
            f"{attempt.from_step:,}", f"{attempt.reached:,}", f"{attempt.lost_steps:,}",
            f"{attempt.start.get('world_size', 0):,}", _places(attempt), _ending(attempt),
        )
        for attempt in attempts(events)
    ]  # fmt: skip
    return _table(columns, rows)


def _places(attempt: Attempt) -> Html:
    """Workers by host, and under it each one's process."""
    workers = attempt.start.get("workers", [])
    hosts = sorted({str(worker.get("host", "?")) for worker in workers})
    summary = "".join(hosts) if len(hosts) < 2 else f"{len(hosts)} hosts"
    lines = (
        f"rank {worker.get('rank', '?')}: {worker.get('host', '?')}, pid {worker.get('pid', '?')}, "
        f"{worker.get('device', '?')}, threads {worker.get('threads', '?')}"
        for worker in workers
    )
    listed = "".join(f"<br>{escape(line)}" for line in lines)
    return Html(f"<details><summary>{escape(summary)}</summary>{listed}</details>") if workers else Html("")


def _ending(attempt: Attempt) -> Html:
    said = {"cut": "cut short: nothing was written about it", "running": "running"}
    message = said.get(attempt.ending, attempt.ending)
    if attempt.ending == "failed":
        message = "failed: " + next(_message(e) for e in attempt.events if e["event"] in FAILURES)
    css = {"finished": "good", "failed": "bad", "cut": "bad"}.get(attempt.ending, "")
    return Html(f'<span class="{css}">{escape(message)}</span>')


_MESSAGES = {
    "failure": "error",
    "worker_failure": "error",
    "error": "message",
    "checkpoint_failed": "reason",
    "memory_save_failed": "reason",
    "checkpoint_broken": "reason",
}


def _message(event: Event) -> str:
    return str(event.get(_MESSAGES[event["event"]], "no reason was written"))


def _failures(events: Sequence[Event]) -> Html:
    columns = {"When (UTC)": _PLAIN, "Attempt": _NUMBER, "What": _PLAIN, "Where": _PLAIN, "Why": _WIDE}
    names = {
        "failure": "attempt failed", "worker_failure": "worker lost", "error": "error",
        "checkpoint_failed": "checkpoint not saved", "checkpoint_broken": "checkpoint set aside",
        "memory_save_failed": "not saved in memory",
    }  # fmt: skip

    def where(event: Event) -> str:
        if "rank" in event:
            return f"rank {event['rank']}"
        return f"step {event['step']:,}" if "step" in event else Path(str(event.get("path", ""))).name

    rows = [
        (_when(e["time"]), str(e.get("attempt", "")), names[e["event"]], where(e), _message(e))
        for e in events
        if e["event"] in _MESSAGES
    ]
    return _table(columns, rows) if rows else Html('<p class="soft">None.</p>')


def _evaluations(events: Sequence[Event]) -> Html:
    columns = dict.fromkeys(("Step", "Epoch", "Top-1", "Top-5", "Loss", "Images", "Took"), _NUMBER)
    rows = [
        (
            f"{e['step']:,}", f"{e.get('epoch', 0):,.2f}", percent(e.get("top1")), percent(e.get("top5")),
            f"{e.get('loss', math.nan):,.4f}", f"{e.get('num_images', 0):,}", duration(e.get("seconds", 0.0)),
        )
        for e in surviving(events, "evaluation")
    ]  # fmt: skip
    return _table(columns, rows) if rows else Html('<p class="soft">None so far.</p>')


def _checkpoints(events: Sequence[Event]) -> Html:
    """The interval that was chosen, and one row for each save that was begun, whatever became of it."""
    ends = {(e.get("attempt"), e.get("step")): e for e in events if e["event"] in ("checkpoint", "checkpoint_failed")}
    columns = {
        "Step": _NUMBER, "Attempt": _NUMBER, "Begun (UTC)": _PLAIN, "Steps stood still": _NUMBER,
        "Written behind steps": _NUMBER, "Outcome": _WIDE,
    }  # fmt: skip
    rows = [
        (
            f"{begun.get('step', 0):,}", str(begun.get("attempt", "")), _when(begun["time"]),
            duration(begun.get("stall_seconds", 0.0)), duration(end["seconds"]) if "seconds" in end else "",
            _outcome(end),
        )
        for begun in events
        if begun["event"] == "checkpoint_started"
        for end in [ends.get((begun.get("attempt"), begun.get("step")), {})]
    ]  # fmt: skip
    said = [interval_chosen(e) for e in events if e["event"] == "checkpoint_interval"][-1:]
    copies = [e for e in events if e["event"] == "memory_save_started"]
    if copies:
        stood = duration(sum(e.get("stall_seconds", 0.0) for e in copies))
        said.append(
            f"{len(copies):,} copies were made into the memory of other machines; steps stood still for {stood}."
        )
    notes = "".join(f'<p class="soft">{escape(sentence)}</p>' for sentence in said)
    return Html(notes + (_table(columns, rows) if rows else Html('<p class="soft">None so far.</p>')))


def interval_chosen(event: Event) -> str:
    """What `checkpoint.every: auto` has come to, and why, in a sentence."""
    interval, cost, between = (duration(event.get(key, 0.0)) for key in ("seconds", "cost_seconds", "mtbf_seconds"))
    return (
        f"A checkpoint every {interval}, about {event.get('steps', 0):,} steps: a save costs {cost} of training, and a "
        f"failure is to be expected every {between} ({event.get('num_failures', 0):,} so far)."
    )


def _outcome(end: Event) -> str:
    if end.get("event") == "checkpoint_failed":
        return Html(f'<span class="bad">{escape(f"failed: {_message(end)}")}</span>')
    return "saved" if end else "not committed so far"


def _recipe(run: RunDirectory) -> Html:
    text = escape(run.recipe_file.read_text())
    return Html(f'<details class="card"><summary>The resolved recipe</summary><pre>{text}</pre></details>')


def _table(columns: Mapping[str, str], rows: Iterable[Sequence[str]], total: Sequence[str] = ()) -> Html:
    """A table; `columns` gives each heading the class of its cells."""

    def line(tag: str, cells: Sequence[str]) -> str:
        marked = zip(columns.values(), cells, strict=True)
        return "<tr>" + "".join(f'<{tag} class="{css}">{_text(cell)}</{tag}>' for css, cell in marked) + "</tr>\n"

    head, body = line("th", list(columns)), "".join(line("td", row) for row in rows)
    foot = f"<tfoot>{line('td', total)}</tfoot>" if total else ""
    table = f"<table><thead>{head}</thead><tbody>{body}</tbody>{foot}</table>"
    return Html(f'<div class="scroll">{table}</div>')


def _text(value: str) -> str:
    return value if isinstance(value, Html) else escape(value)


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds < 60 else f"{duration(seconds)} ({seconds:,.1f} s)"


def percent(share: float | None) -> str:
    """A share in [0, 1] as per cent."""
    return "\N{EM DASH}" if share is None else f"{share:.2%}".replace("%", "\N{NO-BREAK SPACE}%")


def duration(seconds: float) -> str:
    """Seconds in the units in which a person would say them."""
    if seconds < 1:
        return f"{1000 * seconds:,.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
