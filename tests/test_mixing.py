"""Random erasing, mixup and CutMix: drawn as published, applied as torchvision does, the same whoever computes them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, kstest
from torch import nn
from torchvision.transforms import RandomErasing, v2

from configs import LonghaulError, load_recipe
from configs.augmentation import Erasing, Mixing
from configs.schema import Input, PadCrop
from data_pipeline.erasing import erase, erased_boxes
from data_pipeline.ingest import prepare
from data_pipeline.mixing import Mix, draw_mix, mix
from data_pipeline.sources import open_source
from tests.workers import different, final_state, make_job, train
from trainer.verify import verify

SEEDS = st.integers(0, 2**63 - 1)
STEPS = st.integers(0, 2**40)


def boxes(config: Erasing, count: int, height: int = 224, width: int = 224, seed: int = 0) -> np.ndarray:
    return erased_boxes(config, seed, np.zeros(count, np.int64), np.arange(count), height, width)


def recipe(erasing: Erasing, **keys: object) -> Input:
    return Input(size=8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1), crop=PadCrop(), erasing=erasing, **keys)


# --- random erasing ----------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(SEEDS, st.integers(1, 300), st.integers(1, 300), st.floats(0.001, 1), st.floats(0.001, 1))
def test_an_erased_box_lies_within_its_image_and_leaves_some_of_it(
    seed: int, height: int, width: int, first: float, second: float
) -> None:
    config = Erasing(p=1.0, scale=(min(first, second), max(first, second)))
    found = boxes(config, 60, height, width, seed)
    assert (found >= 0).all()
    assert (found[:, :2] + found[:, 2:] <= [height, width]).all()
    assert ((found[:, 2] < height) & (found[:, 3] < width)).all()


@pytest.mark.parametrize(("height", "width"), [(224, 224), (96, 160)])
def test_erased_boxes_are_distributed_as_torchvisions(height: int, width: int) -> None:
    """Area, aspect and centre: the two samples of 4,000 pass a Kolmogorov-Smirnov test."""
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(4_000)], np.float64
    )
    ours = boxes(Erasing(p=1.0), 4_000, height, width).astype(np.float64)
    measures = {
        "area": lambda b: b[:, 2] * b[:, 3],
        "aspect": lambda b: b[:, 2] / np.maximum(b[:, 3], 1),
        "y": lambda b: b[:, 0] + b[:, 2] / 2,
        "x": lambda b: b[:, 1] + b[:, 3] / 2,
    }
    for name, measure in measures.items():
        assert kstest(measure(ours), measure(theirs)).pvalue > 1e-4, name


def test_a_share_p_of_samples_is_erased_and_each_samples_box_is_its_own() -> None:
    count = 20_000
    found = boxes(Erasing(p=0.25), count)
    assert (found[:, 2] > 0).mean() == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / count))
    assert not boxes(Erasing(p=0.0), 100).any()
    chosen = np.array([17, 3, 19_999, 256])
    alone = erased_boxes(Erasing(p=0.25), 0, np.zeros(4, np.int64), chosen, 224, 224)
    assert np.array_equal(alone, found[chosen])
    other_epoch = erased_boxes(Erasing(p=0.25), 0, np.ones(count, np.int64), np.arange(count), 224, 224)
    assert (other_epoch != found).any(axis=1).mean() > 0.3


@pytest.mark.parametrize("value", ["mean", "black"])
def test_a_box_becomes_the_mean_colour_or_black_and_nothing_else_changes(value: str) -> None:
    config = recipe(Erasing(p=0.8, value=value))
    epochs, ids = np.full(50, 3), np.arange(50)
    torch.manual_seed(0)
    pixels = torch.rand(50, 3, 20, 30).to(memory_format=torch.channels_last)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    images = (pixels - mean) / std
    expected = images.clone()
    assert config.erasing is not None
    for row, (y, x, height, width) in enumerate(erased_boxes(config.erasing, 5, epochs, ids, 20, 30)):
        fill = torch.zeros(3, 1, 1) if value == "mean" else -mean / std
        expected[row, :, y : y + height, x : x + width] = fill
    erase(config, 5, images, epochs, ids)
    assert torch.equal(images, expected)
    assert images.is_contiguous(memory_format=torch.channels_last)


GOLDEN_BOXES = [[60, 53, 113, 52], [110, 66, 108, 58], [157, 33, 51, 105]]


def test_the_erased_boxes_of_a_seed_are_what_they_were() -> None:
    """Checkpoints of old runs go on with these numbers; a change of any of them ends every run under way."""
    found = erased_boxes(Erasing(p=0.7), 1, np.array([2, 2, 2]), np.array([3, 4, 5]), 224, 224)
    assert found.tolist() == GOLDEN_BOXES


# --- mixup and CutMix --------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(SEEDS, STEPS, st.integers(0, 4096), st.floats(0.01, 10), st.integers(1, 300), st.integers(1, 300))
def test_a_mix_lies_within_the_images(seed: int, step: int, micro: int, alpha: float, height: int, width: int) -> None:
    how = draw_mix(Mixing(cutmix=alpha), seed, step, micro, height, width)
    assert how is not None and how.box is not None
    y, x, tall, wide = how.box
    assert 0 <= y <= y + tall <= height and 0 <= x <= x + wide <= width
    assert how.share == 1 - tall * wide / (height * width)
    blend = draw_mix(Mixing(mixup=alpha), seed, step, micro, height, width)
    assert blend is not None and blend.box is None and 0 <= blend.share <= 1


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_follow_the_beta_distribution(alpha: float) -> None:
    found = [draw_mix(Mixing(mixup=alpha), 1, step, micro, 8, 8) for step in range(500) for micro in range(4)]
    assert kstest([how.share for how in found if how is not None], beta(alpha, alpha).cdf).pvalue > 1e-3


def test_cutmix_draws_its_boxes_as_torchvision_does() -> None:
    torch.manual_seed(0)
    transform = v2.CutMix(alpha=1.0, num_classes=3)
    images = torch.empty(2, 3, 48, 80)
    theirs = []
    for _ in range(3_000):
        drawn = transform.make_params([images])
        x1, y1, x2, y2 = drawn["box"]
        theirs.append([int(y1), int(x1), int(y2 - y1), int(x2 - x1), drawn["lam_adjusted"]])
    mixes = [draw_mix(Mixing(cutmix=1.0), 1, step, 0, 48, 80) for step in range(3_000)]
    ours = [[*how.box, how.share] for how in mixes if how is not None and how.box is not None]
    for column, name in enumerate(("y", "x", "height", "width", "share")):
        assert kstest(np.array(ours)[:, column], np.array(theirs)[:, column]).pvalue > 1e-4, name


def test_with_both_on_each_comes_half_of_the_time_and_with_none_nothing_is_mixed() -> None:
    cuts = [draw_mix(Mixing(mixup=0.2, cutmix=1.0), 1, s, m, 8, 8).box is not None for s in range(500) for m in (0, 1)]  # type: ignore[union-attr]
    assert np.mean(cuts) == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(1_000))
    assert draw_mix(Mixing(), 1, 2, 3, 8, 8) is None


def transformed(transform: v2.Transform, params: dict[str, object], images: torch.Tensor, labels: torch.Tensor):  # type: ignore[no-untyped-def]
    """What torchvision's transform does with given parameters."""
    transform.make_params = lambda _: params  # type: ignore[method-assign]
    return transform(images, labels)


@pytest.mark.parametrize(
    "how", [Mix(0.3, None), Mix(0.0, None), Mix(1 - 12 / 80, (2, 3, 4, 3)), Mix(1.0, (2, 0, 0, 3))]
)
def test_images_and_targets_are_torchvisions(how: Mix) -> None:
    torch.manual_seed(0)
    images = torch.rand(7, 3, 8, 10).to(memory_format=torch.channels_last)
    labels = torch.tensor([0, 1, 2, 2, 4, 0, 3])
    if how.box is None:
        theirs = transformed(v2.MixUp(num_classes=5), {"labels": labels, "lam": how.share}, images, labels)
    else:
        y, x, tall, wide = how.box
        params = {"labels": labels, "batch_size": 7, "box": (x, y, x + wide, y + tall), "lam_adjusted": how.share}
        theirs = transformed(v2.CutMix(num_classes=5), params, images, labels)
    before = images.clone()
    ours = mix(images, labels, 5, how)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0)
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=0)
    assert torch.equal(images, before), "the batch itself is left alone"
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours[1].sum(1), torch.ones(7))


def test_smoothing_and_mixing_together_are_the_reference_s_loss() -> None:
    """pytorch/vision, references/classification: CrossEntropyLoss(label_smoothing) of mixed one-hot targets. Written
    out: the mixed sum of two smoothed losses."""
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 3, 1])
    _, targets = mix(torch.zeros(6, 3, 2, 2), labels, 4, Mix(0.3, None))
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.1)
    expected = 0.3 * smoothed(logits, labels) + 0.7 * smoothed(logits, labels.roll(1))
    torch.testing.assert_close(smoothed(logits, targets), expected)


GOLDEN_MIXES = [
    Mix(share=0.484733737244898, box=(38, 0, 186, 139)),
    Mix(share=0.3567841198979592, box=(61, 0, 163, 198)),
    Mix(share=0.9540816326530612, box=(44, 88, 48, 48)),
    Mix(share=0.014721446670591831, box=None),
]


def test_the_mixes_of_a_seed_are_what_they_were() -> None:
    """Checkpoints of old runs go on with these numbers; a change of any of them ends every run under way."""
    config = Mixing(mixup=0.2, cutmix=1.0)
    assert [draw_mix(config, 1, 2, micro, 224, 224) for micro in range(4)] == GOLDEN_MIXES


# --- in training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["mixing.mixup=-1", "mixing.cut_mix=1", "input.erasing={p: 2}", "input.erasing.scale=[1,0]"]
)
def test_a_wrong_key_or_value_is_named(key: str) -> None:
    with pytest.raises(LonghaulError) as refused:
        load_recipe("digits", [key])
    assert key.split("=")[0].split(".{")[0] in str(refused.value)


def test_a_mixed_and_erased_run_has_the_same_bits_on_one_worker_and_on_two(tmp_path: Path) -> None:
    prepare(open_source("digits", 0.0), tmp_path / "data")
    keys = (
        "duration=6it", "evaluate.every=6it", "mixing={mixup: 0.2, cutmix: 1.0}", "input.erasing={p: 0.5}",
        "loss.label_smoothing=0.1", "precision=fp32",
    )  # fmt: skip
    states = []
    for world_size in (1, 2):
        job = make_job(tmp_path / str(world_size), tmp_path / "data", *keys)
        train(job, world_size)
        assert all(finding.holds for finding in verify(job.run))
        states.append(final_state(job.run))
    assert different(*states) == []
    plain = make_job(tmp_path / "plain", tmp_path / "data", *keys[:2], *keys[3:])
    train(plain, 1)
    assert "model.fc.weight" in different(states[0], final_state(plain.run)), "mixing has an effect"
