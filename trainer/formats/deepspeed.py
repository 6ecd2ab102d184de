"""DeepSpeed's own checkpoints, as `engine.save_checkpoint` of DeepSpeed 0.19 writes them; DeepSpeed is not needed.

A directory with a file `latest`, which names another in it: there one file of the model (ZeRO stage 3: one a rank), and
from stage 1 on one of the optimizer a rank. The optimizer's parameters lie end to end, group by group:

* stages 1 and 2 cut each group, padded to a multiple of 2 x ranks, into equal parts;
* stage 3 cuts each parameter, padded to a multiple of the ranks; a rank has its parts end to end.

The names and shapes in their order are in the model's file (`param_shapes`). Followed: deepspeed/utils/zero_to_fp32.py,
and `state_dict` and `load_state_dict` of deepspeed/runtime/zero/stage_1_and_2.py.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs import LonghaulError, Recipe
from trainer.atomic import replacing
from trainer.checkpoints.compare import compare_states
from trainer.formats.layouts import Layout, longhaul_layout, name_state, sgd_group, state_dict
from trainer.formats.pickles import Inert, read_torch_file
from trainer.formats.training import TrainingState, fit, require_sgd

VERSION = "0.19.8"  # whose form is written
_ALIGNMENT = 2  # `nccl_start_alignment_factor` of stages 1 and 2
_STAND_INS: dict[str, type] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": Inert,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": Inert,
    "deepspeed.utils.tensor_fragment.fragment_address": Inert,
}
_Shapes = list[dict[str, torch.Size]]  # by name, for each group of the optimizer


def is_checkpoint(path: Path) -> bool:
    """Whether a directory looks like one of DeepSpeed's."""
    return (path / "latest").is_file() or any(path.glob("*mp_rank_*_model_states.pt"))


def read(path: Path, network: nn.Module, trust: bool) -> TrainingState:
    """A checkpoint of an engine around `network`, of any ZeRO stage and number of ranks, with torch's SGD: the float32
    weights and their momentum. Raises LonghaulError where it is not one, or another model's."""
    directory = _newest(path)
    models = _files(directory, "model_states", trust)
    optimizers = _files(directory, "optim_states", trust) if any(directory.glob("*_optim_states.pt")) else []
    for key in ("module", "global_steps"):
        if key not in models[0]:
            raise LonghaulError(f"{directory} has a model's file without '{key}': it is not a checkpoint of DeepSpeed.")
    weights = {name.removeprefix("module."): tensor for name, tensor in models[0]["module"].items()}
    momentum: dict[str, Tensor] = {}
    if optimizers:
        shards = [_Shard.of(file["optimizer_state_dict"], directory) for file in optimizers]
        shapes: _Shapes = [dict(group) for group in models[0]["param_shapes"]]
        ranks = shards[0].ranks
        if len(shards) != ranks:
            raise LonghaulError(f"{directory} has the optimizer's files of {len(shards)} ranks, but {ranks} saved it.")
        weights |= shards[0].join([shard.weights for shard in shards], shapes)
        momentum = shards[0].join([shard.momentum for shard in shards], shapes)
    elif models[0].get("optimizer") is not None:
        momentum = name_state(models[0]["optimizer"], network, f"{directory}, optimizer")
    return TrainingState(fit(weights, network, str(directory)), momentum, steps=int(models[0]["global_steps"]))


def write(
    state: TrainingState, recipe: Recipe, network: nn.Module, rate: float, out: Path, stage: int, ranks: int
) -> list[str]:
    """Write a directory that `engine.load_checkpoint` of a plain DeepSpeed engine loads, and return what a person
    should know, in sentences.

    Its engine has ZeRO `stage` 0 (on any number of ranks), 1 or 2 (on `ranks` ranks), float32 parameters and a
    torch.optim.SGD whose groups are those of `longhaul_layout`. The files hold tensors and plain values alone.
    `rate` is the learning rate of the next step.
    """
    optimizer = require_sgd(recipe, "DeepSpeed")
    layout = longhaul_layout(network, optimizer)
    decays = [optimizer.weight_decay, 0.0][: len(layout)]
    groups = [sgd_group(optimizer, rate, decay) for decay in decays]
    full = {name: state.momentum.get(name, torch.zeros_like(state.weights[name])) for group in layout for name in group}
    tag = f"global_step{state.steps}"
    model: dict[str, Any] = {
        "module": state.weights,
        "buffer_names": [name for name, _ in network.named_buffers()],
        "optimizer": state_dict(full, layout, groups) if stage == 0 else None,
        "param_shapes": [{name: state.weights[name].shape for name in group} for group in layout] if stage else None,
        "frozen_param_shapes": None, "shared_params": {} if stage else None, "frozen_param_fragments": None,
        "lr_scheduler": None, "data_sampler": None, "random_ltd": None, "skipped_steps": 0,
        "global_steps": state.steps, "global_samples": (state.steps or 0) * recipe.batch.size,
        "dp_world_size": ranks, "mp_world_size": 1, "ds_config": {}, "ds_version": VERSION,
    }  # fmt: skip
    with replacing(out) as temporary:
        (temporary / tag).mkdir(parents=True)
        torch.save(model, temporary / tag / "mp_rank_00_model_states.pt")
        for rank in range(ranks if stage else 0):
            shard = _cut(state.weights, full, layout, groups, stage, ranks, rank)
            file = {"optimizer_state_dict": shard, "ds_config": {}, "ds_version": VERSION}
            torch.save(file, temporary / tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        (temporary / "latest").write_text(tag)
        _require_same(read(temporary, network, trust=False), state, full, out)
    sizes = " and ".join(
        f"{len(group)} parameters, weight_decay {d:g}" for group, d in zip(layout, decays, strict=True)
    )
    where = "any number of ranks" if stage == 0 else f"{ranks} rank{'s' * (ranks > 1)}"
    notes = [f"Load it into an engine with ZeRO stage {stage} on {where}, its torch.optim.SGD over {sizes}."]
    if state.averaged is not None:
        notes.append("DeepSpeed keeps no moving average: the averaged weights (ema) are left out.")
    return notes


@dataclass(frozen=True)
class _Shard:
    """One rank's part of the optimizer: for each group, or sub-group of stage 3, a stretch of elements."""

    stage: int
    ranks: int
    weights: list[Tensor]
    momentum: list[Tensor]
    paddings: list[list[int]] | None

    @classmethod
    def of(cls, state: dict[str, Any], directory: Path) -> "_Shard":
        stage, count = int(state["zero_stage"]), state["partition_count"]
        ranks = max(count) if isinstance(count, list) else int(count)
        if stage == 3:
            weights, inner = state["fp32_flat_groups"], state["optimizer_state_dict"]
        else:
            weights, inner = state["single_partition_of_fp32_groups"], state["base_optimizer_state"]
        states = [inner["state"].get(i, {}) for i in range(len(weights))] if isinstance(inner, dict) else inner
        keys = {key for values in states for key in values} - {"momentum_buffer", "step"}
        if keys:
            raise LonghaulError(
                f"{directory} has the state of another optimizer than SGD ({', '.join(sorted(keys))}): not supported."
            )
        none = [torch.zeros_like(group) for group in weights]  # before the first step
        momentum = [values.get("momentum_buffer", zeros) for values, zeros in zip(states, none, strict=True)]
        paddings = state.get("param_alignment_paddings")
        return cls(stage, ranks, [g.float() for g in weights], [m.float() for m in momentum], paddings)

    def join(self, ranks: Sequence[Sequence[Tensor]], shapes: _Shapes) -> dict[str, Tensor]:
        """Whole tensors by name, from each rank's stretches."""
        if self.stage == 3:
            return _join_parameters([torch.cat(list(groups)) for groups in ranks], shapes)
        joined: dict[str, Tensor] = {}
        for index, group in enumerate(shapes):
            gaps = [0] * len(group) if self.paddings is None else self.paddings[index]
            flat, at = torch.cat([groups[index] for groups in ranks]), 0
            for (name, shape), gap in zip(group.items(), gaps, strict=True):
                joined[name] = flat[at : at + shape.numel()].view(shape).clone()
                at += shape.numel() + gap
        return joined


def _join_parameters(ranks: list[Tensor], shapes: _Shapes) -> dict[str, Tensor]:
    joined, at = {}, 0
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        part = math.ceil(shape.numel() / len(ranks))
        joined[name] = torch.cat([flat[at : at + part] for flat in ranks])[: shape.numel()].view(shape)
        at += part
    return joined


def _cut(
    weights: dict[str, Tensor], momentum: dict[str, Tensor], layout: Layout, groups: list[dict[str, Any]],
    stage: int, ranks: int, rank: int,
) -> dict[str, Any]:  # fmt: skip
    """One rank's optimizer state of stage 1 or 2."""
    cut = [_partition([weights[name] for name in group], ranks, rank) for group in layout]
    buffers = [_partition([momentum[name] for name in group], ranks, rank)[0] for group in layout]
    return {
        "dynamic_loss_scale": False,
        "overflow": False,
        "clip_grad": 0.0,
        "base_optimizer_state": state_dict(
            {str(index): buffer for index, buffer in enumerate(buffers)},
            [[str(index)] for index in range(len(layout))],
            groups,
        ),
        "single_partition_of_fp32_groups": [own[: len(own) - padding].clone() for own, padding in cut],
        "zero_stage": stage,
        "group_paddings": [padding for _, padding in cut],
        "param_alignment_paddings": [[0] * len(group) for group in layout],
        "partition_count": [ranks] * len(layout),
        "ds_version": VERSION,
    }


def _partition(tensors: list[Tensor], ranks: int, rank: int) -> tuple[Tensor, int]:
    """A rank's equal part of tensors laid end to end, and how much of its end is padding."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    size = math.ceil(len(flat) / (_ALIGNMENT * ranks)) * _ALIGNMENT
    own = torch.zeros(size)
    real = flat[rank * size : (rank + 1) * size]
    own[: len(real)] = real
    return own, size - len(real)


def _require_same(found: TrainingState, state: TrainingState, momentum: dict[str, Tensor], out: Path) -> None:
    wrong = compare_states(found.weights, state.weights) or compare_states(found.momentum, momentum)
    if wrong:
        raise LonghaulError(f"What was written for {out} differs in {wrong[0].name}, and was removed: try again.")


def _newest(path: Path) -> Path:
    latest = path / "latest"
    directory = path / latest.read_text().strip() if latest.is_file() else path
    if directory.parent.resolve() != path.resolve() and directory != path:
        raise LonghaulError(f"{latest} names {directory}, which is not in {path}.")
    if not any(directory.glob("*mp_rank_00_model_states.pt")):
        raise LonghaulError(f"{directory} has no ...mp_rank_00_model_states.pt: it is not a checkpoint of DeepSpeed.")
    if any(directory.glob("*mp_rank_01_*")):
        raise LonghaulError(f"{directory} was saved with model parallelism (mp_rank_01): not supported.")
    return directory


def _files(directory: Path, kind: str, trust: bool) -> list[dict[str, Any]]:
    """The files of a kind in order of rank."""
    return [read_torch_file(path, _STAND_INS, trust) for path in _by_rank(directory.glob(f"*mp_rank_00_{kind}.pt"))]


def _by_rank(paths: Iterator[Path]) -> list[Path]:
    def rank(path: Path) -> int:
        found = re.search(r"pp_rank_(\d+)_", path.name)
        return int(found[1]) if found else 0

    return sorted(paths, key=rank)
