"""`longhaul analyse`: what is drawn and counted is what the events, the network and the images say."""

import copy
import csv
import dataclasses
import io
import json
import math
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.layers import BatchNormAct2d
from torch import nn
from typer.testing import CliRunner

from configs import LonghaulError, load_recipe
from launch.analyse import choose_parts, default_directory, name_runs
from launch.cli import app
from trainer.analysis.confusion import Confusion, classes_csv, confusion_csv, count_confusion, draw_confusion
from trainer.analysis.curves import Curves, Point, curves_csv, draw_curves, read_curves, smooth
from trainer.analysis.filters import draw_filters, first_filters
from trainer.analysis.responses import draw_responses, measure_responses, responses_csv
from trainer.rundir import RunDirectory
from trainer.score import How, Target, score_checkpoints
from trainer.trained import Images, Trained, load_trained, spread, use_exact_statistics
from trainer.weights import choose_checkpoint

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def trained(digits_run: RunDirectory) -> Trained:
    return load_trained(digits_run, choose_checkpoint(digits_run, None), "auto", torch.device("cpu"), 1)


def event(kind: str, step: int, **fields: object) -> dict:
    return {"event": kind, "time": 0.0, "step": step, "epoch": step / 10, **fields}


# A run that was killed after step 30 and went on from step 20.
RESUMED = [
    event("start", 0, attempt=1),
    event("step", 10, train_top1=0.25, loss=2.0),
    event("step", 20, train_top1=0.5, loss=1.5),
    event("evaluation", 20, top1=0.625, loss=1.25),
    event("step", 30, train_top1=0.125, loss=9.0),
    event("evaluation", 30, top1=0.0, loss=9.0),
    event("start", 20, attempt=2),
    event("resume", 20, attempt=2),
    event("step", 30, train_top1=0.75, loss=None),
    event("step", 40, train_top1=None, loss=None),
    event("evaluation", 40, top1=0.875, loss=0.5),
]


def make_run(path: Path, events: list[dict]) -> RunDirectory:
    run = RunDirectory(path)
    run.write_recipe(load_recipe("digits"))
    run.events_file.write_text("".join(json.dumps(e) + "\n" for e in events))
    return run


def test_the_table_of_curves_has_what_became_part_of_the_run(tmp_path: Path) -> None:
    table = curves_csv({"a": read_curves(make_run(tmp_path / "a", RESUMED))})
    assert list(csv.reader(io.StringIO(table))) == [
        ["run", "step", "epoch", "split", "error", "loss"],
        ["a", "10", "1.0", "training", "75.0", "2.0"],
        ["a", "20", "2.0", "training", "50.0", "1.5"],
        ["a", "30", "3.0", "training", "25.0", ""],
        ["a", "20", "2.0", "held_out", "37.5", "1.25"],
        ["a", "40", "4.0", "held_out", "12.5", "0.5"],
    ]


def test_a_run_that_logged_nothing_has_no_curves(tmp_path: Path) -> None:
    with pytest.raises(LonghaulError, match=r"events\.jsonl tells of no step yet"):
        read_curves(make_run(tmp_path / "a", RESUMED[:1]))


def test_smoothing_by_hand() -> None:
    points = [Point(10, 0, 80.0, None, 10), Point(15, 0, 20.0, None, 5), Point(30, 0, 40.0, None, 10)]
    # Stretches of 20 steps: the first two points are one (10 and 5 steps), the third another (steps 21 to 30).
    assert smooth(points, 20) == [(7.5, 60.0), (25.0, 40.0)]


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 100)), min_size=1, max_size=60), st.floats(0.5, 400))
def test_smoothing_keeps_the_mean_of_all_steps(logged: list[tuple[int, float]], length: float) -> None:
    points, step = [], 0
    for steps, error in logged:
        step += steps
        points.append(Point(step, 0.0, error, None, steps))
    whole = math.fsum(p.steps * p.error for p in points) / step
    ((middle, mean),) = smooth(points, 2.0 * step)
    assert middle == step / 2 and mean == pytest.approx(whole, abs=1e-9)
    assert all(
        min(p.error for p in points) - 1e-9 <= value <= max(p.error for p in points) + 1e-9
        for _, value in smooth(points, length)
    )


def test_the_picture_of_curves_ends_at_twice_the_highest_end() -> None:
    falling = [Point(step, 0.0, error, None) for step, error in ((10, 90.0), (20, 30.0), (30, 20.0))]
    better = [Point(step, 0.0, error, None) for step, error in ((10, 60.0), (30, 10.0))]
    root = ElementTree.fromstring(draw_curves({"one <&>": Curves([], falling), "two": Curves([], better)}))
    words = [element.text for element in root.iter(f"{SVG}text")]
    assert "one <&>, held out: 20.00 %" in words and "two, training: not measured yet" in words
    assert "40" in words and "50" not in words, "the axis goes to twice 20 %"
    (area,) = root.findall(f"{SVG}svg")
    x, y, width, height = map(float, area.attrib["viewBox"].split())
    one, _, two, _ = (
        [tuple(map(float, p.split(","))) for p in line.attrib["points"].split()]
        for line in area.findall(f"{SVG}polyline")
    )
    assert one[-1] == pytest.approx((x + width, y + height / 2), abs=0.1)
    assert two[-1] == pytest.approx((x + width, y + 0.75 * height), abs=0.1)
    assert one[0][1] < y, "90 % is above the area, which cuts it off"


def test_responses_are_those_of_hooks_on_the_norms(trained: Trained) -> None:
    with Images().open(trained.run, "val") as split:
        images = torch.cat([batch.images for batch in trained.batches(split, spread(len(split), 96))])
    measured = measure_responses(trained.network, images.split(40))
    outputs: dict[str, torch.Tensor] = {}
    for name, module in trained.network.named_modules():
        if isinstance(module, nn.BatchNorm2d) and "downsample" not in name:
            module.register_forward_hook(lambda _m, _i, out, name=name: outputs.update({name: out.double().clone()}))
    with torch.no_grad():
        trained.network(images)
    assert [r.layer.replace("conv", "bn") for r in measured] == list(outputs) and len(measured) == 19
    for response, output in zip(measured, outputs.values(), strict=True):
        assert response.count == output.numel()
        assert response.std == pytest.approx(float(output.std(correction=0)), rel=1e-5)
        assert response.mean == pytest.approx(float(output.mean()), rel=1e-4, abs=1e-6)
    again = measure_responses(trained.network, images.split(7))
    assert [r.std for r in again] == pytest.approx([r.std for r in measured], rel=1e-6)


class Branches(nn.Module):
    """A 3x3 convolution without a norm, a 1x1 one with, and one 3x3 with norm and activation in one module; the
    modules are not in the order in which they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = BatchNormAct2d(4)
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm_first = nn.BatchNorm2d(4)
        self.small, self.norm_small = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.bare = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm_small(self.small(self.norm_first(self.first(x))))
        return self.norm(self.last(self.bare(x).relu()))


def test_only_3x3_layers_with_a_norm_respond_and_before_the_activation() -> None:
    torch.manual_seed(0)
    network, images = Branches().eval(), torch.randn(6, 3, 5, 5)
    first, last = measure_responses(network, [images])
    assert (first.layer, last.layer) == ("first", "last"), "in the order of the forward pass"
    network.norm.act = nn.Identity()
    with torch.no_grad():
        before = network(images)
    assert (before < 0).any() and last.std == pytest.approx(float(before.std(correction=0)), rel=1e-5)


def test_a_network_without_such_layers_is_refused() -> None:
    with pytest.raises(LonghaulError, match="no 3x3 convolution that a batch norm follows"):
        measure_responses(nn.Conv2d(3, 4, 3), [torch.zeros(1, 3, 5, 5)])


def test_responses_are_ranked_and_drawn(trained: Trained) -> None:
    with Images().open(trained.run, "val") as split:
        batches = [batch.images for batch in trained.batches(split, spread(len(split), 8))]
    measured = measure_responses(trained.network, batches)
    rows = list(csv.DictReader(io.StringIO(responses_csv({"r": measured}))))
    by_rank = sorted(rows, key=lambda row: int(row["rank"]))
    stds = [float(row["std"]) for row in by_rank]
    assert stds == sorted(stds, reverse=True) and [row["name"] for row in rows] == [r.layer for r in measured]
    for picture in draw_responses({"r": measured, "s": measured[:3]}).values():
        lines = list(ElementTree.fromstring(picture).iter(f"{SVG}polyline"))
        assert [len(line.attrib["points"].split()) for line in lines] == [19, 3]


def test_confusion_has_every_image_once_and_the_top1_of_the_evaluation(trained: Trained) -> None:
    with Images().open(trained.run, "val") as split:
        confusion = count_confusion(trained, split)
        assert confusion.counts.sum(axis=1).tolist() == np.bincount(split.labels, minlength=10).tolist()
        evaluated = [e for e in trained.run.events() if e["event"] == "evaluation"][-1]
        assert (confusion.num_images, confusion.top1) == (evaluated["num_images"], evaluated["top1"])
        always = dataclasses.replace(trained, network=Always(3))
        assert count_confusion(always, split).counts[:, 3].tolist() == np.bincount(split.labels).tolist()


class Always(nn.Module):
    """A network of one opinion."""

    def __init__(self, label: int) -> None:
        super().__init__()
        self.logits = torch.eye(10)[label]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(images), 10)


COUNTS = Confusion(["cat", "dog", "<owl>", "none"], np.array([[5, 2, 1, 0], [4, 6, 0, 0], [0, 2, 1, 0], [0, 0, 0, 0]]))


def test_exact_statistics_are_used_where_the_recipe_evaluates_with_them(trained: Trained) -> None:
    recipe = trained.recipe
    before = copy.deepcopy(trained.network.state_dict())
    use_exact_statistics(trained, Images())
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.network.state_dict().items())
    evaluation = recipe.evaluate.model_copy(update={"exact_batch_norm": 3})
    exact = dataclasses.replace(trained, recipe=recipe.model_copy(update={"evaluate": evaluation}))
    use_exact_statistics(exact, Images())
    _, score = score_checkpoints([Target(trained.run)], how=How("cpu", 1, norm_batches=3))
    with Images().open(trained.run, "val") as split:
        assert count_confusion(exact, split).top1 == score.as_dict()["top1"]
    assert not torch.equal(before["bn1.running_mean"], exact.network.state_dict()["bn1.running_mean"])


def test_confusion_by_hand() -> None:
    assert COUNTS.num_images == 21 and COUNTS.top1 == 12 / 21
    assert COUNTS.pairs(3) == [(1, 0, 4), (0, 1, 2), (2, 1, 2)]
    assert COUNTS.named_pairs(99)[-1] == ("cat", "<owl>", 1, 1 / 8) and len(COUNTS.pairs(99)) == 4
    assert confusion_csv(COUNTS).splitlines()[:2] == ["class,cat,dog,<owl>,none", "cat,5,2,1,0"]
    assert classes_csv(COUNTS).splitlines()[1:] == [
        "cat,8,5,0.625",
        "dog,10,6,0.6",
        "<owl>,3,1,0.3333333333333333",
        "none,0,0,",
    ]
    root = ElementTree.fromstring(draw_confusion(COUNTS))
    titles = [title.text for title in root.iter(f"{SVG}title")]
    assert "dog taken for cat: 4 of 10" in titles and len(titles) == 7, "a cell for each count but 0"


def test_other_data_with_more_classes_is_refused(trained: Trained) -> None:
    fewer = dataclasses.replace(trained, num_classes=9)
    with Images().open(trained.run, "val") as split, pytest.raises(LonghaulError, match="has 10 classes, and the"):
        count_confusion(fewer, split)


def test_filters_are_drawn_each_in_its_own_range(trained: Trained) -> None:
    weights = first_filters(trained.network)
    assert weights.shape == (16, 3, 3, 3) and weights.dtype == np.float32
    weights[0] = np.arange(27, dtype=np.float32).reshape(3, 3, 3) - 5
    weights[1] = 0.25
    picture = np.asarray(draw_filters(weights))
    side = 54 + 4  # 18 pixels a weight, and a gap
    assert picture.shape == (2 * side + 4, 8 * side + 4, 3)
    assert picture[5, 5].tolist() == [0, round(255 * 9 / 26), round(255 * 18 / 26)]
    assert picture[4 + 53, 4 + 53].tolist() == [round(255 * 8 / 26), round(255 * 17 / 26), 255]
    assert not picture[4 : 4 + 54, 4 + side : 4 + side + 54].any(), "a filter of equal weights has no range"


@given(st.integers(0, 3000), st.integers(1, 600))
def test_images_are_spread_over_the_split(total: int, count: int) -> None:
    ids = spread(total, count)
    assert len(set(ids.tolist())) == min(total, count) and np.all(ids >= 0) and np.all(ids < total)
    if len(ids) > 1:
        assert np.diff(ids).max() - np.diff(ids).min() <= 1


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None:
        raise result.exception
    return re.sub(r"\s+", " ", result.output)


def test_the_page_shows_everything_and_needs_nothing(digits_run: RunDirectory, tmp_path: Path) -> None:
    twin = shutil.copytree(digits_run.path, tmp_path / "twin" / digits_run.name)
    out = tmp_path / "out"
    said = invoke("analyse", str(digits_run.path), str(twin), "--out", str(out), "--threads", "1", "--images", "20")
    assert "index.html" in said and "held-out images" in said
    page = (out / "index.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page) and "url(" not in page
    shown = set(re.findall(r"(?<=<h2>)[^<]+", page))
    assert shown == {"Error over iterations", "Responses of layers", "Classes", "Filters of the first layer"}
    assert page.count("<figure>") == 1 + 2 + 2 + 2
    names = {path.name for path in out.iterdir()}
    assert {"curves.svg", "curves.csv", "responses.csv", "confusion-twin-digits.csv"} <= names
    assert not [name for name in names if name.startswith(".")]
    for path in out.glob("*.svg"):
        assert path.read_text().strip() in page and ElementTree.parse(path)
    assert Image.open(out / "filters-twin-digits.png").size == (468, 120)
    assert np.load(out / "filters-twin-digits.npy").shape == (16, 3, 3, 3)
    assert len(list(csv.DictReader((out / "responses.csv").open()))) == 2 * 19


def test_a_run_without_a_checkpoint_has_curves_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "young", RESUMED)
    said = invoke("analyse", "young", "--runs", str(tmp_path))
    assert "network left out" in said and "no checkpoint" in said
    assert {path.name for path in (run.path / "analysis").iterdir()} == {"curves.svg", "curves.csv", "index.html"}
    with pytest.raises(LonghaulError, match="no checkpoint that verifies"):
        invoke("analyse", "young", "--runs", str(tmp_path), "--only", "filters")


def test_nothing_at_all_is_said_to_be_nothing(tmp_path: Path) -> None:
    make_run(tmp_path / "young", RESUMED[:1])
    with pytest.raises(LonghaulError, match="nothing to analyse yet of young"):
        invoke("analyse", "young", "--runs", str(tmp_path))


def test_what_is_typed_wrong_is_named() -> None:
    assert choose_parts(" curves, filters", ("curves", "filters")) == ("curves", "filters")
    with pytest.raises(LonghaulError, match="--only curve: it is one or more of curves, filters"):
        choose_parts("curve", ("curves", "filters"))


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    a, b, c = (RunDirectory(tmp_path / place) for place in ("x/one", "y/one", "y/two"))
    assert list(name_runs([a, b, c, c])) == ["x/one", "y/one", "two"]
    assert default_directory(name_runs([c]), tmp_path) == c.path / "analysis"
    assert default_directory(name_runs([a, c]), tmp_path) == tmp_path / "analysis-one-two"
