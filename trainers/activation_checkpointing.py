"""Recomputing activations in the backward pass, block by block (Chen et al. 2016, 1604.06174)."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

# Outputs that `selective` keeps: what costs most to make again.
KEPT_OPERATIONS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)


class ActivationCheckpointing(Callback):
    """Wraps the modules that the LightningModule names in `blocks`, during `fit` only.

    Modes: `none`; `full`, every block keeps its input alone; `every_<n>`, one block in n does;
    `selective`, every block keeps the results of matrix products and attention besides. Dropout is
    the same in the recomputation as in the forward pass.
    """

    def __init__(self, mode: str):
        """Take `activation_checkpointing=`.

        Raises:
            ValueError: No such mode.
        """
        if not re.fullmatch(r"none|full|selective|every_[1-9]\d*", mode):
            raise ValueError(
                f"activation_checkpointing={mode} -> no such mode -> use none, full, selective, "
                f"or every_<n> such as every_2"
            )
        self.mode = mode
        self._forwards: list[tuple[torch.nn.Module, Callable[..., Any]]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap the blocks' forward.

        Raises:
            ValueError: The module does not name its blocks.
        """
        if self.mode == "none" or stage != "fit":
            return
        blocks = getattr(pl_module, "blocks", None)
        if blocks is None:
            raise ValueError(
                f"activation_checkpointing={self.mode} -> {type(pl_module).__name__} has no "
                f"`blocks` -> give it that property (docs/adding.md), or use none"
            )
        contexts = partial(create_selective_checkpoint_contexts, _policy)
        context = contexts if self.mode == "selective" else noop_context_fn
        every = int(self.mode.removeprefix("every_")) if self.mode.startswith("every_") else 1
        for block in list(blocks)[::every]:
            self._forwards.append((block, block.forward))
            block.forward = partial(_forward, block.forward, context)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the blocks their forward back."""
        self._unwrap()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give it back also where the run does not end well."""
        self._unwrap()

    def _unwrap(self) -> None:
        for block, forward in self._forwards:
            block.forward = forward
        self._forwards = []


def _forward(forward: Callable[..., Any], context: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=context, **kwargs)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operation in KEPT_OPERATIONS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
