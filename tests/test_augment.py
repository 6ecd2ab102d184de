"""Crop boxes, flips and colour shifts: inside the image, distributed as published, and each sample's own."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as vision

from configs.schema import Crop, Input, PadCrop, ResizedCrop, ScaleCrop
from data_pipeline.augment import Augmented, augment, central

SEEDS = st.integers(0, 2**63 - 1)
CROPS: list[Crop] = [ResizedCrop(), ScaleCrop(), PadCrop(padding=4)]
# From a pixel to a panorama; DALI's and JPEG's largest side is 65,535.
SIDES = st.one_of(st.integers(1, 8), st.integers(1, 700), st.integers(1, 65_535))


def recipe(crop: Crop, size: int = 224, flip: bool = True, pca_colour: float = 0.0) -> Input:
    return Input(size=size, mean=(0, 0, 0), std=(1, 1, 1), crop=crop, flip=flip, pca_colour=pca_colour)


def draw(config: Input, sizes: np.ndarray, seed: int = 0, epoch: int = 0, first: int = 0) -> Augmented:
    """The augmentation of samples first, first + 1, ... of these (height, width)s."""
    count = len(sizes)
    ids = np.arange(first, first + count, dtype=np.int64)
    return augment(config, seed, np.full(count, epoch, np.int64), ids, np.asarray(sizes, np.int32))


def same_size(height: int, width: int, count: int) -> np.ndarray:
    return np.tile(np.array([[height, width]], np.int32), (count, 1))


def columns(drawn: Augmented) -> np.ndarray:
    """Everything that was drawn, a row for each sample."""
    return np.column_stack([drawn.boxes, drawn.flips, drawn.shifts])


def assert_inside(boxes: np.ndarray, sizes: np.ndarray) -> None:
    """Each box (y, x, height, width) has a pixel at least and lies within its image."""
    assert (boxes[:, 2:] >= 1).all(), boxes[(boxes[:, 2:] < 1).any(axis=1)][0]
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= sizes).all()


# --- boxes -------------------------------------------------------------------------------------------------------


@st.composite
def image_sizes(draw: st.DrawFn) -> np.ndarray:
    pairs = draw(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=8))
    return np.repeat(np.array(pairs, np.int32), 16, axis=0)


@st.composite
def bounds(draw: st.DrawFn, low: float, high: float) -> tuple[float, float]:
    first, second = sorted([draw(st.floats(low, high)), draw(st.floats(low, high))])
    return first, second


@settings(max_examples=200)
@given(SEEDS, image_sizes(), bounds(0.001, 1.5), bounds(0.05, 20))
def test_a_resized_crop_lies_within_its_image(
    seed: int, sizes: np.ndarray, area: tuple[float, float], ratio: tuple[float, float]
) -> None:
    assert_inside(draw(recipe(ResizedCrop(area=area, ratio=ratio)), sizes, seed).boxes, sizes)


@settings(max_examples=200)
@given(SEEDS, image_sizes(), st.integers(1, 600), st.lists(st.integers(1, 700), min_size=2, max_size=2).map(sorted))
def test_a_scale_crop_lies_within_its_image_and_is_square(
    seed: int, sizes: np.ndarray, size: int, shorter: list[int]
) -> None:
    boxes = draw(recipe(ScaleCrop(shorter=(shorter[0], shorter[1])), size), sizes, seed).boxes
    assert_inside(boxes, sizes)
    assert (boxes[:, 2] == boxes[:, 3]).all()


@pytest.mark.parametrize("crop", [ResizedCrop(), ResizedCrop(ratio=(0.1, 0.2)), ResizedCrop(ratio=(3, 4)), ScaleCrop()])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (1, 65_535), (65_535, 1), (2, 3)])
def test_an_image_of_a_pixel_or_a_line_still_has_a_box(crop: Crop, size: tuple[int, int]) -> None:
    sizes = same_size(*size, 500)
    assert_inside(draw(recipe(crop), sizes).boxes, sizes)


@given(SEEDS, st.integers(1, 64), st.integers(0, 8))
def test_a_pad_crop_starts_within_the_padding_and_reaches_every_place(seed: int, size: int, padding: int) -> None:
    count = 40 * (2 * padding + 1)
    boxes = draw(recipe(PadCrop(padding=padding), size), same_size(size, size, count), seed).boxes
    assert (boxes[:, 2:] == size).all()
    for axis in (0, 1):
        # A place of 2p + 1 stays empty in 40 times as many draws with probability exp(-40).
        assert set(boxes[:, axis].tolist()) == set(range(-padding, padding + 1))


def test_a_pad_crop_draws_every_offset_equally_often_and_both_axes_apart() -> None:
    boxes = draw(recipe(PadCrop(padding=4), 32), same_size(32, 32, 81_000)).boxes
    counts = np.histogram2d(boxes[:, 0], boxes[:, 1], bins=9)[0]
    statistic = ((counts - 1_000) ** 2 / 1_000).sum()
    assert (statistic - 80) / math.sqrt(160) < 5


def test_an_image_of_no_allowed_ratio_is_cropped_in_the_middle_like_torchvisions() -> None:
    for height, width in ((10, 1_000), (1_000, 10), (7, 333)):
        ours = draw(recipe(ResizedCrop(area=(0.9, 1.0))), same_size(height, width, 20)).boxes
        # (top, left, height, width), deterministic once the ten tries have failed
        theirs = RandomResizedCrop.get_params(torch.empty(3, height, width), [0.9, 1.0], [3 / 4, 4 / 3])
        assert (ours == np.array(theirs)).all()


@settings(max_examples=60)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(0, 20))
def test_the_central_crop_stands_where_torchvisions_stands(height: int, width: int, size: int, more: int) -> None:
    config = recipe(ResizedCrop(), size).model_copy(update={"eval_resize": size + more})
    (target,), (anchor,) = central(config, np.array([[height, width]], np.int32))
    resized = vision.resize(torch.zeros(1, height, width), [size + more])
    assert tuple(target) == resized.shape[1:]
    places = torch.arange(resized[0].numel()).view(resized.shape)
    cut = vision.center_crop(places, [size, size])
    assert torch.equal(cut, places[:, anchor[0] : anchor[0] + size, anchor[1] : anchor[1] + size])


@pytest.mark.parametrize("crop", [ResizedCrop(area=(0.3, 1.0)), ScaleCrop(shorter=(8, 16))])
def test_a_crop_may_stand_in_every_place_that_its_size_leaves(crop: Crop) -> None:
    boxes = draw(recipe(crop, size=8), same_size(9, 11, 20_000)).boxes
    for axis, length in ((0, 9), (1, 11)):
        sides, counts = np.unique(boxes[:, axis + 2], return_counts=True)
        often = sides[counts > 500]  # then one of at most eight places stays empty with probability exp(-62)
        assert len(often) > 2
        for side in often:
            places = boxes[boxes[:, axis + 2] == side, axis]
            assert set(places.tolist()) == set(range(length - side + 1))


# --- distributions -----------------------------------------------------------------------------------------------

QUANTILES = np.array([0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98])


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (128, 400)])
def test_resized_crops_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    """Areas, ratios and centres: no quantile further apart than five standard errors of 6,000 draws."""
    height, width = size
    count = 6_000
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    area, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    theirs = np.array([RandomResizedCrop.get_params(image, list(area), list(ratio)) for _ in range(count)])
    ours = draw(recipe(ResizedCrop(area=area, ratio=ratio)), same_size(height, width, count)).boxes
    measures = {
        "area": lambda b: b[:, 2] * b[:, 3] / (height * width),
        "ratio": lambda b: np.log(b[:, 3] / b[:, 2]),
        "y": lambda b: (b[:, 0] + b[:, 2] / 2) / height,
        "x": lambda b: (b[:, 1] + b[:, 3] / 2) / width,
    }
    for name, measure in measures.items():
        first, second = np.sort(measure(ours)), np.sort(measure(theirs))
        assert first.mean() == pytest.approx(second.mean(), abs=5 * first.std() * math.sqrt(2 / count)), name
        for quantile in QUANTILES:
            # Ranks compare, rather than values: no density has to be known. Ties are split evenly.
            value = np.quantile(second, quantile)
            rank = (np.searchsorted(first, value, "left") + np.searchsorted(first, value, "right")) / 2 / count
            error = math.sqrt(2 * quantile * (1 - quantile) / count)
            ties = (np.searchsorted(first, value, "right") - np.searchsorted(first, value, "left")) / count
            assert abs(rank - quantile) < 5 * error + ties, (name, quantile)


def test_scale_crops_draw_the_shorter_side_as_the_paper_says() -> None:
    """Resizing 480 x 640 so that the shorter side is s in [256, 480] and cropping 224 takes 224 * 480 / s pixels."""
    count = 225 * 100
    boxes = draw(recipe(ScaleCrop(shorter=(256, 480))), same_size(480, 640, count)).boxes
    possible = np.array([round(224 * 480 / s) for s in range(256, 481)])
    sides, expected = np.unique(possible, return_counts=True)
    found = np.array([(boxes[:, 2] == side).sum() for side in sides])
    assert found.sum() == count
    statistic = ((found - 100 * expected) ** 2 / (100 * expected)).sum()
    assert (statistic - len(sides)) / math.sqrt(2 * len(sides)) < 5
    # The place is uniform in what is left over.
    for axis, length in ((0, 480), (1, 640)):
        place = (boxes[:, axis] + 0.5) / (length - boxes[:, 2] + 1)
        assert place.mean() == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / count))


@pytest.mark.parametrize("crop", CROPS)
def test_half_of_the_samples_are_flipped_and_flips_know_nothing_of_boxes(crop: Crop) -> None:
    count = 40_000
    drawn = draw(recipe(crop, 32), same_size(32, 32, count))
    assert set(drawn.flips.tolist()) == {0, 1}
    assert drawn.flips.mean() == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(count))
    assert abs(np.corrcoef(drawn.flips, drawn.boxes[:, 0])[0, 1]) < 5 / math.sqrt(count)
    # Nor does a flip know what happened to the same sample in the epoch before.
    assert abs(np.corrcoef(drawn.flips, draw(recipe(crop, 32), same_size(32, 32, count), epoch=1).flips)[0, 1]) < 0.025


def test_nothing_is_flipped_or_coloured_unless_the_recipe_asks() -> None:
    drawn = draw(recipe(PadCrop(), 32, flip=False), same_size(32, 32, 100))
    assert not drawn.flips.any() and not drawn.shifts.any()


def test_colour_shifts_have_the_covariance_that_alexnet_published() -> None:
    """facebookarchive/fb.resnet.torch, datasets/imagenet.lua: rows of vectors times (Gaussian times values)."""
    values = np.diag([0.2175, 0.0188, 0.0045])
    vectors = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    expected = 0.1**2 * vectors @ values**2 @ vectors.T
    count = 200_000
    shifts = draw(recipe(PadCrop(), 32, pca_colour=0.1), same_size(32, 32, count)).shifts.astype(np.float64)
    spread = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    # The standard error of a covariance is at most sqrt(2 / n) of the product of the two deviations.
    assert (np.abs(np.cov(shifts.T) - expected) < 5 * math.sqrt(2 / count) * spread).all()
    assert (np.abs(shifts.mean(axis=0)) < 5 * np.sqrt(np.diag(expected) / count)).all()
    # Gaussian along the first component: kurtosis 3.
    first = shifts @ vectors[:, 0]
    assert ((first / first.std()) ** 4).mean() == pytest.approx(3, abs=5 * math.sqrt(96 / count))


def test_twice_the_strength_is_twice_the_colour_shift() -> None:
    sizes = same_size(32, 32, 50)
    single, double = (draw(recipe(PadCrop(), 32, pca_colour=s), sizes).shifts for s in (0.1, 0.2))
    np.testing.assert_allclose(double, 2 * single, rtol=1e-6)


# --- each sample's own -------------------------------------------------------------------------------------------

MIXED = np.stack([np.arange(60) % 7 * 40 + 33, np.arange(60) % 11 * 30 + 40], axis=1).astype(np.int32)


@pytest.mark.parametrize("crop", CROPS)
@given(SEEDS, st.permutations(range(60)), st.integers(1, 60))
@settings(max_examples=25)
def test_a_sample_is_augmented_alike_whatever_stands_beside_it(
    crop: Crop, seed: int, permutation: list[int], batch: int
) -> None:
    config = recipe(crop, pca_colour=0.1)
    together = columns(draw(config, MIXED, seed, epoch=5))
    shuffled = np.array(permutation)
    for start in range(0, 60, batch):
        ids = shuffled[start : start + batch]
        alone = augment(config, seed, np.full(len(ids), 5, np.int64), ids.astype(np.int64), MIXED[ids])
        assert np.array_equal(columns(alone), together[ids])


@pytest.mark.parametrize("crop", CROPS)
def test_epochs_may_be_mixed_in_a_batch(crop: Crop) -> None:
    config = recipe(crop, pca_colour=0.1)
    epochs = np.array([2, 3, 2, 3], np.int64)
    mixed = columns(augment(config, 9, epochs, np.array([7, 7, 8, 8], np.int64), MIXED[[7, 7, 8, 8]]))
    for row, (epoch, sample) in enumerate([(2, 7), (3, 7), (2, 8), (3, 8)]):
        assert np.array_equal(columns(draw(config, MIXED[sample : sample + 1], 9, epoch, sample))[0], mixed[row])


@pytest.mark.parametrize("crop", CROPS)
@given(SEEDS, st.integers(0, 2**16 - 2), st.integers(0, 2**40))
@settings(max_examples=25)
def test_epochs_seeds_and_samples_differ(crop: Crop, seed: int, epoch: int, first: int) -> None:
    config = recipe(crop, pca_colour=0.1)
    sizes = same_size(300, 400, 50)
    here = columns(draw(config, sizes, seed, epoch, first))
    others = (
        draw(config, sizes, seed, epoch + 1, first),
        draw(config, sizes, seed ^ 1, epoch, first),
        draw(config, sizes, seed ^ 2**62, epoch, first),
        draw(config, sizes, seed, epoch, first + 50),
    )
    for other in others:
        # Colour shifts are real numbers, so not one may come back; boxes of 50 samples may agree here and there.
        assert not (columns(other)[:, 5:] == here[:, 5:]).all(axis=1).any()
        assert (columns(other)[:, :2] != here[:, :2]).any()


@given(SEEDS)
@settings(max_examples=25)
def test_asking_for_flips_or_colour_does_not_move_the_boxes(seed: int) -> None:
    sizes = same_size(300, 400, 20)
    plain = draw(recipe(ResizedCrop(), flip=False), sizes, seed)
    full = draw(recipe(ResizedCrop(), flip=True, pca_colour=0.1), sizes, seed)
    assert np.array_equal(plain.boxes, full.boxes)


GOLDEN_BOXES = [[156, 299, 121, 160], [70, 130, 209, 200]]
GOLDEN_FLIPS = [0, 0]
GOLDEN_SHIFTS = [[-0.01325247, -0.0135864, -0.01255574], [0.00182801, 0.00384885, 0.00474002]]
GOLDEN_SCALE = [[39, 59, 282, 282]]
GOLDEN_PAD = [[-3, -1, 32, 32]]


def test_the_augmentation_of_a_seed_is_what_it_was() -> None:
    """Checkpoints of old runs go on with these numbers; a change of any of them ends every run under way."""
    drawn = draw(recipe(ResizedCrop(), pca_colour=0.1), same_size(375, 500, 2), seed=1, epoch=2, first=3)
    assert drawn.boxes.tolist() == GOLDEN_BOXES
    assert drawn.flips.tolist() == GOLDEN_FLIPS
    np.testing.assert_allclose(drawn.shifts, GOLDEN_SHIFTS, atol=1e-7)
    assert draw(recipe(ScaleCrop()), same_size(375, 500, 1), seed=1).boxes.tolist() == GOLDEN_SCALE
    assert draw(recipe(PadCrop(), 32), same_size(32, 32, 1), seed=1).boxes.tolist() == GOLDEN_PAD
