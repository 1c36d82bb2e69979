"""Recomputing activations in the backward pass, block by block (Chen et al. 2016, 1604.06174)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.checkpoint import (
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from trainers.limits import refuse_unknown_mode

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
    the same in the recomputation as in the forward pass. What `selective` keeps serves one backward
    pass, so blocks of parts whose gradients are differentiated twice are recomputed in full; so are
    blocks that say `overwrites_products = True`, as those have to that call torch's recurrent
    layers, which write over products on a CPU in a way that torch does not notice.
    """

    def __init__(self, mode: str):
        """Take `activation_checkpointing=`.

        Raises:
            ValueError: No such mode.
        """
        refuse_unknown_mode(mode)
        self.mode = mode
        self._forwards: list[tuple[torch.nn.Module, Callable[..., Any]]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap the blocks' forward."""
        if self.mode == "none" or stage != "fit":
            return
        twice = {
            layer
            for part in getattr(pl_module, "double_backward", ())
            for layer in getattr(pl_module, "parts", {"model": pl_module})[part].modules()
        }
        every = int(self.mode.removeprefix("every_")) if self.mode.startswith("every_") else 1
        for block in list(pl_module.blocks)[::every]:  # type: ignore[arg-type]
            is_kept = block not in twice and not getattr(block, "overwrites_products", False)
            is_selective = self.mode == "selective" and is_kept
            context = _keeping_contexts if is_selective else noop_context_fn
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


class _KeptOperationsOnly:
    """Lets all other operations pass unseen.

    torch 2.13 wants the same operations in the recomputation as in the forward pass, and ZeRO 3
    gathers a block's parameters inside of either as it happens to need them.
    """

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function not in KEPT_OPERATIONS:
            return function(*args, **(kwargs or {}))
        return super().__torch_dispatch__(function, types, args, kwargs)  # type: ignore[misc]


def _keeping_contexts() -> Any:
    contexts = create_selective_checkpoint_contexts(list(KEPT_OPERATIONS))
    for context in contexts:  # how they are made differs between versions of torch
        kind = type(context)
        context.__class__ = type(  # type: ignore[assignment]
            kind.__name__, (_KeptOperationsOnly, kind), {}
        )
    return contexts
