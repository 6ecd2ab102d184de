"""Views of evaluation: torchvision's crops of one resized image, whole images at several scales, averaged exactly."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn
from torchvision.io import decode_jpeg
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision
from typer.testing import CliRunner

from configs import LonghaulError, load_recipe
from configs.schema import Evaluate, Input, PadCrop, ResizedCrop
from data_pipeline.ingest import prepare
from data_pipeline.loader import evaluation_batches
from data_pipeline.sources import open_source
from data_pipeline.split import Split
from data_pipeline.views import VIEWS, batches_of, central_view, choose_views, five_crops
from launch.cli import app
from tests.workers import final_state, make_job, scores, train
from trainer.evaluate import Member, evaluate, evaluate_ensemble
from trainer.group import Rendezvous, join
from trainer.models import build_model
from trainer.predict import Predictor
from trainer.score import How, Target, score_checkpoints
from trainer.weights import choose_checkpoint, load_network

CPU = torch.device("cpu")
SCALES = (32, 40, 56)
CONFIG = Input(size=32, mean=(0, 0, 0), std=(1, 1, 1), crop=ResizedCrop(), eval_resize=40)
EVALUATE = Evaluate(batch=4, scales=SCALES)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """45 parts of two photographs, of five sizes, a third of them held out."""
    root = tmp_path_factory.mktemp("photographs")
    images = [Image.fromarray(image) for image in load_sample_images().images]
    for index in range(45):
        width, height = [(100, 75), (75, 100), (90, 90), (64, 48), (101, 75)][index % 5]
        x, y = 11 * index % 500, 7 * index % 300
        path = root / "source" / ("val" if index % 3 == 0 else "train") / "abc"[index % 7 % 3] / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        images[index % 2].crop((x, y, x + width, y + height)).save(path, quality=95)
    prepare(open_source(str(root / "source"), 0.0), root / "data")
    return root / "data"


def seen(split: Split, name: str, batch: int = 4) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(sample id, its views, uint8 [3, height, width], mirror images left out)."""
    views = choose_views(name, CONFIG, EVALUATE)
    batches = batches_of([views], split.sizes, batch)
    for found in evaluation_batches(split, CONFIG, batches, CPU, 1, views):
        for row, sample in enumerate(found.records[:, 0].tolist()):
            yield sample, [(view[row] * 255).round().byte().numpy() for view in (found.images, *found.others)]


def decoded(split: Split, sample: int) -> torch.Tensor:
    return decode_jpeg(torch.from_numpy(split.images(np.array([sample]))[0].copy()))


# --- which pixels ------------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(0, 20))
def test_the_ten_crops_are_torchvisions(height: int, width: int, size: int, more: int) -> None:
    config = CONFIG.model_copy(update={"size": size, "eval_resize": size + more})
    (target,), *anchors = five_crops(config, np.array([[height, width]], np.int32))
    places = torch.arange(target[0] * target[1]).view(1, *target.tolist())
    ours = [places[:, y : y + size, x : x + size] for ((y, x),) in anchors]
    assert vision.resize(torch.zeros(1, height, width), [size + more]).shape[1:] == tuple(target)
    theirs = v2.TenCrop(size)(places)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs[:5], strict=True))
    # torchvision mirrors the image and then crops, so that left and right change places. Where the centre falls between
    # two pixels its second central crop is one pixel off the mirror image of the first; ours is the mirror image.
    mirrored = [ours[place].flip(2) for place in (1, 0, 3, 2, 4)]
    count = 4 if (target[1] - size) % 2 else 5
    assert all(torch.equal(a, b) for a, b in zip(mirrored[:count], theirs[5 : 5 + count], strict=True))


def test_crops_are_cut_from_one_resized_image(data: Path) -> None:
    split = Split(data, "val")
    whole = dict(seen(split, "multi-scale"))
    for sample, crops in seen(split, "ten-crop"):
        image = torch.from_numpy(whole[sample][SCALES.index(40)])
        expected = v2.FiveCrop(32)(image)
        assert all(np.array_equal(a, b) for a, b in zip(crops, expected, strict=True))
    for name in ("central", "flip"):
        assert all(np.array_equal(a[0], dict(seen(split, "ten-crop"))[sample][4]) for sample, a in seen(split, name)), (
            "the fifth is the central crop"
        )


def test_whole_images_are_torchvisions_resize_at_every_scale(data: Path) -> None:
    split = Split(data, "val")
    found = dict(seen(split, "multi-scale"))
    assert sorted(found) == list(range(len(split)))
    for sample, views in found.items():
        for scale, view in zip(SCALES, views, strict=True):
            expected = vision.resize(decoded(split, sample), [scale], antialias=True).numpy()
            assert view.shape == expected.shape
            assert np.abs(view.astype(int) - expected).mean() < 1


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=60), st.integers(1, 8))
def test_batches_hold_every_image_once_and_only_equal_shapes(pairs: list[tuple[int, int]], largest: int) -> None:
    sizes, ids = np.array(pairs, np.int32), np.arange(len(pairs))
    for name in VIEWS:
        views = choose_views(name, CONFIG, EVALUATE)
        batches = batches_of([views], sizes, largest)
        assert np.array_equal(np.sort(np.concatenate(batches)), ids)
        assert max(map(len, batches)) <= largest
        if name != "multi-scale":
            assert all(len(batch) == largest for batch in batches[:-1])
            continue
        shapes = [{tuple(np.concatenate([b[i] for b in views.boxes(sizes)])) for i in batch} for batch in batches]
        assert all(len(shape) == 1 for shape in shapes)
        full = sum(len(batch) == largest for batch in batches)
        assert len(batches) - full <= len(set().union(*shapes)), "one short batch of each shape at most"


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=60),
    st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=2), min_size=1, max_size=3),
    st.integers(1, 8),
)
def test_batches_hold_only_equal_shapes_for_all_who_see_them(
    pairs: list[tuple[int, int]], scales: list[list[int]], largest: int
) -> None:
    sizes = np.array(pairs, np.int32)
    seen = [choose_views("multi-scale", CONFIG, Evaluate(scales=tuple(own))) for own in scales]
    batches = batches_of([*seen, central_view(CONFIG)], sizes, largest)
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(len(pairs)))
    assert max(map(len, batches)) <= largest
    for batch in batches:
        assert all((box == box[0]).all() for views in seen for box in views.boxes(sizes[batch]))


@pytest.mark.parametrize(
    ("name", "told"),
    [("tencrop", "it is central, flip, ten-crop or multi-scale"), ("ten-crop", "give --views central")],
)
def test_views_that_are_not_there_are_refused(name: str, told: str) -> None:
    plain = Input(size=32, mean=(0, 0, 0), std=(1, 1, 1), crop=PadCrop())
    with pytest.raises(LonghaulError, match=told):
        choose_views(name, plain, EVALUATE)


# --- the score ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """A small network trained for a few steps on the photographs."""
    job = make_job(
        tmp_path_factory.mktemp("run"), data, "duration=20it", "batch={size: 8, micro: 4}", "input.size=32",
        "input.crop={kind: resized_crop}", "input.eval_resize=40", "precision=fp32", "checkpoint.every=20it",
        "evaluate={every: 20it, batch: 4, scales: [32, 40, 56]}", "schedule={kind: constant, lr: 0.01}",
    )  # fmt: skip
    train(job, 1)
    return job.run


def reference(run, split: Split, name: str) -> tuple[int, float]:  # type: ignore[no-untyped-def]
    """Correct images and the summed loss, by a direct computation: one view of one image at a time."""
    recipe = run.recipe()
    network: nn.Module = build_model(recipe.model, 3, recipe.seed).eval()
    network.load_state_dict({k[6:]: v for k, v in final_state(run).items() if k.startswith("model.")})
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (recipe.input.mean, recipe.input.std))
    correct, loss = 0, 0.0
    for sample, views in seen(split, name):
        images = [(torch.from_numpy(view) / 255 - mean) / std for view in views]
        images += [image.flip(2) for image in images] if name != "central" else []
        with torch.no_grad():
            scores = torch.stack([network(image[None])[0].double().softmax(0) for image in images]).mean(0)
        label = int(split.labels[sample])
        correct += int(scores.argmax() == label)
        loss -= float(scores[label].log())
    return correct, loss


@pytest.mark.parametrize("name", VIEWS)
def test_the_score_is_that_of_the_averaged_probabilities(run, data: Path, name: str) -> None:  # type: ignore[no-untyped-def]
    split = Split(data, "val")
    _, score = score_checkpoints([Target(run)], how=How("cpu", 1, name))
    correct, loss = reference(run, split, name)
    assert (score.num_images, score.num_top1) == (len(split), correct)
    assert score.loss_sum == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(("name", "world_size"), [("flip", 2), ("ten-crop", 3), ("multi-scale", 3)])
def test_counts_are_the_same_on_any_number_of_workers(run, name: str, world_size: int) -> None:  # type: ignore[no-untyped-def]
    _, alone = score_checkpoints([Target(run)], how=How("cpu", 1, name))
    found = scores(run, name, world_size)
    assert len(found) == world_size and len(set(found)) == 1
    assert found[0][:3] == (alone.num_images, alone.num_top1, alone.num_top5)
    assert found[0][3] == alone.loss_sum


def test_networks_of_other_views_are_shown_the_same_images_at_the_same_time(run, data: Path) -> None:  # type: ignore[no-untyped-def]
    """Each member's probabilities found by itself, in batches of its own, and averaged."""
    recipe = run.recipe()
    predict = Predictor(load_network(recipe, choose_checkpoint(run, None)), recipe, CPU)
    small = CONFIG.model_copy(update={"size": 24, "eval_resize": 28})
    ways = [("multi-scale", CONFIG, (32, 40)), ("ten-crop", small, ()), ("multi-scale", CONFIG, (24, 37))]
    seen = [choose_views(name, config, Evaluate(scales=scales or SCALES)) for name, config, scales in ways]
    probabilities = torch.zeros(15, 3, dtype=torch.float64)

    def observe(ids: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        probabilities[ids] += logits.double().softmax(1) / len(seen)

    with closing(Split(data, "val")) as split, join(Rendezvous.from_environment(), CPU, 60) as group:
        alone = [evaluate(predict, split, recipe, group, 1, views, observe) for views in seen]
        *each, together = evaluate_ensemble([Member(predict, views) for views in seen], split, 4, group, 1)
        labels = torch.from_numpy(split.labels.astype(np.int64))
    for one, expected in zip(each, alone, strict=True):
        assert (one.num_top1, one.num_top5) == (expected.num_top1, expected.num_top5)
        assert one.loss_sum == pytest.approx(expected.loss_sum, rel=1e-5)
    assert together.num_top1 == int((probabilities.argmax(1) == labels).sum())
    assert together.loss_sum == pytest.approx(-float(probabilities[range(15), labels].log().sum()), rel=1e-5)


def test_the_command_takes_the_views_and_names_those_there_are(run) -> None:  # type: ignore[no-untyped-def]
    arguments = ["eval", str(run.path), "--device", "cpu", "--threads", "1", "--views"]
    shown = CliRunner().invoke(app, [*arguments, "flip"])
    assert shown.exit_code == 0 and '"num_images": 15' in shown.output
    refused = CliRunner().invoke(app, [*arguments, "many"])
    assert isinstance(refused.exception, LonghaulError) and "central, flip, ten-crop" in str(refused.exception)


def test_scales_must_be_given_as_positive_numbers() -> None:
    with pytest.raises(LonghaulError, match=r"evaluate\.scales"):
        load_recipe("digits", ["evaluate.scales=[]"])
