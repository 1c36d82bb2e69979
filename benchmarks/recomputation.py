"""What recomputation saves in memory and costs in time: bytes kept for backward, seconds a step.

    python -m benchmarks.recomputation [preset=gpt2_124m] [tokens=1024] [batch=1]
        [precision=fp32] [threads=2] [rounds=3]

One GPT of `experiment=gpt_124m` on random tokens, with `ActivationCheckpointing` in each of its
modes. A step is forward and backward, no optimizer; modes take turns, and the table has medians.

Bytes are those of all storages, each once, that exist at the end of the forward pass and did not
before it: so parameters and the batch are none of them, and what was saved and freed within the
forward pass is not either. Tensors that autograd saves are no Python objects, and Python's garbage
collector, which is asked for what exists, would miss them: `saved_tensors_hooks` that change
nothing make them such. What `selective` keeps is in a cache of Python's, past those hooks, and is
found in the same way.
"""

import statistics
import sys
import time
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.memory import live_storages
from datamodules.batch import TextBatch
from modules.gpt import GPT
from trainers.activation_checkpointing import ActivationCheckpointing
from trainers.strategies.precision import Autocast

MODES = ("none", "full", "every_2", "selective")
VOCABULARY = 50_304  # of `experiment=gpt_124m`


def build(preset: str, tokens: int, **network: Any) -> GPT:
    """Build a model at its initial values.

    Args:
        preset: As `module.preset=`.
        tokens: Tokens in a row.
        **network: As `module.network=`.
    """
    with initialize_config_module("conf", version_base=None):
        config = compose("train", ["experiment=gpt_124m", f"module.preset={preset}"])
    config.datamodule.sequence_length = tokens
    config.module.network.update(network)
    config.module.schedule.warmup_samples = 0
    config.data = {"vocab_size": VOCABULARY, "bytes_per_token": None, "end_token": None}
    plan = {"batch_samples": 1, "max_samples": 1, "max_steps": 1, "tokens_per_sample": tokens}
    config.plan = plan
    module: GPT = instantiate(config.module, _convert_="all")
    module.configure_model()
    return module


def make_batch(rows: int, tokens: int) -> TextBatch:
    """Draw random tokens."""
    drawn = torch.randint(VOCABULARY, (rows, tokens + 1))
    return {"inputs": drawn[:, :-1], "targets": drawn[:, 1:]}


def forward(module: GPT, mode: str, batch: TextBatch, precision: str) -> Tensor:
    """Compute the loss with `activation_checkpointing=mode`, ready for backward."""
    callback = ActivationCheckpointing(mode)
    trainer: Any = None  # not looked at
    callback.setup(trainer, module, "fit")
    try:
        with Autocast(precision, "cpu").forward_context():
            return module.training_step(batch, 0)["loss"]
    finally:
        callback.teardown(trainer, module, "fit")


def saved_bytes(module: GPT, mode: str, batch: TextBatch, precision: str) -> int:
    """Bytes that exist for the backward pass after a forward pass."""
    return sum(saved_in_parts(module, mode, batch, precision))


def saved_in_parts(module: GPT, mode: str, batch: TextBatch, precision: str) -> tuple[int, int]:
    """As `saved_bytes`: those saved up to the last block, and by final norm, head and loss."""
    before, counts = live_storages(), []

    def count(*_: Any) -> None:
        new = (size for address, size in live_storages().items() if address not in before)
        counts.append(sum(new))

    hooks = saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with module.network.norm.register_forward_pre_hook(count), hooks:
        loss = forward(module, mode, batch, precision)
    count()
    del loss  # which has kept the graph until here
    blocks, total = counts
    return blocks, total - blocks


def step_seconds(module: GPT, mode: str, batch: TextBatch, precision: str) -> float:
    """Seconds of a forward and a backward pass."""
    start = time.perf_counter()
    forward(module, mode, batch, precision).backward()
    seconds = time.perf_counter() - start
    module.zero_grad()
    return seconds


def main() -> None:
    """Measure and print."""
    options: dict[str, Any] = {
        "preset": "gpt2_124m",
        "tokens": 1024,
        "batch": 1,
        "precision": "fp32",
        "threads": 2,
        "rounds": 3,
    }
    for key, value in OmegaConf.from_dotlist(sys.argv[1:]).items():
        if key not in options:
            sys.exit(f"{key}={value} -> no such key -> use one of {', '.join(options)}")
        options[str(key)] = value
    torch.set_num_threads(options["threads"])
    torch.manual_seed(0)
    module = build(options["preset"], options["tokens"])
    batch, precision = make_batch(options["batch"], options["tokens"]), options["precision"]
    saved = {mode: saved_in_parts(module, mode, batch, precision) for mode in MODES}
    step_seconds(module, "none", batch, precision)  # the first one is slow
    rounds = [
        {mode: step_seconds(module, mode, batch, precision) for mode in MODES}
        for _ in range(options["rounds"])
    ]
    table = Table("mode", "saved MiB", "less than none", "by the loss, MiB", "s a step", "ratio")
    for mode in MODES:
        table.add_row(
            mode,
            f"{sum(saved[mode]) / 2**20:.1f}",
            f"{1 - sum(saved[mode]) / sum(saved['none']):.1%}",
            f"{saved[mode][1] / 2**20:.1f}",
            f"{statistics.median(times[mode] for times in rounds):.2f}",
            f"{statistics.median(times[mode] / times['none'] for times in rounds):.3f}",
        )
    Console(width=100).print(table)
    print(", ".join(f"{key}={value}" for key, value in options.items()))


if __name__ == "__main__":
    main()
