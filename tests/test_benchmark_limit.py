"""The C loop that the data benchmark calls the limit makes the pixels that Pillow makes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.data.limit import SIZE, build, crop
from benchmarks.data.peers.common import MEAN, STD

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None
    or not Path("/usr/include/jpeglib.h").exists()
    or "avx2" not in Path("/proc/cpuinfo").read_text(),
    reason="needs gcc, libjpeg-turbo's header and AVX2",
)
# (x, y, width, height): smaller and larger than 224, on and off MCU boundaries, at the edges.
BOXES = (
    (0, 0, 640, 480),
    (33, 17, 401, 390),
    (5, 3, 100, 131),
    (340, 101, 300, 379),
    (128, 64, 224, 224),
    (7, 9, 9, 7),
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("limit"))


@pytest.fixture(scope="module", params=("4:2:0", "4:4:4", "grey"))
def jpeg(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth shapes and a little noise, 640 x 480."""
    y, x = np.mgrid[0:480, 0:640]
    waves = np.stack([np.sin(x / 23 + y / 61), np.sin(x / 47 - y / 31), np.sin((x - 300) * (y - 200) / 9000)], axis=2)
    noise = np.random.default_rng(0).normal(0, 6, waves.shape)
    image = Image.fromarray(np.clip(128 + 100 * waves + noise, 0, 255).astype(np.uint8))
    path = tmp_path_factory.mktemp("jpeg") / "image.jpg"
    if request.param == "grey":
        image.convert("L").save(path, quality=92)
    else:
        image.save(path, quality=92, subsampling=request.param)
    return path


def pillow(jpeg: Path, box: tuple[int, int, int, int]) -> np.ndarray:
    x, y, width, height = box
    image = Image.open(jpeg).convert("RGB").crop((x, y, x + width, y + height))
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("box", BOXES)
def test_antialiased_pixels_are_pillows(program: Path, jpeg: Path, box: tuple[int, int, int, int]) -> None:
    ours, theirs = crop(program, jpeg, "antialias", "uint8", box, flip=False), pillow(jpeg, box)
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    # Fancy upsampling lacks its neighbours where the decoded region begins and ends: a few columns may differ by more.
    assert difference.mean() < 0.25
    assert np.percentile(difference, 95) <= 1


def test_flip_mirrors(program: Path, jpeg: Path) -> None:
    straight, flipped = (crop(program, jpeg, "antialias", "uint8", BOXES[1], flip=f) for f in (False, True))
    assert np.array_equal(straight[:, ::-1], flipped)


@pytest.mark.parametrize("work", ("bilinear", "antialias"))
def test_floats_are_the_bytes_normalised(program: Path, jpeg: Path, work: str) -> None:
    pixels, floats = (crop(program, jpeg, work, kind, BOXES[1], flip=True) for kind in ("uint8", "float32"))
    assert np.abs((floats * np.array(STD) + np.array(MEAN)) * 255 - pixels).max() <= 0.51


def test_bilinear_takes_two_taps(program: Path, jpeg: Path) -> None:
    x, y, width, height = box = BOXES[0]
    image = np.asarray(Image.open(jpeg).convert("RGB")).astype(float)[y : y + height, x : x + width]

    def sample(pixels: np.ndarray, axis: int) -> np.ndarray:
        at = np.clip((np.arange(SIZE) + 0.5) * pixels.shape[axis] / SIZE - 0.5, 0, None)
        low = np.floor(at).astype(int)
        weight = (at - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        high = np.minimum(low + 1, pixels.shape[axis] - 1)
        return pixels.take(low, axis) * (1 - weight) + pixels.take(high, axis) * weight

    expected = sample(sample(image, 0), 1)
    difference = np.abs(crop(program, jpeg, "bilinear", "uint8", box, flip=False) - expected)
    assert difference.max() <= 1
