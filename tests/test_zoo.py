"""Networks of torchvision and timm: theirs to the key, drawn from the seed, never downloaded; refused in a sentence."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from configs import LonghaulError, load_recipe
from configs.schema import Model
from trainer.count import without_memory
from trainer.models import build_model


def built(name: str, seed: int = 0, **options: object) -> nn.Module:
    return build_model(Model(name=name, **options), 7, seed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["torchvision:vgg11_bn", "torchvision:googlenet", "torchvision:squeezenet1_1", "timm:resnet10t"]
)
def test_keys_and_shapes_are_the_librarys_own(name: str) -> None:
    library, architecture = name.split(":")
    with torch.device("meta"):
        if library == "timm":
            theirs = timm.create_model(architecture, num_classes=7)
        else:
            theirs = torchvision.models.get_model(architecture, num_classes=7)
    ours = without_memory(Model(name=name), 7)
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]


@pytest.mark.parametrize("name", ["torchvision:shufflenet_v2_x0_5", "timm:resnet10t", "timm:test_vit"])
def test_the_seed_decides_the_weights_and_the_global_generators_stay(name: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = built(name, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = built(name, seed=5).state_dict(), built(name, seed=6).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(("name", "auxiliary"), [("googlenet", 2), ("inception_v3", 1)])
def test_auxiliary_classifiers_speak_in_training_alone(name: str, auxiliary: int) -> None:
    model = without_memory(Model(name=f"torchvision:{name}"), 7)
    images = torch.empty(2, 3, 299, 299, device="meta")
    outputs = model.train()(images)
    assert isinstance(outputs, tuple) and [o.shape for o in outputs] == [(2, 7)] * (1 + auxiliary)
    assert model.eval()(images).shape == (2, 7)
    assert model.transform_input is False


def test_the_first_output_of_a_network_with_auxiliary_classifiers_is_its_own() -> None:
    model = built("torchvision:googlenet").train()
    model.get_submodule("dropout").p = 0.0  # type: ignore[assignment]
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images)[0], model.eval()(images))


def test_no_network_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    for name in ("torchvision:mnasnet0_5", "timm:resnet10t"):
        built(name)


def test_stochastic_depth_is_handed_to_timm() -> None:
    rates = [
        module.drop_prob for module in built("timm:resnet10t", drop_path=0.3).modules() if hasattr(module, "drop_prob")
    ]
    assert rates == pytest.approx([0.1, 0.2, 0.3])  # the first of four blocks has none
    with pytest.raises(LonghaulError, match=r"model\.drop_path=0\.3: timm:vgg11 has none; leave it out, or give 0\."):
        built("timm:vgg11", drop_path=0.3)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("torchvision:vgg17", r"torchvision has no classifier 'vgg17' \(did you mean 'vgg1\d'\?\)\."),
        ("torchvision:fcn_resnet50", r"torchvision:fcn_resnet50 does not classify images: "),
        ("torchvision:fasterrcnn_resnet50_fpn", "does not classify images"),
        ("torchvision:r3d_18", "does not classify images"),
        ("timm:resnet50dd", r"timm has no model 'resnet50dd' \(did you mean 'resnet50d'\?\)\."),
        ("timm:hf-hub:timm/resnet50.a1_in1k", "timm has no model 'hf-hub:timm/resnet50.a1_in1k'"),
        ("timm:resnet50.a1_in1k", "'a1_in1k' names pretrained weights, .*: give timm:resnet50"),
        ("timm:qwen3_vit_88m_enc", "timm:qwen3_vit_88m_enc has no classifier"),
        ("keras:resnet50", "model.name=keras:resnet50: the libraries are torchvision and timm"),
    ],
)
def test_what_is_no_classifier_is_refused_in_a_sentence(name: str, sentence: str) -> None:
    with pytest.raises(LonghaulError, match=sentence) as refused:
        without_memory(Model(name=name), 7)
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)


IDLE = [
    ("timm:resnet50d", "stride=v1"),
    ("timm:resnet50d", "shortcut=A"),
    ("timm:resnet50d", "zero_init_gamma=true"),
    ("torchvision:resnet50", "drop_path=0.1"),
    ("plain18", "drop_path=0.1"),
    ("cifar-plain20", "zero_init_gamma=true"),
]


@pytest.mark.parametrize(("name", "option"), IDLE)
def test_an_option_without_effect_is_refused_with_the_mend(name: str, option: str) -> None:
    key, value = option.split("=")
    mend = {"stride": "v1.5", "shortcut": "B", "zero_init_gamma": "false", "drop_path": "0.0"}[key]
    with pytest.raises(LonghaulError) as refused:
        load_recipe("paper-resnet50", [f"model={{name: '{name}', {key}: {value}}}"])
    assert f"model.{option} would have no effect on the network {name}" in str(refused.value)
    assert f"give model.{key}={mend} " in str(refused.value)


def test_what_recipes_hand_on_is_borne() -> None:
    assert load_recipe("cifar10-resnet20", ["model.name=cifar-plain20"]).model.shortcut == "A"
    assert load_recipe("paper-resnet50", ["model.name=resnet34"]).model.stride == "v1"
    # The resolved recipe of a run writes every default out, and is read again.
    assert Model(**Model(name="timm:resnet50d").model_dump()).name == "timm:resnet50d"
