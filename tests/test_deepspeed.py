"""DeepSpeed: its configuration, and that its engine computes what DDP computes, to the bit."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import LonghaulError, Recipe
from tests.workers import different, in_processes, small_recipe, state_of
from trainer.checkpoints.files import load
from trainer.checkpoints.manifest import Saved, newest_valid
from trainer.checkpoints.saver import Checkpointer
from trainer.checkpoints.state import empty_like
from trainer.checkpoints.store import DirectoryStore
from trainer.dealing import deal
from trainer.engines import Engine, build_engine
from trainer.engines.deepspeed_config import deepspeed_config
from trainer.group import Group, Rendezvous, free_port, join
from trainer.rundir import RunDirectory

State = dict[str, torch.Tensor]

STAGES = ("zero0", "zero1", "zero2", "zero3")
GOES_ON = (
    ("ddp", "zero1"), ("ddp", "zero3"), ("zero1", "zero0"), ("zero2", "zero3"), ("zero3", "zero2"), ("zero3", "ddp"),
    ("alone", "zero1"), ("alone", "zero3"),
)  # fmt: skip
"""Whose checkpoint, after two steps, is gone on with by whom; `alone` is one worker."""


# --- the configuration -------------------------------------------------------------------------------------------


def config_with(**own: Any) -> dict[str, Any]:
    recipe = small_recipe("engine=deepspeed")
    engine = recipe.engine.model_copy(update={"deepspeed": own})
    return deepspeed_config(recipe.model_copy(update={"engine": engine}), 1000)


def test_the_users_own_configuration_is_merged_in() -> None:
    config = config_with(comms_logger={"enabled": True}, zero_optimization={"overlap_comm": True})
    assert config["comms_logger"] == {"enabled": True}
    assert config["zero_optimization"]["overlap_comm"] is True
    assert config["zero_optimization"]["stage"] == 1
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("reduce", ["fp32", "bf16"])
def test_stage_and_precision_come_from_the_recipe(stage: int, reduce: str) -> None:
    recipe = small_recipe("engine=deepspeed", f"engine.zero_stage={stage}", f"engine.reduce={reduce}")
    config = deepspeed_config(recipe, 1000)
    assert config["zero_optimization"]["stage"] == stage
    assert config["communication_data_type"] == reduce
    assert config["gradient_clipping"] == 0.0  # DeepSpeed's default is 1


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"zero_optimisation": {}}, r"engine.deepspeed.zero_optimisation .*did you mean 'zero_optimization'\?"),
        ({"train_batch_size": 64}, r"engine.deepspeed.train_batch_size cannot be set, batch.size decides it: leave"),
        ({"gradient_clipping": 1.0}, r"gradients.clip_norm decides it"),
        ({"bf16": {"enabled": True}}, r"engine.deepspeed.bf16 .*precision"),
        ({"zero_optimization": {"stage": 2}}, r"zero_optimization.stage cannot be set, engine.zero_stage decides it"),
        ({"zero_optimization": {"overlap_com": True}}, r"overlap_com .*did you mean 'overlap_comm'\?"),
        ({"zero_optimization": {"offload_optimizer": {}}}, r"offload_optimizer cannot be set, .*on the device"),
        ({"zero_optimization": 2}, r"zero_optimization must hold keys and values, and it is 2\.$"),
        ({"elasticity": {}}, r"engine.deepspeed.elasticity is not among DeepSpeed's keys that can be set"),
    ],
)
def test_what_the_recipe_decides_or_nobody_knows_is_refused(own: dict[str, Any], message: str) -> None:
    with pytest.raises(LonghaulError, match=message):
        config_with(**own)


# --- the engine --------------------------------------------------------------------------------------------------


def recipe_for(kind: str, precision: str, *overrides: str) -> Recipe:
    engine = [f"engine={kind}"]
    if kind.startswith("zero"):
        engine = ["engine=deepspeed", f"engine.zero_stage={kind[-1]}"]
    return small_recipe(f"precision={precision}", *engine, *overrides)


def micro_batch(recipe: Recipe, step: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + micro)
    images = torch.randn(recipe.batch.micro, 3, 8, 8, generator=generator)
    labels = torch.randint(0, 10, (recipe.batch.micro,), generator=generator)
    return images.contiguous(memory_format=torch.channels_last), labels


def train(engine: Engine, recipe: Recipe, group: Group, steps: range, spoilt: bool = False) -> float:
    """Returns the sum of this rank's losses; `spoilt` makes one pixel of the last rank's images NaN."""
    total = 0.0
    for step in steps:
        for micro in deal(recipe.batch.num_micro, group.world_size, group.rank):
            images, labels = micro_batch(recipe, step, micro)
            if spoilt and group.rank == group.world_size - 1:
                images[0, 0, 0, 0] = torch.nan
            total += float(engine.forward_backward(images, labels, step, micro)[0])
        engine.update(step, 0.05)
    return total


def save(engine: Engine, place: Path, group: Group) -> State:
    """Save into `place`, and return all that is in the checkpoint."""
    failed: list[str] = []
    engine.synchronise_buffers()
    saver = Checkpointer(
        DirectoryStore(place), group, 1, lambda _: [], lambda *_: None, lambda _, why: failed.append(why)
    )
    saver.save(1, engine.export_state(), {})
    saver.close()
    group.barrier()
    assert not failed
    return state_of(saved_in(place))


def saved_in(place: Path) -> Saved:
    saved = newest_valid(DirectoryStore(place))
    assert saved is not None
    return saved


def resume(engine: Engine, place: Path, group: Group) -> None:
    state = empty_like(engine.export_state())
    load(saved_in(place), state, group)
    engine.import_state(state)


@contextmanager
def joined() -> Iterator[Group]:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    with join(Rendezvous.from_environment(), torch.device("cpu"), 60) as group:
        yield group


def both_ways(place: Path, precision: str) -> dict[str, list[str]]:
    """As one of two workers: DDP and every stage from the start, and then from the middle of another's run. Returns the
    tensors that are not what DDP's uninterrupted run gave, by what was done."""
    found = {}
    with joined() as group:
        target: State = {}
        engines = {}
        for kind in ("ddp", *STAGES):
            recipe = recipe_for(kind, precision)
            engines[kind] = engine = build_engine(recipe, 1000, 10, group)
            train(engine, recipe, group, range(2))
            save(engine, place / kind, group)
            train(engine, recipe, group, range(2, 4))
            state = save(engine, place / f"{kind}-end", group)
            target = target or state
            found[kind] = different(state, target)
        for source, kind in GOES_ON:
            resume(engines[kind], place / source, group)
            train(engines[kind], recipe_for(kind, precision), group, range(2, 4))
            found[f"{source} to {kind}"] = different(save(engines[kind], place / f"{source}-{kind}", group), target)
    return found


def one_worker_begins(place: Path, precision: str) -> None:
    with joined() as group:
        recipe = recipe_for("zero3", precision)
        engine = build_engine(recipe, 1000, 10, group)
        train(engine, recipe, group, range(2))
        save(engine, place / "alone", group)


def one_worker_goes_on(place: Path, precision: str) -> dict[str, list[str]]:
    found = {}
    with joined() as group:
        target = state_of(saved_in(place / "ddp-end"))
        for kind in STAGES:
            recipe = recipe_for(kind, precision)
            engine = build_engine(recipe, 1000, 10, group)
            resume(engine, place / kind, group)
            train(engine, recipe, group, range(2, 4))
            found[kind] = different(save(engine, place / f"{kind}-alone", group), target)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16"])  # tests/test_engines.py has all pairs in both
def test_all_stages_give_ddps_bits_whatever_they_go_on_from(precision: str, tmp_path: Path) -> None:
    in_processes(1, one_worker_begins, tmp_path, precision)
    told = [*in_processes(2, both_ways, tmp_path, precision), *in_processes(1, one_worker_goes_on, tmp_path, precision)]
    for found in told:
        assert {"zero1", "zero2", "zero3"} < found.keys()
        assert {how: names for how, names in found.items() if names} == {}


def closely(place: Path) -> dict[str, Any]:
    """As one of two workers: by case and kind, the largest difference from DDP of anything in a checkpoint, what a NaN
    changed, and what the network says."""
    cases = {
        "uneven": ("batch.size=96",),
        "clipped, averaged": ("gradients.clip_norm=0.5", "ema={decay: 0.9}"),
        "fp16": ("precision=fp16", "loss_scale={initial: 1024, growth_steps: 2}"),
        "bf16 on the wire": ("engine.reduce=bf16",),
        "lars": ("optimizer={kind: lars}",),
        "lamb": ("optimizer={kind: lamb}",),
    }
    found: dict[str, Any] = {}
    with joined() as group:
        for case, overrides in cases.items():
            target: State = {}
            # LARS and LAMB take norms of parts here: a last bit differs, and from there on the network is chaotic.
            steps = range(1) if case in ("lars", "lamb") else range(3)
            for kind in ("ddp", *STAGES):
                recipe = recipe_for(kind, "fp32", *overrides)
                engine = build_engine(recipe, 1000, 10, group)
                train(engine, recipe, group, steps)
                state = save(engine, place / f"{case}-{kind}", group)
                target = target or state
                assert state.keys() == target.keys()
                found[f"{case} {kind}"] = max(
                    float((state[n].double() - target[n].double()).abs().max()) for n in state
                )
        for kind in STAGES:
            recipe = recipe_for(kind, "fp32")
            engine = build_engine(recipe, 1000, 10, group)
            train(engine, recipe, group, range(1))
            before = save(engine, place / f"{kind}-before", group)
            train(engine, recipe, group, range(1, 2), spoilt=True)
            changed = different(save(engine, place / f"{kind}-after", group), before)
            losses = train(engine, recipe, group, range(2, 4))
            found[f"spoilt {kind}"] = (changed, engine.health().num_skipped, losses)
            engine.synchronise_buffers()
            with engine.evaluating(ema=False) as network:
                logits = network(micro_batch(recipe, 0, 0)[0])
            found[f"evaluated {kind}"] = float(logits.sum())
    return found


@pytest.fixture(scope="module")
def close(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found, other = in_processes(2, closely, tmp_path_factory.mktemp("close"))
    assert {name: value for name, value in found.items() if not name.startswith("spoilt")} == {
        name: value for name, value in other.items() if not name.startswith("spoilt")
    }
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize(
    ("case", "bound"),
    [
        ("uneven", 1e-5),
        ("clipped, averaged", 1e-6),
        ("fp16", 0.0),
        ("bf16 on the wire", 1e-3),
        ("lars", 1e-6),
        ("lamb", 1e-6),
    ],
)
def test_every_stage_computes_what_ddp_computes(kind: str, case: str, bound: float, close: dict[str, Any]) -> None:
    assert close[f"{case} {kind}"] <= bound


@pytest.mark.slow
@pytest.mark.parametrize("kind", STAGES)
def test_a_gradient_that_is_not_finite_changes_nothing(kind: str, close: dict[str, Any]) -> None:
    changed, skipped, losses = close[f"spoilt {kind}"]
    assert changed == ["guard.skipped", "guard.streak"]
    assert skipped == 1
    assert losses == losses  # not NaN: the steps after it trained
    assert close[f"evaluated {kind}"] == close["evaluated zero0"]


def refused(*overrides: str) -> str:
    with joined() as group, pytest.raises(LonghaulError) as caught:
        build_engine(small_recipe("engine=deepspeed", *overrides), 1000, 10, group)
    return str(caught.value)


@pytest.mark.slow
def test_a_value_that_deepspeed_refuses_is_told_in_one_sentence() -> None:
    own = "engine.deepspeed={zero_optimization: {reduce_bucket_size: many}}"
    message = in_processes(1, refused, own)[0]
    assert re.search(r"^engine.deepspeed: .*reduce_bucket_size.*\.$", message)
    assert "\n" not in message


@pytest.mark.slow
def test_under_deepspeeds_launcher_with_options_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "extends: digits\nduration: 6it\nevaluate: {every: 6it}\n"
        "engine:\n  name: deepspeed\n  zero_stage: 2\n  deepspeed:\n    comms_logger: {enabled: true, verbose: false}\n"
        "    flops_profiler: {enabled: true, profile_step: 2, output_file: flops.txt}\n"
    )
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--quiet", "--num_gpus", "2", "--no_local_rank"]
    longhaul = ["launch.cli", "train", "mine.yaml", "--name", "demo", "--device", "cpu", "--threads", "1"]
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [*launcher, "--master_port", str(free_port()), "--module", *longhaul],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    events = list(RunDirectory(tmp_path / "runs" / "demo").events())
    assert next(len(event["workers"]) for event in events if event["event"] == "start") == 2
    assert events[-1]["event"] == "finished"
    assert "Flops Profiler" in (tmp_path / "flops.txt").read_text()
