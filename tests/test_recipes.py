"""Recipes load, round-trip, extend and override; and every mistake in one is answered by one sentence that mends it."""

import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command
from typer.testing import CliRunner

from configs import Duration, LonghaulError, apply_overrides, dump, list_recipes, load_recipe, parse_recipe, read_header
from configs.header import parse_header
from configs.load import RECIPE_DIRECTORY, lineage, resolve
from configs.optimisation import Cosine, MultiStep, OneCycle, Sgd
from configs.schema import PadCrop, ScaleCrop
from data_pipeline.views import VIEWS
from launch.cli import app

SCHEDULES = "constant, multistep, cosine, polynomial, one_cycle or plateau"
MINIMAL = """
duration: 2ep
model: {name: resnet18}
batch: {size: 8, micro: 4}
input: {size: 32, mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2], crop: {kind: pad_crop}}
schedule: {kind: constant, lr: 0.1}
"""


def write(directory: Path, text: str | bytes, name: str = "mine.yaml") -> str:
    """A recipe file in `directory`; its path as a user would type it."""
    path = directory / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def complaint(name: str, *overrides: str) -> str:
    """The message with which loading fails; it must be one sentence on one line."""
    with pytest.raises(LonghaulError) as caught:
        load_recipe(name, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".") and not message.endswith("..")
    return message


# --- the recipes that come along ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_recipes())
def test_a_built_in_recipe_loads_and_its_dump_reads_back_equal(name: str) -> None:
    recipe = load_recipe(name)
    text = dump(recipe)
    again = parse_recipe(yaml.safe_load(text), "the dump")
    assert again == recipe
    assert dump(again) == text


@pytest.mark.parametrize("name", list_recipes())
def test_a_dump_writes_every_default_out(name: str) -> None:
    values = yaml.safe_load(dump(load_recipe(name)))
    assert {"seed", "precision", "engine", "loss", "log", "checkpoint"} <= set(values)
    assert "extends" not in values
    assert {"every", "keep_last", "keep_best", "keep_every", "memory"} <= set(values["checkpoint"])


@pytest.mark.parametrize("name", list_recipes())
def test_a_built_in_recipe_opens_with_its_command_its_source_and_what_to_expect(name: str) -> None:
    own = parse_header((RECIPE_DIRECTORY / f"{name}.yaml").read_text())
    assert own["Source"] and own["Expected"] and own["Time"]
    header = read_header(name)
    assert header["Family"] and header.short("Expected") and len(header.short("Expected")) < 60
    measured = "measured" in header["Expected"] or "Not yet run in full here" in header["Expected"]
    assert measured, "say whether it was run here"
    assert re.search("measured|published|computed", header["Time"])


@pytest.mark.parametrize("name", list_recipes())
def test_the_commands_of_a_recipe_are_commands(name: str) -> None:
    """They go through the real parser, which refuses unknown options; what they name are runs and recipes."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    typed = [shlex.split(command)[1:] for command in read_header(name).commands]
    parsed = {words[0]: commands[words[0]].make_context(words[0], list(words[1:])).params for words in typed}
    assert parsed["train"]["recipe"] == name
    recipe = load_recipe(name, parsed["train"]["overrides"] or ())
    assert parsed["train"]["workers"] <= recipe.batch.num_micro
    if recipe.data is None:
        assert parsed["train"]["data"] == str(parsed["prepare"]["out"])
    if "eval" in parsed:
        (words,) = [words for words in typed if words[0] == "eval"]
        assert words[1] == parsed["train"]["name"] and parsed["eval"]["views"] in VIEWS


def leaves(values: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The values of all keys below one another, a kind's with its section."""
    found: dict[tuple[str, ...], Any] = {}
    for key, value in values.items():
        found |= leaves(value, (*prefix, key)) if isinstance(value, Mapping) else {(*prefix, key): value}
    return found


def own_values(path: Path) -> dict[str, Any]:
    values = yaml.safe_load(path.read_text())
    values.pop("extends", None)
    return values


@pytest.mark.parametrize("path", sorted(RECIPE_DIRECTORY.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_repeats_nothing_of_what_it_extends(path: Path) -> None:
    *bases, _ = lineage(path)
    inherited, own = leaves(resolve(bases[-1])) if bases else {}, leaves(own_values(path))

    def is_of_another_kind(key: tuple[str, ...]) -> bool:
        """Of a section whose kind changes nothing is inherited."""
        kind = (*key[:-1], "kind")
        return kind in own and own[kind] != inherited.get(kind)

    repeated = {key: value for key, value in own.items() if key in inherited and inherited[key] == value}
    assert not {key: value for key, value in repeated.items() if not is_of_another_kind(key)}


def test_siblings_have_no_section_in_common_that_their_base_could_hold() -> None:
    """Every file of a family that says the same says it in the base."""
    families: dict[Path, list[Path]] = {}
    for path in RECIPE_DIRECTORY.glob("*.yaml"):
        *bases, _ = lineage(path)
        if bases and bases[-1].stem not in ("_imagenet", "_cifar10"):  # of which whole families are made
            families.setdefault(bases[-1], []).append(path)
    for base, paths in families.items():
        if len(paths) > 1:
            common = set.intersection(*[set(map(str, leaves(own_values(path)).items())) for path in paths])
            assert not common, f"{base.stem}: {common}"


def test_descriptions_and_families_tell_recipes_apart() -> None:
    described = [load_recipe(name).description for name in list_recipes()]
    assert len(set(described)) == len(described)
    assert len({read_header(name)["Family"] for name in list_recipes()}) < 12


def test_a_header_is_read_to_the_end_of_each_field_and_a_field_that_is_missing_is_the_bases(tmp_path: Path) -> None:
    write(
        tmp_path,
        "# Some words.\n#\n# Family:   mine\n# Departs:  here\n#           and there.\n" + MINIMAL,
        "base.yaml",
    )
    text = "# longhaul train own --name x\n#\n# Source:   a paper: its table\n# Departs:  nowhere.\n\nextends: base\n"
    header = read_header(write(tmp_path, text))
    assert header.commands == ("longhaul train own --name x",)
    assert header.fields == {"Family": "mine", "Source": "a paper: its table", "Departs": "nowhere."}
    assert (header.short("Source"), header.short("Departs"), header["Time"]) == ("a paper", "nowhere", "")
    assert read_header(str(tmp_path / "base.yaml"))["Departs"] == "here and there."


def test_the_list_has_a_line_for_every_recipe_and_one_recipe_is_shown_as_a_recipe_file(tmp_path: Path) -> None:
    listed = CliRunner().invoke(app, ["recipes"]).output
    for name in list_recipes():
        (line,) = [line for line in listed.splitlines() if line.startswith(f"{name} ")]
        recipe, header = load_recipe(name), read_header(name)
        told = (
            str(recipe.duration),
            recipe.model.name,
            recipe.description,
            header.short("Expected"),
            header.short("Source"),
        )
        assert all(part in line for part in told)
    shown = CliRunner().invoke(app, ["recipes", "rsb-a1-resnet50"]).output
    again = write(tmp_path, shown)
    assert load_recipe(again) == load_recipe("rsb-a1-resnet50")
    assert read_header(again) == read_header("rsb-a1-resnet50")
    wrong = CliRunner().invoke(app, ["recipes", "resnet5"])
    assert isinstance(wrong.exception, LonghaulError) and "did you mean 'resnet50'" in str(wrong.exception)


def test_bases_are_not_listed_as_recipes() -> None:
    assert {"digits", "resnet50", "paper-resnet50", "cifar10-resnet20"} <= set(list_recipes())
    assert not [name for name in list_recipes() if name.startswith("_")]


IMAGES = 1_281_167


def test_the_averaging_of_torchvision_v2_is_by_its_formula() -> None:
    """references/classification/train.py: alpha = (1 - 0.99998) world_size batch_size steps / epochs."""
    recipe = load_recipe("torchvision-v2-resnet50")
    assert recipe.ema is not None
    updates = recipe.ema.every.steps(recipe.batch.size, IMAGES)
    epochs = recipe.duration.value
    assert recipe.ema.decay == pytest.approx(1 - (1 - 0.99998) * recipe.batch.size * updates / epochs, abs=1e-8)


@pytest.mark.parametrize("name", [name for name in list_recipes() if load_recipe(name).order.repeats > 1])
def test_repeated_samples_have_micro_batches_enough_to_be_apart(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.order.repeats <= recipe.batch.num_micro


def test_the_paper_recipe_is_the_papers_protocol() -> None:
    recipe = load_recipe("paper-resnet50")
    assert recipe.duration.steps(recipe.batch.size, 1_281_167) == 600_000
    assert (recipe.batch.size, recipe.batch.micro, recipe.batch.num_micro) == (256, 32, 8)
    assert recipe.model.stride == "v1"
    assert isinstance(recipe.input.crop, ScaleCrop) and recipe.input.crop.shorter == (256, 480)
    assert recipe.optimizer == Sgd(style="caffe", decay_norm_and_bias=True, weight_decay=1e-4)
    # From the base that it extends:
    assert recipe.input.mean == (0.485, 0.456, 0.406) and recipe.input.eval_resize == 256


# --- extends -----------------------------------------------------------------------------------------------------


def test_extends_merges_section_by_section_and_the_nearer_file_wins(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "root.yaml")
    write(tmp_path, "extends: root\nseed: 7\nbatch: {micro: 2}\n", "middle.yaml")
    recipe = load_recipe(write(tmp_path, "extends: middle\nseed: 8\nbatch: {size: 16}\n"))
    assert (recipe.seed, recipe.batch.size, recipe.batch.micro) == (8, 16, 2)
    assert recipe.model.name == "resnet18"


@pytest.mark.parametrize("spelling", ["root", "root.yaml", "./root", "sub/../root.yaml"])
def test_extends_is_looked_up_beside_the_file_not_in_the_working_directory(tmp_path: Path, spelling: str) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, MINIMAL, "root.yaml")
    assert load_recipe(write(tmp_path, f"extends: {spelling}\nseed: 3\n")).seed == 3


def test_a_file_of_ones_own_extends_a_built_in_recipe_by_name(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "extends: resnet50\nschedule: {lr: 0.5}\n"))
    assert isinstance(recipe.schedule, Cosine)
    assert (recipe.schedule.lr, str(recipe.schedule.warmup)) == (0.5, "8ep")


def test_a_section_of_another_kind_replaces_the_inherited_one_whole(tmp_path: Path) -> None:
    text = "extends: digits\nschedule: {kind: multistep, lr: 1, milestones: [1ep, 2ep]}\n"
    recipe = load_recipe(write(tmp_path, text))
    assert isinstance(recipe.schedule, MultiStep)
    assert str(recipe.schedule.warmup) == "0it"  # not the one-cycle's 6ep


@pytest.mark.parametrize(
    "files",
    [
        {"mine": "mine"},
        {"mine": "a", "a": "b", "b": "mine"},
        {"mine": "a", "a": "a"},
        {"mine": "sub/../a", "a": "sub/../mine"},
    ],
)
def test_a_cycle_of_extends_is_named(tmp_path: Path, files: dict[str, str]) -> None:
    (tmp_path / "sub").mkdir()
    for name, base in files.items():
        write(tmp_path, f"extends: {base}\n", f"{name}.yaml")
    message = complaint(str(tmp_path / "mine.yaml"))
    assert "extends itself" in message and "mine.yaml" in message


# --- overrides ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("seed=5", lambda r: r.seed == 5),
        ("schedule.lr=0.25", lambda r: r.schedule.lr == 0.25),
        ("schedule.lr=1e-3", lambda r: r.schedule.lr == 1e-3),  # YAML 1.1 reads this as text
        ("input.flip=true", lambda r: r.input.flip is True),
        ("input.mean=[0.1, 0.2, 0.3]", lambda r: r.input.mean == (0.1, 0.2, 0.3)),
        ("input.crop.padding=2", lambda r: r.input.crop == PadCrop(padding=2)),
        ("duration=1.2Msamples", lambda r: r.duration == Duration.parse("1.2Msamples")),
        ("data=null", lambda r: r.data is None),
        ("description=a=b", lambda r: r.description == "a=b"),
        ("description=''", lambda r: r.description == ""),
        ("model.num_classes=10", lambda r: r.model.num_classes == 10),
        ("loss.label_smoothing=0.1", lambda r: r.loss.label_smoothing == 0.1),  # a section the file does not have
        ("schedule={kind: one_cycle, lr: 3, warmup: 1ep}", lambda r: r.schedule.lr == 3),
    ],
)
def test_an_override_sets_its_key(override: str, read) -> None:  # type: ignore[no-untyped-def]
    assert read(load_recipe("digits", [override]))


def test_the_last_of_two_overrides_wins() -> None:
    assert load_recipe("digits", ["seed=1", "seed=2"]).seed == 2


def test_overrides_leave_what_they_were_given_as_it_was() -> None:
    values = {"schedule": {"lr": 1, "kind": "constant"}}
    assert apply_overrides(values, ["schedule.lr=2"]) == {"schedule": {"lr": 2, "kind": "constant"}}
    assert values == {"schedule": {"lr": 1, "kind": "constant"}}


@pytest.mark.parametrize("override", ["seed", "=3", "", "seed:3"])
def test_what_is_not_an_override_is_answered_with_the_form(override: str) -> None:
    assert f"'{override}' is not an override: write it as key=value" in complaint("digits", override)


@pytest.mark.parametrize("override", ["description=[", "description=2020-13-45", "description=a: b: c"])
def test_an_override_whose_value_is_not_yaml_is_named(override: str) -> None:
    assert f"'{override}' is not valid YAML" in complaint("digits", override)


def test_an_override_below_a_plain_value_names_that_value() -> None:
    assert "'batch.size.x=1': batch.size is a value" in complaint("digits", "batch.size.x=1")


# --- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key", "mend"),
    [
        ("sede=1", "'sede'", "did you mean 'seed'"),
        ("batch.mirco=1", "'batch.mirco'", "did you mean 'micro'"),
        ("schedule.warmpu=1ep", "'schedule.warmpu'", "did you mean 'warmup'"),
        ("schedule.milestone=[1ep]", "'schedule.milestone'", ""),  # one_cycle has none: nothing is near
        ("input.crop.paddin=1", "'input.crop.paddin'", "did you mean 'padding'"),
        ("input.crop={kind: resized_crop, are: [0.1, 1]}", "'input.crop.are'", "did you mean 'area'"),
        ("input.zzzzzz=1", "'input.zzzzzz'", ""),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(override: str, key: str, mend: str) -> None:
    message = complaint("digits", override)
    assert "digits.yaml" in message and f"unknown key {key}" in message
    assert mend in message if mend else "did you mean" not in message


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("batch.micro=33", "batch.micro=33 does not divide batch.size=64: try batch.micro=32"),
        ("batch.micro=100", "try batch.micro=64"),
        ("input.eval_resize=7", "input.eval_resize=7 is smaller than input.size=8"),
        ("duration=90", "duration: '90' is not a duration: write it as 90ep, 600000it or 1.2Msamples"),
        ("checkpoint.every=-1ep", "checkpoint.every: '-1ep' is not an interval: write it as"),
        ("checkpoint.every=[1ep]", "checkpoint.every: "),
        ("checkpoint.every=0ep", "checkpoint.every: '0ep' must be more than zero"),
        ("evaluate.every=0.0it", "evaluate.every: '0.0it' must be more than zero"),
        ("log.every=0samples", "log.every: '0samples' must be more than zero"),
        ("duration=0it", "duration: '0it' must be more than zero"),
        ("schedule.warmup=6", "schedule.warmup: '6' is not a duration"),
        ("schedule.kind=cosin", f"schedule.kind: there is no 'cosin': give {SCHEDULES}"),
        ("schedule={lr: 1}", f"'schedule.kind' is missing: give {SCHEDULES}"),
        ("schedule=5", "schedule: "),
        ("input.crop={padding: 3}", "'input.crop.kind' is missing: give resized_crop, scale_crop or pad_crop"),
        ("order.kind=windows", "order.kind: there is no 'windows': give global or windowed"),
        ("order={kind: windowed, shards: 0}", "order.shards: Input should be greater than 0"),
        ("order={kind: windowed, shard: 2}", "unknown key 'order.shard' (did you mean 'shards'?)"),
        (
            "optimizer.kind=lamb",
            "unknown key 'optimizer.momentum' for kind lamb; optimizer={kind: lamb, ...} replaces the section whole",
        ),
        ("input.crop.kind=centre", "input.crop.kind: there is no 'centre': give resized_crop"),
        ("input.crop={kind: scale_crop, shorter: [480, 256]}", "input.crop.shorter: give the smaller bound first"),
        ("input.crop={kind: resized_crop, area: [1, 0.08]}", "input.crop.area: give the smaller bound first"),
        ("input.mean=[0.1, 0.2]", "input.mean.2"),
        ("input.mean=[0.1, 0.2, .nan]", "input.mean.2: "),
        ("input.std=[0, 1, 1]", "input.std.0: Input should be greater than 0"),
        ("schedule.lr=.inf", "schedule.lr: "),
        ("schedule.lr=.nan", "schedule.lr: "),
        ("schedule.lr=-1", "schedule.lr: "),
        ("schedule.lr=fast", "schedule.lr: "),
        ("batch.size=0", "batch.size: "),
        ("batch.size=6.5", "batch.size: "),
        ("seed=-1", "seed: "),
        ("seed=9223372036854775808", "seed: "),
        ("optimizer.kind=adam", "optimizer.kind: there is no 'adam': give sgd, lars or lamb"),
        ("precision=fp8", "precision: Input should be 'auto', 'bf16', 'fp16' or 'fp32'"),
        ("loss.label_smoothing=1", "loss.label_smoothing: "),
    ],
)
def test_a_bad_value_names_the_file_the_key_and_the_mend(override: str, told: str) -> None:
    message = complaint("digits", override)
    assert "digits.yaml" in message and told in message


@pytest.mark.parametrize("key", ["duration", "model", "batch", "input", "schedule"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    values = yaml.safe_load(MINIMAL)
    del values[key]
    message = complaint(write(tmp_path, yaml.safe_dump(values)))
    assert "mine.yaml" in message and f"the key '{key}' is missing" in message


def test_a_missing_key_of_a_section_is_named_without_the_sections_kind(tmp_path: Path) -> None:
    text = MINIMAL.replace("{kind: constant, lr: 0.1}", "{kind: multistep, lr: 0.1}")
    assert "the key 'schedule.milestones' is missing" in complaint(write(tmp_path, text))


def test_every_problem_of_a_file_is_told_at_once() -> None:
    message = complaint("digits", "sede=1", "batch.micro=33", "duration=90")
    assert all(part in message for part in ("sede", "batch.micro=33", "'90'"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [", "is not valid YAML"),
        ("a: 1\n\tb: 2", "is not valid YAML"),
        ("[1]: 2", "is not valid YAML"),
        ("description: 2020-13-45", "is not valid YAML"),
        ("x: !!python/object:os.system {}", "is not valid YAML"),
        (b"\xff\xfe\x00a", "is not valid YAML"),
        ("- a\n- b", "must hold keys and values, not a list"),
        ("just text", "must hold keys and values, not a str"),
        ("", "the key 'duration' is missing"),
        (MINIMAL + "1: 2\n", "1: Keys should be strings"),
        ("extends: 5", "extends must be the name of one recipe, not 5"),
        ("extends: [digits, resnet50]", "extends must be the name of one recipe, not ['digits', 'resnet50']"),
        ("extends: digit", "extends: There is no recipe 'digit' (did you mean 'digits'?)"),
        ("extends: nowhere/base.yaml", "extends: There is no recipe file nowhere/base.yaml"),
    ],
)
def test_a_file_that_is_no_recipe_is_named_with_the_reason(tmp_path: Path, text: str | bytes, told: str) -> None:
    message = complaint(write(tmp_path, text))
    assert "mine.yaml" in message and told in message


def test_an_unknown_name_is_answered_with_the_nearest_and_where_all_are() -> None:
    message = complaint("resnet5")
    assert "There is no recipe 'resnet5' (did you mean 'resnet50'?); `longhaul recipes` lists all." in message
    assert "did you mean" not in complaint("qqqq")


@pytest.mark.parametrize("name", ["missing.yaml", "some/where", "missing.yml", "/"])
def test_a_missing_file_is_named(name: str) -> None:
    assert f"There is no recipe file {name}" in complaint(name)


def test_a_recipe_cannot_be_changed_after_it_was_loaded() -> None:
    recipe = load_recipe("digits")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]


# --- durations ---------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(0, 10**7).map(str), st.decimals(0, 10**4, places=3).map(str))
UNITS = st.sampled_from(["ep", "it", "samples"])
MULTIPLES = {"": 1, "k": 1_000, "M": 1_000_000}


@given(NUMBERS, st.sampled_from(list(MULTIPLES)), UNITS, st.sampled_from(["", " ", "\t"]))
def test_a_duration_reads_back_from_its_text(number: str, multiple: str, unit: str, space: str) -> None:
    length = Duration.parse(f"{space}{number}{space}{multiple}{space}{unit}{space}")
    assert str(length) == f"{number}{multiple}{unit}"
    assert Duration.parse(str(length)) == length
    assert length.unit == unit and math.isclose(length.value, float(number) * MULTIPLES[multiple])


@pytest.mark.parametrize(
    "text", ["", "ep", "90", "90 epochs", "-3ep", "1e3it", "1.ep", ".5ep", "90EP", "1Kit", "٣ep", "1.5.5ep", "nanep"]
)
def test_what_is_not_a_duration_is_refused_with_the_accepted_forms(text: str) -> None:
    with pytest.raises(ValueError, match=r"write it as 90ep, 600000it or 1\.2Msamples"):
        Duration.parse(text)


@given(st.integers(0, 10**7), st.integers(1, 10**5), st.integers(1, 2 * 10**7))
def test_iterations_are_steps_whatever_the_batch_and_the_data(steps: int, batch: int, samples: int) -> None:
    assert Duration.parse(f"{steps}it").steps(batch, samples) == steps


@given(st.integers(1, 2_000), st.integers(1, 4_096), st.integers(1, 2_000_000))
def test_epochs_take_just_as_many_steps_as_reach_them(epochs: int, batch: int, samples: int) -> None:
    steps = Duration.parse(f"{epochs}ep").steps(batch, samples)
    assert (steps - 1) * batch < epochs * samples <= steps * batch


@given(st.integers(1, 10**9), st.integers(1, 4_096), st.integers(1, 2_000_000))
def test_samples_take_just_as_many_steps_as_reach_them(count: int, batch: int, samples: int) -> None:
    steps = Duration.parse(f"{count}samples").steps(batch, samples)
    assert (steps - 1) * batch < count <= steps * batch


@given(st.integers(1, 1_000), st.integers(1, 10**4))
def test_a_tenth_of_an_epoch_is_not_a_step_too_long(tenths: int, tenth: int) -> None:
    # 0.1 and its like have no exact binary form.
    assert Duration.parse(f"{tenths / 10:.1f}ep").steps(tenth, 10 * tenth) == tenths


def test_the_warm_up_of_a_schedule_keeps_its_own_unit() -> None:
    schedule = load_recipe("cifar10-resnet20-short").schedule
    assert isinstance(schedule, OneCycle)
    assert schedule.warmup.steps(128, 50_000) == math.ceil(1.5 * 50_000 / 128)
