"""Losses are torch's and timm's, for labels and for mixed targets; auxiliary classifiers count with their weight."""

import pytest
import timm.data.mixup
import timm.loss
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from configs.optimisation import BinaryCrossEntropy, CrossEntropy
from trainer.losses import build_loss, main_logits

SMOOTHING = pytest.mark.parametrize("smoothing", [0.0, 0.1])


def drawn(seed: int, batch: int = 6, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels, and distributions over two classes at most."""
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, classes, generator=random)
    labels = torch.randint(classes, (batch,), generator=random)
    share = torch.rand(batch, 1, generator=random)
    hot = nn.functional.one_hot(labels, classes)
    return logits, labels, share * hot + (1 - share) * hot.flip(0)


@SMOOTHING
def test_cross_entropy_is_torchs(smoothing: float) -> None:
    logits, labels, mixed = drawn(0)
    loss, theirs = build_loss(CrossEntropy(label_smoothing=smoothing)), nn.CrossEntropyLoss(label_smoothing=smoothing)
    for targets in (labels, mixed):
        assert torch.equal(loss(logits, targets), theirs(logits, targets))


@SMOOTHING
@pytest.mark.parametrize("threshold", [None, 0.0, 0.2, 0.5])
def test_binary_cross_entropy_is_timms_for_labels(smoothing: float, threshold: float | None) -> None:
    logits, labels, _ = drawn(1)
    loss = build_loss(BinaryCrossEntropy(label_smoothing=smoothing, target_threshold=threshold))
    theirs = timm.loss.BinaryCrossEntropy(smoothing=smoothing, target_threshold=threshold)
    torch.testing.assert_close(loss(logits, labels), theirs(logits, labels))


@SMOOTHING
@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("share", [0.0, 0.15, 0.5, 0.7, 1.0])
def test_binary_cross_entropy_of_mixed_targets_is_what_timm_makes_of_them(
    smoothing: float, threshold: float | None, share: float
) -> None:
    # timm smooths mixed targets as it makes them, and not in the loss; ours come without smoothing.
    logits, labels, _ = drawn(2)
    hot = nn.functional.one_hot(labels, 7).float()
    mixed = share * hot + (1 - share) * hot.flip(0)
    smoothed = timm.data.mixup.mixup_target(labels, 7, share, smoothing)
    theirs = timm.loss.BinaryCrossEntropy(smoothing=smoothing, target_threshold=threshold)
    loss = build_loss(BinaryCrossEntropy(label_smoothing=smoothing, target_threshold=threshold))
    torch.testing.assert_close(loss(logits, mixed), theirs(logits, smoothed))


@pytest.mark.parametrize("config", [CrossEntropy(label_smoothing=0.1), BinaryCrossEntropy(label_smoothing=0.1)])
@given(seed=st.integers(0, 1000))
def test_a_label_is_the_distribution_that_is_all_on_it(config: CrossEntropy | BinaryCrossEntropy, seed: int) -> None:
    logits, labels, _ = drawn(seed)
    loss = build_loss(config)
    torch.testing.assert_close(loss(logits, labels), loss(logits, nn.functional.one_hot(labels, 7).float()))


@pytest.mark.parametrize("kind", [CrossEntropy, BinaryCrossEntropy])
def test_auxiliary_classifiers_count_with_their_weight(kind: type[CrossEntropy] | type[BinaryCrossEntropy]) -> None:
    loss = build_loss(kind(auxiliary=0.25))
    (main, labels, _), (first, *_), (second, *_) = drawn(3), drawn(4), drawn(5)
    expected = loss(main, labels) + 0.25 * (loss(first, labels) + loss(second, labels))
    torch.testing.assert_close(loss((main, first, second), labels), expected)
    assert torch.equal(loss((main,), labels), loss(main, labels))
    assert main_logits((main, first, second)) is main and main_logits(main) is main


def test_a_real_network_with_auxiliary_classifiers_trains_all_of_them() -> None:
    network = torchvision.models.googlenet(num_classes=5, aux_logits=True, init_weights=False).train()
    outputs = network(torch.randn(2, 3, 32, 32))
    labels = torch.tensor([1, 3])
    loss = build_loss(CrossEntropy())(outputs, labels)
    parts = [nn.functional.cross_entropy(logits, labels) for logits in outputs]
    torch.testing.assert_close(loss, parts[0] + 0.3 * (parts[1] + parts[2]))
    loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert main_logits(outputs) is outputs.logits


@pytest.mark.parametrize("config", [CrossEntropy(), BinaryCrossEntropy()])
def test_the_loss_of_half_precision_logits_is_taken_in_float32(config: CrossEntropy | BinaryCrossEntropy) -> None:
    logits, labels, _ = drawn(6)
    loss = build_loss(config)
    found = loss((logits.bfloat16(), logits.bfloat16()), labels)
    rounded = logits.bfloat16().float()
    assert found.dtype == torch.float32 and found.shape == ()
    assert torch.equal(found, loss((rounded, rounded), labels))
