"""Result cards: what they say of real runs, what they refuse, and that README's table is what the cards give."""

import json
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from configs import LonghaulError, list_recipes, load_recipe
from data_pipeline.ingest import prepare
from data_pipeline.sources import open_source
from launch.cards import BEGIN, END, results_table, score_text, with_table
from launch.cli import app
from tests.conftest import ROOT
from tests.workers import make_job, train
from trainer.cards import changes, is_whole, make_card, nearest_recipe, overrides_between, read_cards
from trainer.rundir import RunDirectory

CARDS = read_cards(ROOT / "benchmarks" / "results" / "cards")


# --- the cards that come along -----------------------------------------------------------------------------------


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_a_card_is_of_a_recipe_as_it_is_today_or_says_that_it_is_not(card: dict[str, Any]) -> None:
    assert is_whole(card), "the card was edited by hand"
    assert card["recipe"] in list_recipes()
    found = changes(card)
    assert not found or "superseded" in card, (
        f"{card['recipe']} was changed since it was measured ({'; '.join(found)}): measure it again, or write into the "
        f'card why it stays, as "superseded": "..."'
    )


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_a_card_says_what_its_score_depends_on(card: dict[str, Any]) -> None:
    seeds = [run["seed"] for run in card["runs"]]
    assert seeds == sorted(set(seeds))
    assert card["machine"] and {"python", "torch", "dali"} <= set(card["versions"])
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", card["commit"])
    assert len({(run["steps"], run["num_images"]) for run in card["runs"]}) == 1


def test_readmes_table_is_what_the_cards_give() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    assert CARDS and with_table(text, results_table(CARDS), readme) == text, "run `longhaul card --readme README.md`"


# --- cards of real runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short runs, `a` and `b`, of seeds 0 and 1."""
    directory = tmp_path_factory.mktemp("runs")
    prepare(open_source("digits", 0.0), directory / "digits")
    for name, seed in (("a", 0), ("b", 1)):
        train(make_job(directory / name, directory / "digits", f"seed={seed}", "duration=4it", "schedule.lr=0.05"), 1)
    return directory


@pytest.fixture
def altered(runs: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of run `b` under another name, with something about it changed."""

    def alter(change: Callable[[RunDirectory], None]) -> Path:
        change(RunDirectory(Path(shutil.copytree(runs / "b", tmp_path / "c"))))
        return tmp_path / "c"

    return alter


def longhaul(*arguments: object) -> tuple[int, str]:
    """What the command prints and its exit code; a mistake's sentence with exit code 2, as `main` has it."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(done.exception, LonghaulError):
        return 2, str(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_a_card_holds_runs_that_differ_in_their_seed_alone(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "card.json"
    code, output = longhaul("card", runs / "b", runs / "a", "--out", out)
    assert code == 0 and "digits, top-1" in output
    card = json.loads(out.read_text())
    results = [json.loads((runs / name / "result.json").read_text()) for name in ("a", "b")]
    assert [run["seed"] for run in card["runs"]] == [0, 1]
    assert [run["top1"] for run in card["runs"]] == [result["top1"] for result in results]
    assert card["top1"]["mean"] == pytest.approx(statistics.fmean(r["top1"] for r in results), abs=1e-6)
    assert card["top1"]["std"] == pytest.approx(statistics.stdev([r["top1"] for r in results]), abs=1e-6)
    assert card["recipe"] == "digits" and {"duration=4it", "schedule.lr=0.05"} <= set(card["overrides"])
    assert card["runs"][0]["workers"] == 1 and card["machine"] and card["data_sha256"]
    assert is_whole(card) and changes(card) == []
    assert load_recipe("digits", card["overrides"]).duration.text == "4it"
    assert "std" not in make_card([RunDirectory(runs / "a")], None, "here", {})["top1"]


def set_key(key: str, value: Any) -> Callable[[RunDirectory], None]:
    def change(run: RunDirectory) -> None:
        values = yaml.safe_load(run.recipe_file.read_text())
        *parents, last = key.split(".")
        section = values
        for name in parents:
            section = section[name]
        section[last] = value
        run.recipe_file.write_text(yaml.safe_dump(values))

    return change


def without_score(run: RunDirectory) -> None:
    run.result_file.write_text(json.dumps({**(run.result() or {}), "top1": None}))


def on_other_data(run: RunDirectory) -> None:
    run.events_file.write_text(run.events_file.read_text().replace('"data_sha256": "', '"data_sha256": "0'))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (set_key("schedule.lr", 0.1), "differ in more than the seed (schedule.lr: 0.05 -> 0.1): make a card of each"),
        (set_key("seed", 0), "More than one of the runs has the seed 0"),
        (lambda run: run.result_file.unlink(), "is not finished (it has no result.json)"),
        (without_score, "has no score"),
        (on_other_data, "were trained on different data"),
    ],
)
def test_runs_that_do_not_belong_on_one_card_are_refused(
    runs: Path, altered: Callable[..., Path], tmp_path: Path, change: Callable[[RunDirectory], None], told: str
) -> None:
    code, output = longhaul("card", runs / "a", altered(change), "--out", tmp_path / "card.json")
    assert code == 2 and told in output and not (tmp_path / "card.json").exists()


def test_runs_that_were_made_elsewhere_must_be_described(altered: Callable[..., Path], tmp_path: Path) -> None:
    def elsewhere(run: RunDirectory) -> None:
        run.events_file.write_text(re.sub(r'"host": "[^"]*"', '"host": "node17"', run.events_file.read_text()))

    def on_a_gpu(run: RunDirectory) -> None:
        run.events_file.write_text(run.events_file.read_text().replace('"device": "cpu"', '"device": "cuda:0"'))

    away, out = altered(elsewhere), tmp_path / "card.json"
    code, output = longhaul("card", away, "--out", out)
    assert code == 2 and "made on node17, not here: describe that with --machine" in output
    assert longhaul("card", away, "--out", out, "--machine", "8 x H100")[0] == 0
    assert json.loads(out.read_text())["machine"] == "8 x H100"
    shutil.rmtree(away)
    code, output = longhaul("card", altered(on_a_gpu), "--out", out)
    assert code == 2 and "say how many of which with --machine" in output


def test_a_change_of_the_recipe_or_of_the_card_is_found(runs: Path) -> None:
    card = make_card([RunDirectory(runs / "a")], None, "here", {})
    older = {**card, "resolved": {**card["resolved"], "batch": {"size": 32, "micro": 32}}}
    assert changes(older) == ["batch.size: 32 -> 64"] and not is_whole(older)
    assert not is_whole({**card, "top1": {"mean": 1.0}})
    # A key that the schema gained since then, with a default under which nothing changes:
    resolved = {key: value for key, value in card["resolved"].items() if key != "gradients"}
    assert changes({**card, "resolved": resolved}) == []


def test_the_table_goes_between_its_marks_and_nowhere_else(runs: Path, tmp_path: Path) -> None:
    cards, readme = tmp_path / "cards", tmp_path / "README.md"
    readme.write_text(f"before\n\n{BEGIN}\nold\n{END}\nafter\n")
    assert "no cards in" in longhaul("card", "--readme", readme, "--cards", cards)[1]
    assert longhaul("card", runs / "a", runs / "b", "--out", cards / "short.json", "--machine", "here")[0] == 0
    assert longhaul("card", "--readme", readme, "--cards", cards)[0] == 0
    text = readme.read_text()
    card = read_cards(cards)["short"]
    assert text.startswith(f"before\n\n{BEGIN}\n| recipe |") and text.endswith(f"{END}\nafter\n") and "old" not in text
    assert f"| {score_text(card)} | 2 |" in text and "cards/short.json" in text and "here, 1 worker |" in text
    assert longhaul("card", "--readme", readme, "--cards", cards)[0] == 0 and readme.read_text() == text
    readme.write_text("no marks\n")
    assert "has no place for the table" in longhaul("card", "--readme", readme, "--cards", cards)[1]


@pytest.mark.parametrize("arguments", [(), ("x",), ("--out", "x.json")])
def test_half_a_command_is_answered_with_the_whole(arguments: tuple[str, ...]) -> None:
    code, output = longhaul("card", *arguments)
    assert code == 2 and "--out FILE for a card, or --readme FILE" in output


# --- which recipe it was -----------------------------------------------------------------------------------------

OVERRIDES = [
    "duration=7ep", "schedule={kind: cosine, lr: 0.5, warmup: 2ep}", "ema={decay: 0.99}", "model.drop_path=0.1",
    "mixing.mixup=1e-3", "input.crop.padding=2", "loss={kind: binary_cross_entropy}", "evaluate.scales=[8, 9]",
    "order.repeats=2", "gradients.clip_norm=1", "data=null", "input.erasing={p: 0.1}",
]  # fmt: skip


@settings(max_examples=20)
@given(st.sets(st.sampled_from(OVERRIDES)))
def test_overrides_between_two_recipes_lead_from_one_to_the_other(chosen: set[str]) -> None:
    base, changed = load_recipe("digits"), load_recipe("digits", sorted(chosen))
    found = overrides_between(base, changed)
    assert load_recipe("digits", found) == changed
    assert len(found) <= 2 * len(chosen)


@pytest.mark.parametrize("name", ["digits", "cifar10-plain56", "resnet50", "lars-resnet50-8192", "rsb-a3-resnet50"])
def test_the_nearest_recipe_of_a_recipe_is_itself_also_with_a_few_changes(name: str) -> None:
    assert nearest_recipe(load_recipe(name, ["seed=5", "precision=bf16", "checkpoint.every=7it"])) == name


def test_between_two_recipes_the_user_decides() -> None:
    """ResNet-34 of options A and B differ in the option, and this is C's."""
    with pytest.raises(LonghaulError, match=r"as near to the recipes .*: say which with --recipe"):
        nearest_recipe(load_recipe("paper-resnet34-a", ["model.name=resnet152", "model.shortcut=C"]))
