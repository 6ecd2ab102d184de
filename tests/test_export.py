"""`longhaul export`: what is written computes what the network does, or is not there."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from configs import LonghaulError
from configs.schema import Model
from data_pipeline.storage import parse_location
from launch.cli import app
from tests.workers import make_job, train
from trainer.atomic import replacing
from trainer.export.contents import Contents
from trainer.export.export import Comparison, compare, export
from trainer.export.form import Form, choose_form, library_name
from trainer.export.to_safetensors import load_safetensors
from trainer.export.to_timm import crop_pct, data_config
from trainer.models import build_model
from trainer.rundir import RunDirectory
from trainer.trained import Images, Trained, load_trained
from trainer.weights import choose_checkpoint


def load_run(run: RunDirectory) -> Trained:
    return load_trained(run, choose_checkpoint(run, None), "auto", torch.device("cpu"), 1)


@pytest.fixture(scope="module")
def resnet18_run(digits_run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Two steps of ResNet-18, which torchvision and timm have too, on digits enlarged to 36 pixels, cropped to 32."""
    data = next(e["data"] for e in digits_run.events() if e["event"] == "start")
    job = make_job(
        tmp_path_factory.mktemp("runs") / "resnet18", parse_location(data), "model={name: resnet18}", "duration=2it",
        "batch={size: 8, micro: 8}", "input.crop={kind: resized_crop}", "input.size=32", "input.eval_resize=36",
    )  # fmt: skip
    train(job, 1)
    return job.run


def write(trained: Trained, form: Form, out: Path, force: bool = False) -> list[str]:
    with Images().open(trained.run, "val") as split:
        return export(trained, form, split, out, 24, force)


def test_safetensors_hold_all_that_is_needed_to_build_the_network(digits_run: RunDirectory, tmp_path: Path) -> None:
    trained, out = load_run(digits_run), tmp_path / "deep" / "digits.safetensors"
    (found,) = write(trained, choose_form("safetensors"), out)
    assert "differ by at most 0 " in found and "24 of 24" in found
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    start = next(e for e in digits_run.events() if e["event"] == "start")
    assert metadata["recipe_sha256"] == start["recipe_sha256"] and metadata["step"] == "40"
    assert json.loads(metadata["classes"]) == [str(digit) for digit in range(10)]
    assert json.loads(metadata["input"])["mean"] == list(trained.recipe.input.mean)
    assert metadata["model"] == "cifar-resnet20" and metadata["weights"] == "plain" and metadata["longhaul_version"]
    again, images = load_safetensors(out), torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(again(images), trained.network(images))
    assert set(load_file(out)) == set(trained.network.state_dict())


def changed(path: Path, value: float) -> None:
    """One weight of a safetensors file changed."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors["layer2.0.conv1.weight"][3, 2, 1, 0] = value
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("value", [9.0, math.nan])
def test_a_changed_weight_is_found_and_the_file_removed(value: float, digits_run: RunDirectory, tmp_path: Path) -> None:
    form, out, trained = choose_form("safetensors"), tmp_path / "x.safetensors", load_run(digits_run)

    def tamper(contents: Contents, path: Path) -> None:
        form.write(contents, path)
        changed(path, value)

    tampered = dataclasses.replace(form, write=tamper)
    with pytest.raises(LonghaulError, match="is not the network, and was removed"):
        write(trained, tampered, out)
    assert list(tmp_path.iterdir()) == []
    write(trained, form, out)
    whole = out.read_bytes()
    with pytest.raises(LonghaulError, match="is not the network"):
        write(trained, tampered, out, force=True)
    assert out.read_bytes() == whole and list(tmp_path.iterdir()) == [out], "what was there before stands"


def test_a_file_cut_short_is_not_left_behind(digits_run: RunDirectory, tmp_path: Path) -> None:
    form = choose_form("safetensors")

    def cut(contents: Contents, path: Path) -> None:
        form.write(contents, path)
        path.write_bytes(path.read_bytes()[:-1000])

    with pytest.raises(Exception, match=r"(?i)incomplete|invalid|deserializ"):
        write(load_run(digits_run), dataclasses.replace(form, write=cut), tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_written_over_only_when_asked_to(digits_run: RunDirectory, tmp_path: Path) -> None:
    trained, form, out = load_run(digits_run), choose_form("safetensors"), tmp_path / "there"
    out.write_text("mine")
    with pytest.raises(LonghaulError, match="there exists: give --force"):
        write(trained, form, out)
    assert out.read_text() == "mine"
    write(trained, form, out, force=True)
    assert load_safetensors(out)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(LonghaulError, match="not an export of this form"):
        write(trained, form, folder, force=True)


def test_a_directory_with_other_files_is_never_written_over(resnet18_run: RunDirectory, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "thesis.tex"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(LonghaulError, match="not an export of this form"):
        write(load_run(resnet18_run), choose_form("timm"), tmp_path, force=True)
    assert len(list(tmp_path.iterdir())) == 3


def test_torchvision_loads_it_strictly(resnet18_run: RunDirectory, tmp_path: Path) -> None:
    trained, out = load_run(resnet18_run), tmp_path / "x.pth"
    write(trained, choose_form("torchvision"), out)
    theirs = torchvision.models.resnet18(num_classes=10)
    theirs.load_state_dict(torch.load(out, weights_only=True))
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(images), trained.network(images))


def test_timm_loads_it_and_sees_images_in_the_same_way(resnet18_run: RunDirectory, tmp_path: Path) -> None:
    trained, out = load_run(resnet18_run), tmp_path / "x-timm"
    compared, examined = write(trained, choose_form("timm"), out)
    assert "24 of 24" in compared and "levels of 255" in examined and "24 of 24" in examined
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert theirs.pretrained_cfg["label_names"] == [str(digit) for digit in range(10)]
    seen = timm.data.resolve_model_data_config(theirs)
    assert seen["mean"] == pytest.approx(trained.recipe.input.mean) and tuple(seen["input_size"]) == (3, 32, 32)
    assert math.floor(32 / seen["crop_pct"]) == 36 and seen["interpolation"] == "bilinear"
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), trained.network(images))


@pytest.mark.parametrize(("key", "value"), [("mean", [0.4, 0.4, 0.4]), ("interpolation", "nearest"), ("crop_pct", 0.8)])
def test_timm_told_to_see_images_differently_is_found(
    key: str, value: object, resnet18_run: RunDirectory, tmp_path: Path
) -> None:
    form = choose_form("timm")

    def tamper(contents: Contents, path: Path) -> None:
        form.write(contents, path)
        config = json.loads((path / "config.json").read_text())
        config["pretrained_cfg"][key] = value
        (path / "config.json").write_text(json.dumps(config))

    with pytest.raises(LonghaulError, match=f"in another way than the recipe: {key}"):
        write(load_run(resnet18_run), dataclasses.replace(form, write=tamper), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_pixels_of_another_resize_are_too_far_apart(
    resnet18_run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version of timm whose transform did not do what its configuration says."""
    made = partial(timm.data.create_transform)
    monkeypatch.setattr(timm.data, "create_transform", lambda **cfg: made(**{**cfg, "interpolation": "nearest"}))
    with pytest.raises(LonghaulError, match="levels of 255 from the recipe's"):
        write(load_run(resnet18_run), choose_form("timm"), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_onnx_runs_any_number_of_images(digits_run: RunDirectory, tmp_path: Path) -> None:
    trained, out = load_run(digits_run), tmp_path / "x.onnx"
    (found,) = write(trained, choose_form("onnx"), out)
    assert "24 of 24" in found
    model = onnx.load(out)
    assert [(o.domain, o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")] == [("", 20)]
    metadata = {item.key: item.value for item in model.metadata_props}
    assert json.loads(metadata["classes"])[9] == "9" and json.loads(metadata["input"])["size"] == 8
    assert str(Path.cwd()) not in str(model.graph.node), "nothing about the machine that it was made on"
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [("images", "tensor(float)", ["n", 3, 8, 8])]
    for count in (1, 2, 7):
        images = torch.randn(count, 3, 8, 8)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        with torch.no_grad():
            own = trained.network(images)
        torch.testing.assert_close(torch.from_numpy(logits), own, rtol=1e-4, atol=1e-4 * float(own.abs().max()))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Model(name="cifar-resnet20", shortcut="A"), "timm has no network like model.name=cifar-resnet20"),
        (Model(name="plain34"), "no network like model.name=plain34"),
        (Model(name="resnet18", shortcut="A"), "option B shortcuts and stride v1.5 only.*model.shortcut=A"),
        (Model(name="resnet50", stride="v1"), "and this one has model.stride=v1"),
        (Model(name="torchvision:vgg16"), "no network like model.name=torchvision:vgg16"),
    ],
)
def test_a_network_that_the_library_does_not_have_is_refused(model: Model, why: str) -> None:
    with pytest.raises(LonghaulError, match=rf"{why}.*: export it --to safetensors or onnx"):
        library_name(model, "timm")


def test_networks_that_libraries_have() -> None:
    assert library_name(Model(name="resnet18", stride="v1"), "torchvision") == "resnet18", (
        "no bottleneck, no difference"
    )
    assert library_name(Model(name="resnet152"), "timm") == "resnet152"
    assert library_name(Model(name="torchvision:vgg16"), "torchvision") == "vgg16"
    assert library_name(Model(name="timm:resnet50"), "torchvision") == "resnet50"


def test_timm_computes_a_bottleneck_network_from_the_same_weights() -> None:
    images = torch.randn(2, 3, 32, 32)  # torchvision's networks: tests/test_models.py
    own, theirs = build_model(Model(name="resnet50"), 7, seed=1).eval(), timm.create_model("resnet50", num_classes=7)
    theirs.load_state_dict(own.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(images), own(images), rtol=1e-4, atol=1e-5)


@given(st.integers(1, 1024).flatmap(lambda resize: st.tuples(st.integers(1, resize), st.just(resize))))
def test_timm_resizes_to_what_the_recipe_says(sizes: tuple[int, int]) -> None:
    size, resize = sizes
    assert math.floor(size / json.loads(json.dumps(crop_pct(size, resize)))) == resize
    assert crop_pct(size, None) == 1.0


def test_a_comparison_counts_what_differs(digits_run: RunDirectory) -> None:
    trained = load_run(digits_run)

    def shifted(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = trained.network(images)
        logits[:, 0] += 0.5
        return logits

    with Images().open(trained.run, "val") as split:
        found = compare(trained, shifted, split, 1000)
    assert found.num_images == 355 and found.deviation == pytest.approx(0.5, rel=1e-3) and not found.holds
    assert Comparison(9, 0.009, 100.0, 9).holds and not Comparison(9, 0.02, 100.0, 9).holds
    assert not Comparison(9, math.nan, 100.0, 9).holds


def test_the_place_of_what_fails_is_left_as_it_was(tmp_path: Path) -> None:
    def fill(path: Path, text: str, folder: bool, fail: bool) -> None:
        with replacing(path) as temporary:
            if folder:
                temporary.mkdir()
            (temporary / "f" if folder else temporary).write_text(text)
            if fail:
                raise KeyboardInterrupt

    for folder, read in ((False, lambda p: p.read_text()), (True, lambda p: (p / "f").read_text())):
        path = tmp_path / str(folder) / "x.y"
        fill(path, "one", folder, fail=False)
        with pytest.raises(KeyboardInterrupt):
            fill(path, "two", folder, fail=True)
        assert read(path) == "one"
        fill(path, "three", folder, fail=False)
        assert read(path) == "three" and list(path.parent.iterdir()) == [path]


@pytest.fixture
def longhaul() -> Callable[..., str]:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments))
        if result.exception is not None:
            raise result.exception
        return re.sub(r"\s+", " ", result.output)

    return run


def test_the_command(digits_run: RunDirectory, tmp_path: Path, longhaul: Callable[..., str]) -> None:
    checkpoint = next(digits_run.checkpoints.glob("step-*"))
    out = tmp_path / "net.safetensors"
    said = longhaul("export", str(checkpoint), "--to", "safetensors", "--out", str(out), "--threads", "1")
    assert "64 of 64 images" in said and f'load_file("{out}")' in said and out.is_file()
    with pytest.raises(LonghaulError, match="--to tflite: it is safetensors, onnx, torchvision or timm"):
        longhaul("export", str(checkpoint), "--to", "tflite")
    with pytest.raises(LonghaulError, match="--weights best: it is auto, plain or ema"):
        longhaul("export", str(checkpoint), "--to", "onnx", "--weights", "best")
    with pytest.raises(LonghaulError, match="the recipe keeps none"):
        longhaul("export", str(checkpoint), "--to", "safetensors", "--weights", "ema")
    with pytest.raises(LonghaulError, match="torchvision has no network like"):
        longhaul("export", str(checkpoint), "--to", "torchvision", "--out", str(tmp_path / "y"))
    assert list(tmp_path.iterdir()) == [out]


def test_images_that_are_not_resized_are_taken_whole() -> None:
    from configs import load_recipe

    assert data_config(load_recipe("digits").input)["crop_pct"] == 1.0
    assert data_config(load_recipe("resnet50").input)["crop_pct"] == 0.875
