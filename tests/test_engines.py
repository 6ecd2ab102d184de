"""Every engine computes the same; any of them goes on from a checkpoint of any other."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs import LonghaulError, load_recipe
from tests import engines, workers
from tests.engines import trained
from tests.workers import different, final_state, in_processes, make_job
from trainer.dealing import deal
from trainer.engines.tree import Node, combine, cover, middle
from trainer.verify import verify

# --- the matrix --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_any_engine_goes_on_from_any_other_to_the_same_bits(precision: str, tmp_path: Path) -> None:
    for found in in_processes(2, engines.crossings, tmp_path, list(engines.ENGINES), precision):
        assert len(found) == 6 + 36
        assert not any(found.values()), found


# --- the tree ----------------------------------------------------------------------------------------------------


def tree_sum(node: Node, leaves: list[float]) -> float:
    if node[1] - node[0] == 1:
        return leaves[node[0]]
    half = middle(node)
    return tree_sum((node[0], half), leaves) + tree_sum((half, node[1]), leaves)


@given(st.data(), st.integers(1, 40))
def test_every_number_of_ranks_sums_along_the_same_tree(data: st.DataObject, num_micro: int) -> None:
    world_size = data.draw(st.integers(1, num_micro))
    leaves = data.draw(st.lists(st.floats(-1e6, 1e6), min_size=num_micro, max_size=num_micro))
    root = (0, num_micro)
    parts = {}
    for rank in range(world_size):
        share = deal(num_micro, world_size, rank)
        nodes = cover(root, share)
        assert [leaf for node in nodes for leaf in range(*node)] == list(share)
        parts |= {node: torch.tensor(tree_sum(node, leaves), dtype=torch.float64) for node in nodes}
    assert combine(root, parts).item() == tree_sum(root, leaves)


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 48])  # 4 and 6 micro-batches
def test_reproducible_mode_has_the_same_bits_on_any_number_of_workers(size: int) -> None:
    shape = (f"batch.size={size}", "batch.micro=8", "precision=bf16")
    (alone,), _ = trained(1, *shape, "reproducible=true")
    (plain,), _ = trained(1, *shape)
    for world_size in (2, 3, 4):
        (found,), _ = trained(world_size, *shape, "reproducible=true")
        assert different(found, alone) == []
        (spread,), _ = trained(world_size, *shape)
        assert world_size > 2 or different(spread, plain), "without it the order of summation shows"
        for name, tensor in plain.items():
            torch.testing.assert_close(spread[name], tensor, rtol=0.05, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "sequence"), [(64, (2, 4, 1, 3)), (96, (4, 1, 3, 2))])
def test_a_run_on_changing_numbers_of_workers_ends_with_the_same_bits(
    size: int, sequence: tuple[int, ...], digits: Path, tmp_path: Path
) -> None:
    """M = 4 and 6; stopped and gone on with, on another number of workers each time."""
    overrides = (f"batch.size={size}", "batch.micro=16", "reproducible=true", "duration=40it", "evaluate.every=40it")
    undisturbed = make_job(tmp_path / "one", digits, *overrides)
    workers.train(undisturbed, 1)
    job = make_job(tmp_path / "many", digits, *overrides)
    for attempt, world_size in enumerate(sequence[:-1], start=1):
        processes = workers.start(job, world_size)
        workers.wait_for(lambda a=attempt: any(e["event"] == "step" and e["attempt"] == a for e in job.run.events()))
        job.run.stop_file.touch()
        assert workers.wait(processes) == [0] * world_size
    workers.train(job, sequence[-1])
    assert [e["world_size"] for e in job.run.events() if e["event"] == "start"] == list(sequence)
    assert different(final_state(job.run), final_state(undisturbed.run)) == []
    assert all(finding.holds for finding in verify(job.run))


# --- sharded weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ("precision=fp16", "gradients.clip_norm=1.0", "ema={decay: 0.9}", "batch.size=48", "batch.micro=16"),
        ("precision=fp32", "optimizer={kind: lars}"),
        ("precision=fp32", "optimizer={kind: lamb}"),
    ],
)
def test_sharded_weights_are_clipped_adapted_and_averaged_as_whole_ones(overrides: tuple[str, ...]) -> None:
    """Norms over pieces are sums in another order, so not the same bits. M = 3 on two workers does not divide."""
    whole, healthy = trained(2, *overrides)
    sharded, health = trained(2, *overrides, "engine=fsdp2")
    assert health.num_skipped == healthy.num_skipped and health.loss_scale == healthy.loss_scale
    tolerance = 0.02 if "precision=fp16" in overrides else 0.002
    assert health.gradient_norm == pytest.approx(healthy.gradient_norm, rel=tolerance)
    for one, other in zip(whole, sharded, strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=tolerance, atol=tolerance)


def test_a_gradient_that_is_not_finite_changes_nothing_of_sharded_weights() -> None:
    options = ("precision=fp32", "engine=fsdp2", "ema={decay: 0.9}")
    (before, _), _ = trained(2, *options, steps=3)
    (kept, _), health = trained(2, *options, poison=(3,))
    (good, _), _ = trained(2, *options)
    assert health.num_skipped == 1
    assert different(kept, before) == [] and different(good, before)


# --- what a user types -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["engine=zero"], ["engine.name", "'ddp', 'fsdp2' or 'deepspeed'"]),
        (["engine=fsdp2", "engine.zero_stage=1"], ["engine.zero_stage would have no effect", "engine.name=deepspeed"]),
        (["engine=fsdp2", "reproducible=true"], ["reproducible=true needs engine.name=ddp"]),
        (["engine=deepspeed", "compile=default"], ["compile=default needs engine.name=ddp"]),
        (["engine.reduce=bf16", "reproducible=true"], ["needs engine.reduce=fp32"]),
        (["reproducible=true", "deterministic=false"], ["implies deterministic=true"]),
    ],
)
def test_what_an_engine_cannot_do_is_refused(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(LonghaulError) as refused:
        load_recipe("digits", overrides)
    assert all(word in str(refused.value) for word in words)


def test_an_engine_may_be_given_by_its_name_alone(tmp_path: Path) -> None:
    recipe = load_recipe("digits", ["engine=deepspeed", "engine.zero_stage=3"])
    assert (recipe.engine.name, recipe.engine.zero_stage) == ("deepspeed", 3)
    (tmp_path / "own.yaml").write_text("extends: digits\nengine: fsdp2\nreproducible: false\n")
    assert load_recipe(str(tmp_path / "own.yaml"), []).engine.name == "fsdp2"
    assert load_recipe("digits", ["reproducible=true"]).deterministic
