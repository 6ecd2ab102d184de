"""DeepSpeed's configuration: what the recipe decides, and what of the user's own is merged into it.

DeepSpeed takes unknown top-level keys without a word, and has defaults of its own for what a recipe decides (it clips
gradients to a norm of 1). So every key is looked at here, and DeepSpeed need not be imported for it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from configs import LonghaulError, Recipe
from configs.errors import did_you_mean

_PRECISION = "the recipe's precision decides it"
_SUM = "gradients are summed, in the precision engine.reduce"
_OFFLOAD = "weights, gradients and optimizer state stay on the device, where Longhaul reads and steps them"

_DECIDED = {
    "train_batch_size": "batch.size decides it",
    "train_micro_batch_size_per_gpu": "batch.micro decides it",
    "gradient_accumulation_steps": "batch.size and batch.micro decide it",
    "managed_gradient_accumulation": "batch.size and batch.micro decide it",
    "optimizer": "the recipe's optimizer decides it",
    "scheduler": "the recipe's schedule decides it",
    "gradient_clipping": "gradients.clip_norm decides it",
    "fp16": f"{_PRECISION}, and loss_scale",
    "bf16": _PRECISION,
    "bfloat16": _PRECISION,
    "amp": _PRECISION,
    "torch_autocast": _PRECISION,
    "data_types": _PRECISION,
    "communication_data_type": "engine.reduce decides it",
    "seq_parallel_communication_data_type": "engine.reduce decides it",
    "prescale_gradients": _SUM,
    "gradient_predivide_factor": _SUM,
    "gradient_allreduce_op": _SUM,
    "zero_allow_untested_optimizer": "the recipe's optimizer decides it",
    "zero_force_ds_cpu_optimizer": "the recipe's optimizer decides it",
    "steps_per_print": "log.every decides it",
    "compile": "the recipe's compile decides it",
    "checkpoint": "the recipe's checkpoint decides it",
    "dataloader_drop_last": "Longhaul loads the data",
    "data_efficiency": "Longhaul loads the data",
    "curriculum_learning": "Longhaul loads the data",
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), "Longhaul keeps the run's records"),
}
"""Keys of DeepSpeed that would contradict the recipe, and who decides in their stead."""

_DECIDED_OF_ZERO = {
    "stage": "engine.zero_stage decides it",
    **dict.fromkeys(("offload_param", "offload_optimizer", "cpu_offload", "cpu_offload_param", "zenflow"), _OFFLOAD),
    "compute_grad_norm": "Longhaul takes the gradient's norm",
    **dict.fromkeys(("load_from_fp32_weights", "elastic_checkpoint"), "the recipe's checkpoint decides it"),
}

_PASSED_ON = (
    "zero_optimization", "comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown", "dump_state",
    "disable_python_gc", "disable_allgather", "timers",
)  # fmt: skip

_PASSED_ON_OF_ZERO = (
    "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce",
    "allgather_partitions", "allgather_bucket_size", "overlap_comm", "sub_group_size", "round_robin_gradients",
    "parameter_alignment", "ignore_unused_parameters", "zero_hpz_partition_size", "zero_quantized_weights",
    "zero_quantized_gradients", "prefetch_bucket_size", "stage3_prefetch_bucket_size", "param_persistence_threshold",
    "stage3_param_persistence_threshold", "model_persistence_threshold", "stage3_model_persistence_threshold",
    "max_live_parameters", "stage3_max_live_parameters", "max_reuse_distance", "stage3_max_reuse_distance",
    "module_granularity_threshold", "stage3_module_granularity_threshold", "use_all_reduce_for_fetch_params",
    "stage3_use_all_reduce_for_fetch_params", "allgather_sequential", "stage3_allgather_sequential",
    "log_trace_cache_warnings", "enable_sanity_checks",
)  # fmt: skip


def zero_stage(recipe: Recipe) -> int:
    """The ZeRO stage of a recipe whose engine is DeepSpeed."""
    return 1 if recipe.engine.zero_stage is None else recipe.engine.zero_stage


def deepspeed_config(recipe: Recipe, num_parameters: int) -> dict[str, Any]:
    """The configuration to initialise DeepSpeed with, `engine.deepspeed` merged into it.

    DeepSpeed computes in fp32 as far as it knows: the network brings its own autocast, and clipping, loss scaling and
    the guard are Longhaul's.

    Args:
        num_parameters: of the network, in elements. DeepSpeed allocates its buckets whole (by default 2 GB of them);
            here one holds the network, and all gradients are reduced at once.

    Raises:
        LonghaulError: for a key of the user's that the recipe decides, or that nobody knows.
    """
    own = recipe.engine.deepspeed
    _check("engine.deepspeed", own, _DECIDED, _PASSED_ON)
    zero = own.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise LonghaulError(f"engine.deepspeed.zero_optimization must hold keys and values, and it is {zero!r}.")
    _check("engine.deepspeed.zero_optimization", zero, _DECIDED_OF_ZERO, _PASSED_ON_OF_ZERO)
    stage = zero_stage(recipe)
    return {
        "train_micro_batch_size_per_gpu": recipe.batch.micro,
        "gradient_accumulation_steps": 1,  # the engine says which micro-batch is the last
        "gradient_clipping": 0.0,
        "communication_data_type": recipe.engine.reduce,
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",  # stage 3 knows the mean alone
        "zero_allow_untested_optimizer": True,
        **own,
        "zero_optimization": {
            "overlap_comm": False,
            "reduce_bucket_size": num_parameters,
            **zero,
            "stage": stage,
            **({"compute_grad_norm": False} if stage in (1, 2) else {}),  # stage 3 cannot do without
        },
    }


def _check(section: str, given: Mapping[str, Any], decided: Mapping[str, str], passed_on: Iterable[str]) -> None:
    passed_on = tuple(passed_on)
    for key in given:
        if key in decided:
            raise LonghaulError(f"{section}.{key} cannot be set, {decided[key]}: leave it out.")
        if key not in passed_on:
            near = did_you_mean(str(key), (*passed_on, *decided))
            raise LonghaulError(
                f"{section}.{key} is not among DeepSpeed's keys that can be set{near}: {', '.join(passed_on)}."
            )
