"""Colour jitter and automatic augmentation: drawn as published, executed as torchvision does, each sample's own."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvidia.dali import fn, pipeline_def
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import auto_augment as timm
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as vision

from configs import LonghaulError, load_recipe
from configs.augmentation import AutoAugment, ColourJitter, RandAugment, TimmRandAugment, TrivialAugment
from configs.schema import Input, ResizedCrop
from data_pipeline import hue
from data_pipeline.distort import (
    BINS,
    JITTERS,
    NAMES,
    OPERATIONS,
    TIMM_OPERATIONS,
    Jitter,
    Operation,
    distortion_inputs,
    draw_jitter,
    draw_operations,
    execution,
    jitter_stages,
    magnitudes,
    num_inputs,
    timm_magnitudes,
)
from data_pipeline.ingest import prepare
from data_pipeline.loader import training_batches
from data_pipeline.order import Order
from data_pipeline.philox import uniforms
from data_pipeline.photometric import distort
from data_pipeline.sources import open_source
from data_pipeline.split import Split
from tests.conftest import ROOT

SEEDS = st.integers(0, 2**63 - 1)
SIZE = 224
RSB = TimmRandAugment(magnitude=7, magnitude_std=0.5)
POLICIES: list[AutoAugment] = [TrivialAugment(), RandAugment(num_ops=3, magnitude=17), RSB]
SPACES = {"wide": v2.TrivialAugmentWide, "rand": v2.RandAugment}
SIGNED = OPERATIONS[1:10]

# What may differ from torchvision's functional operations on photographs: the mean absolute difference in levels of 8
# bits, and the share of values that differ by more than 8. docs/data-augmentation.md has the table.
EXACT = (0.0, 0.0)
JITTER_TOLERANCE = {"brightness": (0.01, 0), "contrast": (0.1, 0), "saturation": (0.5, 0), "hue": (0.01, 0)}
TOLERANCE = {
    "Identity": EXACT, "ShearX": (0.1, 0.003), "ShearY": (0.1, 0.003), "TranslateX": EXACT, "TranslateY": EXACT,
    "Rotate": (0.1, 0.003), "Brightness": (0.01, 0), "Color": (0.5, 0), "Contrast": (0.1, 0), "Sharpness": (0.5, 0),
    "Posterize": EXACT, "Solarize": EXACT, "AutoContrast": (0.1, 0), "Equalize": (0.7, 0),
}  # fmt: skip


def recipe(**keys: object) -> Input:
    values = {"size": SIZE, "mean": (0, 0, 0), "std": (1, 1, 1), "crop": {"kind": "resized_crop"}, **keys}
    return Input.model_validate({**values, "eval_resize": values["size"]})


def draw_for(seed: int, count: int, epoch: int = 0):  # type: ignore[no-untyped-def]
    return lambda purpose: uniforms(seed, epoch, np.arange(count, dtype=np.uint64), purpose)


# --- what is drawn -----------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(SEEDS, *[st.floats(0, 2)] * 3, st.floats(0, 0.5))
def test_jitter_factors_lie_where_torchvisions_do(seed: int, b: float, c: float, s: float, h: float) -> None:
    drawn = draw_jitter(ColourJitter(brightness=b, contrast=c, saturation=s, hue=h), draw_for(seed, 200))
    theirs = v2.ColorJitter(brightness=b, contrast=c, saturation=s, hue=h)
    for name, factors in zip(JITTERS, drawn.factors.T, strict=True):
        low, high = getattr(theirs, name) or ((0.0, 0.0) if name == "hue" else (1.0, 1.0))
        assert factors.min() >= np.float32(low) and factors.max() <= np.float32(high)
    assert (np.sort(drawn.order, axis=1) == np.arange(4)).all()


def test_jitter_factors_are_uniform_and_every_order_is_as_likely() -> None:
    count = 48_000
    drawn = draw_jitter(ColourJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1), draw_for(1, count))
    for name, factors in zip(JITTERS, drawn.factors.T, strict=True):
        low, high = (-0.1, 0.1) if name == "hue" else (0.6, 1.4)
        counts = np.histogram(factors, bins=20, range=(low, high))[0]
        assert ((counts - count / 20) ** 2 / (count / 20)).sum() < 19 + 5 * math.sqrt(2 * 19), name
    orders, counts = np.unique(drawn.order, axis=0, return_counts=True)
    assert len(orders) == 24
    assert ((counts - count / 24) ** 2 / (count / 24)).sum() < 23 + 5 * math.sqrt(2 * 23)
    assert np.abs(np.corrcoef(drawn.factors.T) - np.eye(4)).max() < 5 / math.sqrt(count)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("size", [32, 160, 224, 331])
def test_magnitudes_are_those_of_torchvisions_space(space: str, size: int) -> None:
    theirs = SPACES[space]()._AUGMENTATION_SPACE
    assert tuple(theirs) == OPERATIONS
    for name, ours in zip(OPERATIONS, magnitudes(space == "wide", size), strict=True):
        make, signed = theirs[name]
        expected = make(BINS, size, size)
        assert signed == (name in SIGNED)
        expected = np.zeros(BINS) if expected is None else expected.numpy() * (255 if name == "Solarize" else 1)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4, err_msg=name)


def test_trivial_augment_draws_every_operation_magnitude_and_sign_equally_often() -> None:
    count = 140_000
    (drawn,) = draw_operations(recipe(auto_augment=TrivialAugment()), draw_for(2, count), SIZE)
    counts = np.bincount(drawn.names, minlength=14)
    assert ((counts - count / 14) ** 2 / (count / 14)).sum() < 13 + 5 * math.sqrt(2 * 13)
    table = magnitudes(True, SIZE)
    for place, name in enumerate(OPERATIONS):
        given = drawn.magnitudes[drawn.names == place]
        values, often = np.unique(np.abs(given), return_counts=True)
        if name == "Posterize":
            assert set(values) == {2, 3, 4, 5, 6, 7, 8}
            continue
        np.testing.assert_allclose(values, np.unique(table[place]), rtol=1e-6)
        expected = len(given) / len(values)
        assert ((often - expected) ** 2 / expected).sum() < len(values) + 5 * math.sqrt(2 * len(values))
        if name in SIGNED:
            moved = given[given != 0]
            assert (moved < 0).mean() == pytest.approx(0.5, abs=2.5 / math.sqrt(len(moved)))
        else:
            assert (given >= 0).all()


def test_rand_augment_draws_its_operations_apart_and_keeps_its_magnitude() -> None:
    count = 40_000
    config = recipe(auto_augment=RandAugment(num_ops=2, magnitude=9))
    first, second = draw_operations(config, draw_for(3, count), SIZE)
    assert abs(np.corrcoef(first.names, second.names)[0, 1]) < 5 / math.sqrt(count)
    table = magnitudes(False, SIZE)[:, 9]
    for drawn in (first, second):
        np.testing.assert_allclose(np.abs(drawn.magnitudes), np.abs(table[drawn.names]), rtol=1e-6)


# By our names: timm's, and how its argument becomes our magnitude.
TIMM_NAMES = {
    **{name: f"{name}Increasing" for name in ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")},
    **{name: f"{name}Rel" for name in ("TranslateX", "TranslateY")},
}
ENHANCEMENTS = ("Color", "Contrast", "Brightness", "Sharpness")


def timm_argument(name: str, level: float) -> tuple[float, ...]:
    """What timm's operation is given at a level, with the sign that it draws; () where it takes nothing."""
    make = timm.LEVEL_TO_ARG[TIMM_NAMES.get(name, name)]
    return () if make is None else make(level, {})


def test_timms_operations_are_those_of_its_increasing_space() -> None:
    assert [TIMM_NAMES.get(name, name) for name in TIMM_OPERATIONS] == timm._RAND_INCREASING_TRANSFORMS


@given(st.floats(0, 10))
def test_magnitudes_of_timms_space_are_timms(level: float) -> None:
    ours = dict(zip(NAMES, timm_magnitudes(np.array([level]), SIZE)[0].tolist(), strict=True))
    for name in TIMM_OPERATIONS:
        given = timm_argument(name, level)
        if not given:
            assert ours[name] == 0
        elif name in ENHANCEMENTS:
            assert ours[name] == pytest.approx(abs(given[0] - 1), abs=1e-9)
        elif name in ("TranslateX", "TranslateY"):
            assert ours[name] == pytest.approx(abs(given[0]) * SIZE)
        else:
            assert ours[name] == pytest.approx(abs(given[0]))


def test_timms_rand_augment_draws_operations_signs_and_noisy_levels_as_timm_does() -> None:
    count = 90_000
    drawn, other = draw_operations(recipe(auto_augment=RSB), draw_for(4, count), SIZE)
    assert (drawn.names != other.names).any()
    applied = drawn.names > 0
    assert abs(applied.mean() - 0.5) < 5 * 0.5 / math.sqrt(count)
    counts = np.bincount(drawn.names[applied], minlength=len(NAMES))[[NAMES.index(name) for name in TIMM_OPERATIONS]]
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 14 + 5 * math.sqrt(2 * 14)
    degrees = drawn.magnitudes[drawn.names == NAMES.index("Rotate")] / 3
    assert (degrees < 0).mean() == pytest.approx(0.5, abs=2.5 / math.sqrt(len(degrees)))
    levels = np.abs(degrees)
    assert levels.mean() == pytest.approx(7, abs=5 * 0.5 / math.sqrt(len(levels)))
    assert levels.std() == pytest.approx(0.5, rel=0.06)
    noisy = TimmRandAugment(num_ops=1, magnitude=10, magnitude_std=4)
    (drawn,) = draw_operations(recipe(auto_augment=noisy), draw_for(4, count), SIZE)
    turned = np.abs(drawn.magnitudes[drawn.names == NAMES.index("Rotate")])
    assert turned.max() == 30 and (turned == 30).mean() == pytest.approx(0.5, abs=0.05)
    always = draw_operations(recipe(auto_augment=TimmRandAugment(probability=1)), draw_for(4, 1_000), SIZE)[0]
    never = draw_operations(recipe(auto_augment=TimmRandAugment(probability=0)), draw_for(4, 1_000), SIZE)[0]
    assert (always.names > 0).all() and not never.names.any()


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=20)
@given(seed=SEEDS, chosen=st.lists(st.integers(0, 2**40), min_size=1, max_size=12), epoch=st.integers(0, 60_000))
def test_what_a_sample_gets_is_its_own(policy: AutoAugment, seed: int, chosen: list[int], epoch: int) -> None:
    config = recipe(auto_augment=policy, colour_jitter=ColourJitter(brightness=0.4, hue=0.1))
    ids = np.array(chosen, np.int64)
    together = distortion_inputs(config, seed, np.full(len(ids), epoch, np.int64), ids, SIZE)
    assert len(together) == num_inputs(config)
    for row, sample in enumerate(chosen):
        alone = distortion_inputs(config, seed, np.array([epoch]), np.array([sample]), SIZE)
        for whole, part in zip(together, alone, strict=True):
            assert np.array_equal(whole[row], part[0])
    other = distortion_inputs(config, seed, np.full(len(ids), epoch + 1, np.int64), ids, SIZE)
    assert not (other[2] == together[2]).any(), "another epoch, other turns of hue"


GOLDEN_FACTORS = [[0.706735, 1.256682, 1.061111, 0.088654], [0.777515, 1.395937, 0.856806, 0.029912]]
GOLDEN_ORDER = [[0, 1, 3, 2], [0, 3, 1, 2]]
GOLDEN_CHOSEN = [7, 4]
GOLDEN_PARAMETER = [26.0, 0.175]


def test_the_distortions_of_a_seed_are_what_they_were() -> None:
    """Checkpoints of old runs go on with these numbers; a change of any of them ends every run under way."""
    config = recipe(
        auto_augment=TrivialAugment(), colour_jitter=ColourJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    )
    jitter = draw_jitter(config.colour_jitter, lambda p: uniforms(1, 2, np.array([3, 4], np.uint64), p))
    np.testing.assert_allclose(jitter.factors, GOLDEN_FACTORS, atol=1e-6)
    assert jitter.order.tolist() == GOLDEN_ORDER
    *_, chosen, parameter, _ = distortion_inputs(config, 1, np.array([2, 2]), np.array([3, 4]), SIZE)
    assert chosen.tolist() == GOLDEN_CHOSEN
    np.testing.assert_allclose(parameter, GOLDEN_PARAMETER, atol=1e-5)


# --- what it does to pixels --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs() -> np.ndarray:
    """uint8 [12, 224, 224, 3]: real ones, scikit-learn's, whole and in parts."""
    cut = []
    for image in load_sample_images().images:
        whole = Image.fromarray(image)
        cut.append(np.asarray(whole.resize((SIZE, SIZE), Image.Resampling.BICUBIC)))
        cut += [
            np.asarray(whole.crop((x, y, x + SIZE, y + SIZE)))
            for x, y in ((0, 0), (80, 190), (200, 70), (300, 9), (400, 200))
        ]
    return np.stack(cut)


def execute(config: Input, images: np.ndarray, inputs: Sequence[np.ndarray]) -> np.ndarray:
    """`photometric.distort` of images on the CPU."""

    @pipeline_def(batch_size=len(images), num_threads=1, device_id=None, exec_dynamic=True, enable_conditionals=True)
    def pipeline():  # type: ignore[no-untyped-def]
        nodes = fn.external_source(source=lambda: (images, *inputs), num_outputs=1 + len(inputs), batch=True)
        return distort(config, nodes[0], list(nodes[1:]))

    built = pipeline()
    built.build()
    return np.array(built.run()[0].as_tensor())


def torch_images(images: np.ndarray) -> list[torch.Tensor]:
    return list(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())


def assert_alike(ours: np.ndarray, theirs: Sequence[torch.Tensor], bound: tuple[float, float], what: str) -> None:
    expected = torch.stack(list(theirs)).permute(0, 2, 3, 1).numpy()
    difference = np.abs(ours.astype(int) - expected.astype(int))
    found = (float(difference.mean()), float((difference > 8).mean()))
    assert found[0] <= bound[0] and found[1] <= bound[1], f"{what}: {found}, allowed {bound}"


@pytest.fixture(scope="module", params=["nearest", "bilinear"])
def executed(request: pytest.FixtureRequest, photographs: np.ndarray) -> tuple[str, Operation, np.ndarray]:
    """Every operation at twelve magnitudes of the wide and the narrow space, on one photograph each."""
    names, given = [], []
    for place, name in enumerate(OPERATIONS):
        table = np.concatenate([magnitudes(True, SIZE)[place, ::6], magnitudes(False, SIZE)[place, ::6]])
        signs = np.where(np.arange(12) % 2 & (name in SIGNED), -1, 1)
        names += [place] * 12
        given += (signs * table).tolist()
    operation = Operation(np.array(names, np.int32), np.array(given, np.float32))
    config = recipe(auto_augment=RandAugment(num_ops=1, interpolation=request.param))
    return request.param, operation, execute(config, np.tile(photographs, (14, 1, 1, 1)), execution(operation, SIZE))


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_torchvisions_at_every_magnitude(
    name: str, executed: tuple[str, Operation, np.ndarray], photographs: np.ndarray
) -> None:
    interpolation, operation, ours = executed
    here = operation.names == OPERATIONS.index(name)
    theirs = [
        v2.RandAugment()._apply_image_or_video_transform(
            image,
            name,
            float(magnitude) / (255 if name == "Solarize" else 1),
            InterpolationMode(interpolation),
            {},
        )
        for image, magnitude in zip(torch_images(photographs), operation.magnitudes[here], strict=True)
    ]
    assert_alike(ours[here], theirs, TOLERANCE[name], name)


# PIL interpolates in whole steps, and mixes the border with what fills it.
TIMM_TOLERANCE = {
    **TOLERANCE, "Invert": EXACT, "SolarizeAdd": EXACT, "Contrast": (0.2, 0),
    "ShearX": (0.6, 0.005), "ShearY": (0.6, 0.005), "Rotate": (0.8, 0.01),
}  # fmt: skip


def test_timms_operations_on_photographs(photographs: np.ndarray) -> None:
    """Against timm's functions on PIL images, bilinear, filled with the grey of the mean colour as DALI has it."""
    levels = np.linspace(0, 9.9, len(photographs))  # PIL refuses the 0 bits of 10
    config = recipe(mean=(0.485, 0.456, 0.406), auto_augment=TimmRandAugment(num_ops=1))
    table = timm_magnitudes(levels, SIZE)
    for name in TIMM_OPERATIONS:
        place = NAMES.index(name)
        operation = Operation(np.full(len(levels), place, np.int32), table[:, place].astype(np.float32))
        ours = execute(config, photographs, execution(operation, SIZE))
        theirs = []
        for image, level in zip(photographs, levels, strict=True):
            arguments = timm_argument(name, float(level))
            if name in ENHANCEMENTS:
                arguments = (1 + abs(arguments[0] - 1),)  # whatever sign was drawn
            elif name in ("ShearX", "ShearY", "Rotate"):
                arguments = (abs(arguments[0]),)
            elif name in ("TranslateX", "TranslateY"):
                arguments = (-math.trunc(abs(arguments[0]) * SIZE) / SIZE,)  # whole pixels, to the other side
            function = timm.NAME_TO_OP[TIMM_NAMES.get(name, name)]
            options = {"fillcolor": (114, 114, 114), "resample": Image.Resampling.BILINEAR}
            done = function(Image.fromarray(image), *arguments, **options)
            theirs.append(torch.from_numpy(np.asarray(done).copy()).permute(2, 0, 1))
        assert_alike(ours, theirs, TIMM_TOLERANCE[name], name)


@pytest.mark.parametrize("name", JITTERS)
def test_a_jitter_is_torchvisions_at_every_factor(name: str, photographs: np.ndarray) -> None:
    jitter = ColourJitter(**{name: 0.5})
    low, high = (-0.5, 0.5) if name == "hue" else (0.0, 2.5)
    given = np.linspace(low, high, len(photographs)).astype(np.float32)
    drawn = Jitter(np.tile(given[:, None], (1, 4)), np.tile(np.arange(4, dtype=np.int32), (len(given), 1)))
    ours = execute(recipe(colour_jitter=jitter), photographs, jitter_stages(jitter, drawn))
    apply = getattr(vision, f"adjust_{name}")
    theirs = [apply(image, float(factor)) for image, factor in zip(torch_images(photographs), given, strict=True)]
    assert_alike(ours, theirs, JITTER_TOLERANCE[name], name)


def test_jitters_come_one_after_another_in_the_order_drawn(photographs: np.ndarray) -> None:
    config = recipe(colour_jitter=ColourJitter(brightness=0.9, contrast=0.9, hue=0.5))
    assert config.colour_jitter is not None
    jitter = Jitter(
        np.tile(np.array([1.8, 0.3, 9.0, 0.2], np.float32), (len(photographs), 1)),  # 9: saturation is not asked for
        np.array([[0, 1, 2, 3], [1, 0, 3, 2], [3, 2, 1, 0], [2, 3, 0, 1]] * 3, np.int32),
    )
    ours = execute(config, photographs, jitter_stages(config.colour_jitter, jitter))
    theirs = []
    for image, order in zip(torch_images(photographs), jitter.order, strict=True):
        for place in order:
            if JITTERS[place] != "saturation":
                apply = getattr(vision, f"adjust_{JITTERS[place]}")
                image = apply(image, float(jitter.factors[0, place]))
        theirs.append(image)
    assert_alike(ours, theirs, (0.2, 0.0), "in the order drawn")
    backwards = execute(
        config, photographs, jitter_stages(config.colour_jitter, Jitter(jitter.factors, jitter.order[:, ::-1]))
    )
    assert np.abs(ours.astype(int) - backwards).mean() > 8


def test_operations_come_one_after_another_and_each_sample_gets_its_own(photographs: np.ndarray) -> None:
    config = recipe(auto_augment=RandAugment(num_ops=2))
    names = ["Rotate", "Solarize", "Equalize", "Posterize", "TranslateX", "Brightness", "Identity", "ShearY"]
    first = np.array([OPERATIONS.index(name) for name in (names * 2)[: len(photographs)]], np.int32)
    second = np.roll(first, 1)
    table = magnitudes(False, SIZE)[:, 20]
    inputs = [execution(Operation(drawn, table[drawn].astype(np.float32)), SIZE) for drawn in (first, second)]
    ours = execute(config, photographs, [array for operation in inputs for array in operation])
    for row, image in enumerate(photographs):
        for operation in inputs:
            (image,) = execute(
                recipe(auto_augment=RandAugment(num_ops=1)), image[None], [array[row : row + 1] for array in operation]
            )
        assert np.array_equal(ours[row], image)


def test_flat_and_grey_images_are_torchvisions_to_the_level() -> None:
    """Those where a denominator is zero: a channel of one value, a colour without hue, a histogram with one bar."""
    column = np.arange(SIZE, dtype=np.uint8)[None, :, None]
    images = np.stack(
        [np.broadcast_to(np.array(colour, np.uint8), (SIZE, SIZE, 3)) for colour in (0, 255, [12, 200, 77])]
        + [np.broadcast_to(column, (SIZE, SIZE, 3))]
    )
    for name in OPERATIONS[6:]:
        given = np.full(len(images), magnitudes(False, SIZE)[OPERATIONS.index(name), 9], np.float32)
        operation = Operation(np.full(len(images), OPERATIONS.index(name), np.int32), given)
        ours = execute(recipe(auto_augment=RandAugment(num_ops=1)), images, execution(operation, SIZE))
        magnitude = float(given[0]) / (255 if name == "Solarize" else 1)
        transform = v2.RandAugment()._apply_image_or_video_transform
        theirs = [transform(i, name, magnitude, InterpolationMode.NEAREST, {}) for i in torch_images(images)]
        expected = torch.stack(theirs).permute(0, 2, 3, 1).numpy()
        assert np.abs(ours.astype(int) - expected).max() <= 2, name


def test_hue_is_the_same_by_loop_and_by_arithmetic(photographs: np.ndarray) -> None:
    turns = np.linspace(-0.5, 0.5, len(photographs)).astype(np.float32)

    @pipeline_def(batch_size=len(photographs), num_threads=1, device_id=None, exec_dynamic=True)
    def pipeline():  # type: ignore[no-untyped-def]
        images, shift = fn.external_source(source=lambda: (photographs, turns), num_outputs=2, batch=True)
        images = fn.reshape(images, layout="HWC")
        return hue.by_loop(images, shift), hue.by_arithmetic(images, shift)

    built = pipeline()
    built.build()
    loop, arithmetic = (np.array(out.as_tensor()).astype(int) for out in built.run())
    assert np.abs(loop - arithmetic).max() <= 1 and (loop != arithmetic).mean() < 1e-3


# --- through the loader ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """24 parts of the two photographs, of different sizes."""
    root = tmp_path_factory.mktemp("photos")
    for index in range(24):
        image = Image.fromarray(load_sample_images().images[index % 2])
        path = root / "source" / "train" / str(index % 2) / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.crop((index * 10, index * 5, 300 + index * 7, 250 + index * 4)).save(path, quality=90)
    prepare(open_source(str(root / "source"), 0.0), root / "data")
    return Split(root / "data", "train")


def samples(split: Split, config: Input, micro: int, threads: int) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    order = Order(7, len(split), micro, micro)
    work = [(step, 0) for step in range(2 * len(split) // micro)]
    for batch in training_batches(split, config, order, work, torch.device("cpu"), threads):
        yield from zip(map(tuple, batch.records.tolist()), batch.images.numpy().copy(), strict=True)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_samples_pixels_are_the_same_whatever_the_batch_and_the_threads(policy: AutoAugment, photos: Split) -> None:
    jitter = ColourJitter(brightness=0.4, contrast=0.4, saturation=0.4)
    config = recipe(size=64, auto_augment=policy, colour_jitter=jitter)
    expected = dict(samples(photos, config, 24, 1))
    plain = dict(samples(photos, recipe(size=64), 24, 1))
    assert len(expected) == 48
    for micro, threads in ((6, 1), (8, 3), (1, 2)):
        found = dict(samples(photos, config, micro, threads))
        assert found.keys() == expected.keys() == plain.keys()
        assert all(np.array_equal(found[key], expected[key]) for key in expected)
    assert np.mean([np.array_equal(expected[key], plain[key]) for key in expected]) < 0.2


@pytest.mark.skipif(not (ROOT.parent / "shared/data/imagenet-500.tar").is_file(), reason="no photographs of ImageNet")
def test_trivial_augment_of_real_photographs_is_torchvisions(tmp_path: Path) -> None:
    prepare(open_source(str(ROOT.parent / "shared/data/imagenet-500.tar"), 0.0), tmp_path / "data")
    split = Split(tmp_path / "data", "train")
    config = recipe(auto_augment=TrivialAugment())
    plain, ours = dict(samples(split, recipe(), 50, 1)), dict(samples(split, config, 50, 1))
    differences: dict[str, list[np.ndarray]] = {name: [] for name in OPERATIONS}
    for key, image in plain.items():
        (drawn,) = draw_operations(
            config, lambda purpose, k=key: uniforms(7, k[0], np.array([k[1]], np.uint64), purpose), SIZE
        )
        name, magnitude = OPERATIONS[drawn.names[0]], float(drawn.magnitudes[0])
        expected = v2.RandAugment()._apply_image_or_video_transform(
            torch.from_numpy(np.rint(image * 255).astype(np.uint8)),
            name, magnitude / (255 if name == "Solarize" else 1), InterpolationMode.NEAREST, {},
        )  # fmt: skip
        differences[name].append(np.abs(np.rint(ours[key] * 255) - expected.numpy()))
    for name, found in differences.items():
        mean, share = np.mean(found), np.mean(np.stack(found) > 8)
        assert mean <= TOLERANCE[name][0] and share <= TOLERANCE[name][1], f"{name}: {mean}, {share}"


# --- what the recipe may say -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "input.auto_augment={kind: trivial}",
            "there is no 'trivial': give trivial_augment, rand_augment or timm_rand_augment",
        ),
        ("input.auto_augment={kind: rand_augment, magnitude: 31}", "input.auto_augment.magnitude"),
        ("input.auto_augment={kind: rand_augment, num_op: 2}", "did you mean 'num_ops'?"),
        ("input.colour_jitter={hue: 0.6}", "input.colour_jitter.hue"),
        ("input.colour_jitter={color: 0.6}", "unknown key 'input.colour_jitter.color'"),
    ],
)
def test_a_wrong_key_or_value_is_named(override: str, told: str) -> None:
    with pytest.raises(LonghaulError, match=None) as refused:
        load_recipe("resnet50", [override])
    assert told in str(refused.value)


def test_a_recipe_without_distortions_feeds_none() -> None:
    assert num_inputs(Input(size=8, mean=(0, 0, 0), std=(1, 1, 1), crop=ResizedCrop())) == 0
