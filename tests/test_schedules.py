"""Learning rates are the closed forms they claim to be and torch's; what depends on the run's own measurements is
decided exactly and resumes exactly; and things are due when they are reached."""

import itertools
import json
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from configs import Duration, LonghaulError, Recipe, load_recipe
from configs.optimisation import Hold
from trainer.history import History
from trainer.progress import is_due
from trainer.schedules import learning_rate, plateau_drops, require_scores, total_steps

# --- closed forms ------------------------------------------------------------------------------------------------


def recipe(schedule: str, duration: str = "100it") -> Recipe:
    return load_recipe("digits", [f"schedule={schedule}", f"duration={duration}", "batch={size: 10, micro: 5}"])


def rates(made: Recipe, num_samples: int = 1000, history: History | None = None) -> list[float]:
    steps = range(total_steps(made, num_samples))
    return [learning_rate(made, num_samples, step, history or History()) for step in steps]


def torch_rates(schedule: lr_scheduler.LRScheduler, steps: int) -> Iterator[float]:
    for _ in range(steps):
        yield schedule.optimizer.param_groups[0]["lr"]
        schedule.optimizer.step()
        schedule.step()


def optimizer(lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def test_multistep_is_torchs() -> None:
    made = recipe("{kind: multistep, lr: 0.8, milestones: [30it, 0.6ep, 900samples], gamma: 0.25}")
    expected = lr_scheduler.MultiStepLR(optimizer(0.8), [30, 60, 90], 0.25)
    assert rates(made) == pytest.approx(list(torch_rates(expected, 100)))
    assert rates(made)[29:31] == [0.8, 0.2]


def test_cosine_is_torchs() -> None:
    made = recipe("{kind: cosine, lr: 0.8, end_lr: 0.01}")
    expected = lr_scheduler.CosineAnnealingLR(optimizer(0.8), T_max=100, eta_min=0.01)
    assert rates(made) == pytest.approx(list(torch_rates(expected, 100)))


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_polynomial_is_torchs_and_ends_at_its_end_rate(power: float) -> None:
    made = rates(recipe(f"{{kind: polynomial, lr: 0.8, power: {power}}}"))
    expected = lr_scheduler.PolynomialLR(optimizer(0.8), total_iters=100, power=power)
    assert made == pytest.approx(list(torch_rates(expected, 100)))
    ended = rates(recipe(f"{{kind: polynomial, lr: 0.9, end_lr: 0.1, power: {power}}}"))  # 0.1 higher all the way
    assert ended == pytest.approx([rate + 0.1 for rate in made])


def test_constant_is_constant_and_one_cycle_goes_linearly_up_and_down() -> None:
    assert rates(recipe("{kind: constant, lr: 0.8}")) == [0.8] * 100
    made = rates(recipe("{kind: one_cycle, lr: 0.8, end_lr: 0.1, warmup: 20it}"))
    up = [0.8 * (step + 1) / 20 for step in range(20)]
    expected = lr_scheduler.LinearLR(optimizer(0.8), start_factor=1, end_factor=0.125, total_iters=80)
    assert made == pytest.approx(up + list(torch_rates(expected, 80)))


SCHEDULES = {
    "constant": "{kind: constant, lr: 0.8, warmup: %s}",
    "multistep": "{kind: multistep, lr: 0.8, milestones: [50it], warmup: %s}",
    "cosine": "{kind: cosine, lr: 0.8, end_lr: 0.001, warmup: %s}",
    "polynomial": "{kind: polynomial, lr: 0.8, end_lr: 0.001, warmup: %s}",
    "one_cycle": "{kind: one_cycle, lr: 0.8, end_lr: 0.001, warmup: %s}",
    "plateau": "{kind: plateau, lr: 0.8, warmup: %s}",
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(("warmup", "steps"), [("0it", 0), ("1it", 1), ("7it", 7), ("0.25ep", 25), ("130samples", 13)])
def test_warm_up_is_linear_and_reaches_the_full_rate_as_it_ends(kind: str, warmup: str, steps: int) -> None:
    made = rates(recipe(SCHEDULES[kind] % warmup))
    assert made[:steps] == [0.8 * (step + 1) / steps for step in range(steps)]
    assert made[steps] == pytest.approx(0.8)
    assert all(0 <= rate <= 0.8 + 1e-12 for rate in made)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_warm_up_from_a_rate_is_torchs_linear_one(kind: str) -> None:
    made = rates(recipe(SCHEDULES[kind].replace("warmup", "warmup_lr: 0.2, warmup") % "20it"))
    # torch starts at the first rate; ours is one step ahead of it, so as to end at the full rate.
    expected = lr_scheduler.LinearLR(optimizer(0.8), start_factor=0.25, total_iters=20)
    assert made[:20] == pytest.approx(list(torch_rates(expected, 21))[1:])


@pytest.mark.parametrize("kind", ["cosine", "polynomial", "one_cycle"])
def test_the_rate_would_be_the_end_rate_one_step_after_the_last(kind: str) -> None:
    made = recipe(SCHEDULES[kind] % "10it")
    assert learning_rate(made, 1000, 100, History()) == pytest.approx(0.001)
    falling = rates(made)[10:]
    assert falling == sorted(falling, reverse=True) and falling[-1] > 0.001


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_run_that_is_all_warm_up_still_has_a_schedule(kind: str) -> None:
    made = recipe(SCHEDULES[kind] % "100it")
    assert rates(made)[-1] == pytest.approx(0.8)
    assert all(math.isfinite(rate) for rate in rates(recipe(SCHEDULES[kind] % "500it")))


@pytest.mark.parametrize(
    ("duration", "steps"), [("600000it", 600_000), ("90ep", 450_411), ("1.2Msamples", 4_688), ("1samples", 1)]
)
def test_total_steps_of_imagenet(duration: str, steps: int) -> None:
    made = load_recipe("paper-resnet50", [f"duration={duration}"])
    assert total_steps(made, 1_281_167) == steps


# --- plateau -----------------------------------------------------------------------------------------------------

COUNTS = st.lists(st.integers(0, 1024), max_size=60)
PATIENCE, DROPS = st.integers(1, 6), st.integers(1, 5)
EXACT = st.sampled_from([0.0, 1 / 1024, 1 / 256, 1 / 16])  # as decimals too


def simulated(errors: list[Fraction], patience: int, threshold: Fraction, drops: int) -> int:
    """One evaluation after the other, as the schema words it."""
    done, best, in_a_row = 0, Fraction(2), 0  # a first error is always far below 2
    for error in errors:
        fell = best - error > threshold
        best = error if fell else best
        in_a_row = 0 if fell else in_a_row + 1
        if in_a_row == patience and done < drops:
            done, in_a_row = done + 1, 0
    return done


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(50, 60)), max_size=40), PATIENCE, DROPS, st.integers(0, 200))
def test_plateau_drops_as_a_simulation_in_fractions(
    scores: list[tuple[int, int]], patience: int, drops: int, thousandths: int
) -> None:
    errors = [1 - Fraction(correct, images) for correct, images in scores]
    expected = simulated(errors, patience, Fraction(thousandths, 1000), drops)
    assert plateau_drops(scores, patience, thousandths / 1000, drops) == expected


@given(COUNTS, PATIENCE, EXACT)
@example([1024] * 30, 3, 0.0)
def test_plateau_drops_as_torch_does_where_floats_are_exact(counts: list[int], patience: int, threshold: float) -> None:
    theirs = lr_scheduler.ReduceLROnPlateau(
        optimizer(1.0), factor=0.5, patience=patience - 1, threshold=threshold, threshold_mode="abs", eps=0.0
    )
    for done in range(1, len(counts) + 1):
        theirs.step((1024 - counts[done - 1]) / 1024)
        drops = plateau_drops([(count, 1024) for count in counts[:done]], patience, threshold, drops=1000)
        assert theirs.optimizer.param_groups[0]["lr"] == 0.5**drops


@given(COUNTS, PATIENCE, DROPS, EXACT)
def test_another_evaluation_never_takes_a_drop_back_and_makes_one_at_most(
    counts: list[int], patience: int, drops: int, threshold: float
) -> None:
    scores = [(count, 1024) for count in counts]
    done = [plateau_drops(scores[:n], patience, threshold, drops) for n in range(len(scores) + 1)]
    assert all(before <= after <= before + 1 for before, after in itertools.pairwise(done))
    assert done[-1] <= drops


def test_no_float_decides_what_is_a_plateau() -> None:
    # The error falls by just a thousandth, which is not more than a thousandth; floats say 0.3 - 0.299 > 0.001.
    assert 0.3 - 0.299 > 0.001
    assert plateau_drops([(700, 1000), (701, 1000)], 1, 0.001, 3) == 1
    assert plateau_drops([(700, 1000), (702, 1000)], 1, 0.001, 3) == 0
    assert plateau_drops([(700, 1000), (701, 1000), (702, 1000)], 2, 0.001, 3) == 0  # small steps add up


def test_the_rate_of_a_step_is_dropped_by_the_evaluations_before_it_and_no_later_one() -> None:
    made = recipe("{kind: plateau, lr: 0.8, gamma: 0.5, patience: 2, drops: 2, warmup: 5it}")
    history = History()
    for step in range(10, 101, 10):
        history.evaluated(step, 5, 10)
    up = [0.8 * (step + 1) / 5 for step in range(5)]
    expected = up + [0.8] * 25 + [0.4] * 20 + [0.2] * 50  # two more evaluations after the first, then two more
    assert rates(made, history=history) == expected
    for done in range(101):  # as it was seen at the time
        seen = History([score for score in history.scores if score[0] <= done])
        assert rates(made, history=seen)[: done + 1] == expected[: done + 1]


def test_a_plateau_without_held_out_images_is_refused() -> None:
    plateau, cosine = recipe("{kind: plateau, lr: 0.8}"), recipe("{kind: cosine, lr: 0.8}")
    with pytest.raises(LonghaulError, match=r"^schedule.kind=plateau .* --holdout, or choose another schedule.kind\.$"):
        require_scores(plateau, has_val=False)
    require_scores(plateau, has_val=True)
    require_scores(cosine, has_val=False)


# --- hold --------------------------------------------------------------------------------------------------------

HELD = "{kind: multistep, lr: 0.1, milestones: [50it], hold: {lr: 0.01, train_error: 0.8, window: %s}}"


def train(made: Recipe, counts: list[int], history: History, step: int = 0) -> History:
    """Updates with so many correct samples each, as the loop notes them."""
    hold = made.schedule.hold
    assert hold is not None
    for count in counts:
        if not history.holding(made):
            break
        step += 1
        history.trained(hold, made.batch.size, 1000, step, count)
    return history


def test_the_rate_is_held_until_the_error_is_below_and_the_schedule_counts_from_the_start() -> None:
    made = recipe(HELD % "5it")
    # Batches of 10, windows of 5: at 10 correct of 50 the error is 80 %, which is not below 80 %; at 11 it is.
    counts = [2, 2, 2, 2, 2, *[10, 0, 0, 0, 0], *[0, 0, 0, 0, 10], *[0, 0, 0, 1, 10], 10, 10]
    history = train(made, counts, History())
    assert history.released == 20 and not history.holding(made)
    assert rates(made, history=history) == pytest.approx([0.01] * 20 + [0.1] * 30 + [0.01] * 50)
    assert rates(made) == [0.01] * 100  # not yet released


def test_a_hold_has_no_say_without_one_in_the_recipe() -> None:
    made = recipe("{kind: constant, lr: 0.1}")
    assert not History().holding(made)
    assert rates(made, history=History(released=3)) == [0.1] * 100


@given(
    st.lists(st.integers(0, 10), max_size=40),
    st.sampled_from(["1it", "3it", "35samples", "0.05ep"]),
    st.integers(1, 1000),
)
def test_a_hold_ends_with_the_first_whole_window_that_is_good_enough(
    counts: list[int], window: str, thousandths: int
) -> None:
    made = recipe(f"{{kind: constant, lr: 0.1, hold: {{train_error: {thousandths / 1000}, window: {window}}}}}")
    length = {"1it": 1, "3it": 3, "35samples": 4, "0.05ep": 5}[window]
    windows = [counts[at : at + length] for at in range(0, len(counts) - length + 1, length)]
    good = [1 - Fraction(sum(each), 10 * length) < Fraction(thousandths, 1000) for each in windows]
    assert train(made, counts, History()).released == (length * (good.index(True) + 1) if True in good else None)


@given(st.lists(st.integers(0, 10), max_size=40), st.integers(0, 40))
def test_a_run_resumed_in_the_middle_of_a_window_goes_on_exactly(counts: list[int], cut: int) -> None:
    made = recipe(HELD % "7it")
    whole = train(made, counts, History())
    first = train(made, counts[:cut], History())
    resumed = History.from_dict(json.loads(json.dumps(first.as_dict())))
    assert resumed == first
    assert train(made, counts[cut:], resumed, step=min(cut, len(counts))) == whole


def test_hold_and_warm_up_exclude_each_other() -> None:
    with pytest.raises(LonghaulError, match=r"schedule.hold and schedule.warmup=5it are two ways to begin: leave one"):
        recipe("{kind: constant, lr: 0.1, hold: {}, warmup: 5it}")


# --- history -----------------------------------------------------------------------------------------------------


def test_an_evaluation_repeated_at_the_same_step_does_not_count_twice() -> None:
    history = History()
    history.evaluated(10, 7, 9)
    resumed = History.from_dict(json.loads(json.dumps(history.as_dict())))
    resumed.evaluated(10, 8, 9)
    assert resumed.scores == [(10, 7, 9)]
    resumed.evaluated(20, 8, 9)
    assert resumed.scores == [(10, 7, 9), (20, 8, 9)]


@pytest.mark.parametrize(
    ("values", "key"),
    [
        (None, "history"),
        ([], "history"),
        ({"scores": [[1, 2]]}, "history.scores.0"),
        ({"scores": [[1, 2, -3]]}, "history.scores.0.2"),
        ({"scores": [[1, 2.0, 3]]}, "history.scores.0.1"),
        ({"window": [1]}, "history.window"),
        ({"window": ["1", 2]}, "history.window.0"),
        ({"released": "now"}, "history.released"),
        ({"released": True}, "history.released"),
        ({"moments": 1}, "history.moments"),
        ({"scores": [[2, 5, 9], [1, 5, 9]]}, "history.scores"),
        ({"scores": [[2, 5, 9], [2, 5, 9]]}, "history.scores"),
        ({"scores": [[2, 10, 9]]}, "history.scores"),
    ],
)
def test_a_history_that_was_not_written_by_us_is_refused_by_its_key(values: Any, key: str) -> None:
    with pytest.raises(LonghaulError) as caught:
        History.from_dict(values)
    assert str(caught.value).startswith(f"{key}") and "resume from another checkpoint." in str(caught.value)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(9, 99)), max_size=9),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.none() | st.integers(0, 99),
)
def test_a_history_reads_back_equal(
    counts: list[tuple[int, int]], window: tuple[int, int], released: int | None
) -> None:
    scores = [(5 * at, correct, images) for at, (correct, images) in enumerate(counts)]
    history = History(scores, window, released)
    assert History.from_dict(json.loads(json.dumps(history.as_dict()))) == history


def test_defaults_of_a_hold_are_the_papers() -> None:
    assert (Hold().lr, Hold().train_error) == (0.01, 0.8)


# --- what is due when --------------------------------------------------------------------------------------------


def dues(every: str, steps: int, batch: int, samples: int) -> list[int]:
    length = Duration.parse(every)
    return [step for step in range(1, steps + 1) if is_due(length, step, batch, samples)]


@given(st.integers(1, 400), st.integers(1, 300), st.integers(1, 64), st.integers(1, 2_000), st.data())
@settings(max_examples=150)
def test_every_multiple_of_a_period_is_due_once(
    period: int, steps: int, batch: int, samples: int, data: st.DataObject
) -> None:
    unit = data.draw(st.sampled_from(["it", "samples", "ep"]))
    of_samples = period * {"it": batch, "samples": 1, "ep": samples}[unit]
    found = dues(f"{period}{unit}", steps, batch, samples)
    # By integers: the steps in which one multiple at least, or more where a step is longer than the period, is reached.
    expected = [s for s in range(1, steps + 1) if s * batch // of_samples > (s - 1) * batch // of_samples]
    assert found == expected
    if of_samples >= batch:
        assert len(found) == steps * batch // of_samples


@pytest.mark.parametrize("hundredths", [10, 29, 57, 110, 115, 220])
@given(st.integers(1, 20), st.integers(1, 64), st.integers(1, 20))
def test_hundredths_of_an_epoch_are_due_when_they_are_reached(
    hundredths: int, steps: int, batch: int, times: int
) -> None:
    # 1.1 and its like have no exact binary form: 1.1 * 10 is more than 11, 0.29 * 100 less than 29.
    period = hundredths * steps
    found = dues(f"{hundredths / 100}ep", times * period, batch, 100 * steps * batch)
    assert found == list(range(period, times * period + 1, period))


def test_what_is_due_is_due_in_the_last_of_six_hundred_thousand_steps_too() -> None:
    every = Duration.parse("5kit")
    assert [s for s in (594_999, 595_000, 599_999, 600_000) if is_due(every, s, 256, 1_281_167)] == [595_000, 600_000]
    epoch = Duration.parse("1ep")
    around = [s for s in range(450_400, 450_420) if is_due(epoch, s, 256, 1_281_167)]
    assert around == [total_steps(load_recipe("paper-resnet50", ["duration=90ep"]), 1_281_167)]
