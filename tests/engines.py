"""Engines driven step by step in real process groups, without data: what the tests of engines have in common."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from configs import Recipe
from tests.workers import different, in_processes, small_recipe, state_of
from trainer.checkpoints.files import load, write
from trainer.checkpoints.manifest import FORMAT, Saved, checkpoint_name, open_checkpoint, render
from trainer.checkpoints.state import empty_like
from trainer.checkpoints.store import DirectoryStore
from trainer.dealing import deal
from trainer.engines import Engine, build_engine
from trainer.gradients import Health
from trainer.group import Group, Rendezvous, join

ENGINES = {
    "ddp": ("engine=ddp",),
    "fsdp2": ("engine=fsdp2",),
    "zero0": ("engine=deepspeed", "engine.zero_stage=0"),
    "zero1": ("engine=deepspeed", "engine.zero_stage=1"),
    "zero2": ("engine=deepspeed", "engine.zero_stage=2"),
    "zero3": ("engine=deepspeed", "engine.zero_stage=3"),
}


def build(group: Group, *overrides: str) -> tuple[Recipe, Engine]:
    """An engine of the small recipe, for 1,442 samples of 10 classes."""
    recipe = small_recipe(*overrides)
    return recipe, build_engine(recipe, 1442, 10, group)


def train(recipe: Recipe, engine: Engine, group: Group, steps: range, poison: Sequence[int] = ()) -> None:
    """Updates on images that are a function of step and micro-batch; those of the steps in `poison` are not finite."""
    for step in steps:
        for micro in deal(recipe.batch.num_micro, group.world_size, group.rank):
            generator = torch.Generator().manual_seed(1000 * step + micro)
            images = torch.randn(recipe.batch.micro, 3, 8, 8, generator=generator)
            if step in poison and micro == recipe.batch.num_micro - 1:
                images[0, 0, 0, 0] = torch.nan
            labels = torch.randint(0, 10, (recipe.batch.micro,), generator=generator)
            images = images.contiguous(memory_format=torch.channels_last)
            engine.forward_backward(images, labels, 1000 * step + micro, micro)
        engine.update(step, 0.1 / (1 + step))


def save(engine: Engine, group: Group, directory: Path, step: int) -> Saved:
    """The state of an engine as a checkpoint of its own."""
    store, draft, name = DirectoryStore(directory), f"{checkpoint_name(step)}-draft", checkpoint_name(step)
    if group.rank == 0:
        store.begin(draft)
    group.barrier()
    engine.synchronise_buffers()
    files = group.gather(write(engine.export_state(), store, draft, group.saving))
    if group.rank == 0:
        marks = {file: mark for own in files for file, mark in own.items()}
        store.commit(draft, name, render({"format": FORMAT, "step": step, "num_classes": 10, "files": marks}))
    group.barrier()
    return open_checkpoint(store, name)


def restore(engine: Engine, group: Group, saved: Saved) -> None:
    """Take over a checkpoint of any engine."""
    state = empty_like(engine.export_state())
    load(saved, state, group)
    engine.import_state(state)


def whole_state(engine: Engine, group: Group, directory: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of an engine's state, whole, by way of a checkpoint."""
    return state_of(save(engine, group, directory, step))


def trained(
    world_size: int, *overrides: str, steps: int = 4, poison: Sequence[int] = ()
) -> tuple[list[dict[str, torch.Tensor]], Health]:
    """The network, and where there is one its average, after some updates; the same on every rank."""
    found = in_processes(world_size, _trained, overrides, steps, tuple(poison))
    networks = [[{name: torch.from_numpy(a) for name, a in network.items()} for network in n] for n, _ in found]
    for others in networks[1:]:
        assert not any(different(one, other) for one, other in zip(networks[0], others, strict=True))
    return networks[0], found[0][1]


def _trained(overrides: tuple[str, ...], steps: int, poison: tuple[int, ...]) -> tuple[list[Any], Health]:
    torch.set_num_threads(1)
    with join(Rendezvous.from_environment(), torch.device("cpu"), 60) as group:
        recipe, engine = build(group, *overrides)
        train(recipe, engine, group, range(steps), poison)
        engine.synchronise_buffers()
        networks = []
        for ema in (False, True) if recipe.ema else (False,):
            with engine.evaluating(ema) as network:
                networks.append({name: tensor.numpy().copy() for name, tensor in network.state_dict().items()})
        return networks, engine.health()


def crossings(directory: Path, names: Sequence[str], precision: str) -> dict[str, list[str]]:
    """Save in each engine, go on in each other, on the ranks of the environment. Returns, for each way, the names of
    tensors that are not bit for bit those of the uninterrupted run, which is DDP's."""
    torch.set_num_threads(1)
    found = {}
    with join(Rendezvous.from_environment(), torch.device("cpu"), 60) as group:
        built = {name: build(group, f"precision={precision}", *ENGINES[name]) for name in names}
        saved, ends = {}, {}
        for name, (recipe, engine) in built.items():
            train(recipe, engine, group, range(3))
            saved[name] = save(engine, group, directory / name, 3)
            train(recipe, engine, group, range(3, 5))
            ends[name] = whole_state(engine, group, directory / name, 5)
            found[name] = different(ends[name], ends["ddp"])
        for source, checkpoint in saved.items():
            for target, (recipe, engine) in built.items():
                restore(engine, group, checkpoint)
                train(recipe, engine, group, range(3, 5))
                end = whole_state(engine, group, directory / f"{source}-{target}", 5)
                found[f"{source} -> {target}"] = different(end, ends["ddp"])
    return found
