"""DeepSpeed, imported for a kind of device, and its configuration with nothing left to defaults."""

import copy
import importlib
import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch

DECIDED_ELSEWHERE = {
    "train_batch_size": "batch_samples",
    "train_micro_batch_size_per_gpu": "micro_batch",
    "gradient_accumulation_steps": "micro_batch",
    "gradient_clipping": "module.optimizer.gradient_clip",
    "bf16.enabled": "precision and strategy.make.parameters",
    "optimizer": "module.optimizer",
    "scheduler": "module.schedule",
    "zero_optimization.stage": "strategy and strategy.make.part_stages",
    "fp16.enabled": "precision",
    "torch_autocast": "precision",
    "zero_allow_untested_optimizer": "module.optimizer",
    "zero_force_ds_cpu_optimizer": "module.optimizer",
}
"""DeepSpeed's keys -> ours that decide them."""

UNUSABLE = {
    "zero_optimization.round_robin_gradients": "DeepSpeed 0.19 then tells wrong places for its "
    "masters, and checkpoints would be scrambled",
    "zero_optimization.zenflow": "it keeps masters and state where checkpoints do not find them",
    "zero_optimization.offload_optimizer.super_offload": "it was not tried",
    "zero_optimization.mics_shard_size": "it is an engine of its own, which was not tried",
    "zero_optimization.zero_hpz_partition_size": "its second copy of the weights was not tried",
    "fp16.fp16_master_weights_and_grads": "masters are fp32 under every strategy",
    "bf16.bf16_master_weights_and_grads": "masters are fp32 under every strategy",
    "bf16.bf16_optimizer_states": "state is fp32 under every strategy",
}
"""Its keys -> why not."""

_KNOWN = """
activation_checkpointing aio autotuning bf16 checkpoint comet comms_logger communication_data_type
compile csv_monitor data_efficiency data_types dataloader_drop_last datastates_ckpt
disable_allgather disable_python_gc dump_state expert_parallel flops_profiler fp16
gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor
hybrid_engine log_level managed_gradient_accumulation memory_breakdown optimizer pipeline
prescale_gradients scheduler seq_parallel_communication_data_type steps_per_print tensor_parallel
tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb weight_quantization
zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
"""
KNOWN = frozenset(_KNOWN.split())
"""Its keys at the top level, of which it ignores others without a word.

A list, for importing DeepSpeed takes seconds; `tests/trainers/test_zero.py` compares it with what
the installed one reads. Inside sections DeepSpeed mostly refuses by itself.
"""


def complete_config(
    config: Mapping[str, Any], *, stage: int, clip: float | None, dtype: torch.dtype
) -> dict[str, Any]:
    """Complete DeepSpeed's configuration by what the run decides.

    Args:
        config: Of `strategy.make.config`.
        stage: ZeRO stage.
        clip: Largest norm of the gradient; None for no clipping.
        dtype: Of the model's parameters.
    """
    config = copy.deepcopy(dict(config))
    zero = config["zero_optimization"]
    if stage < 3:  # of a part in a model at stage 3
        zero.pop("offload_param", None)
    zero["stage"] = stage
    return config | {
        "train_micro_batch_size_per_gpu": 1,  # only products of it are used, in log lines
        "gradient_accumulation_steps": 1,  # the boundary is set at each backward
        "gradient_clipping": clip or 0.0,  # its default is 1
        "bf16": {**config.get("bf16", {}), "enabled": dtype == torch.bfloat16},
        "fp16": {**config.get("fp16", {}), "enabled": dtype == torch.float16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def import_deepspeed(device_type: str) -> Any:
    """Import DeepSpeed for a kind of device."""
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    # An operator for inference on CPU: compiling it takes a minute and training never calls it.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore
    _import_muon_uncompiled()
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # It refuses fp16 on CPUs that have no instructions for it, where torch is slow and correct.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True  # type: ignore
    # Of torch 2.13 about names that DeepSpeed 0.19 uses, at every call.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated")
    return deepspeed


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's own Muon, as every engine of it does, without compiling it.

    Nothing here calls it, and importing the compiler takes 1.2 s at every start.
    """
    compiler = importlib.import_module("deepspeed.runtime.compiler")
    compile_ = compiler.compile
    compiler.compile = lambda: lambda function: function  # type: ignore[attr-defined]
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compile_  # type: ignore[attr-defined]


def read_scale(scaler: Any) -> dict[str, Any]:
    """State of DeepSpeed's loss scaler as `torch.amp.GradScaler` could take it."""
    if not scaler.dynamic:
        return {"scale": scaler.cur_scale, "steady_steps": 0}
    steady = scaler.cur_iter - scaler.last_overflow_iter - 1
    hysteresis = {"hysteresis": scaler.cur_hysteresis}
    return {"scale": scaler.cur_scale, "steady_steps": steady} | hysteresis


def set_scale(scaler: Any, saved: Mapping[str, Any]) -> None:
    """Let DeepSpeed's loss scaler go on from a state of `read_scale` or of another strategy."""
    if scaler.dynamic:  # else the configuration says it
        scaler.cur_scale = saved["scale"]
        scaler.cur_iter, scaler.last_overflow_iter = saved["steady_steps"], -1
        scaler.cur_hysteresis = saved.get("hysteresis", scaler.delayed_shift)
