"""fp32, bf16 or fp16 as autocast, the same around every strategy."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import Precision
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Autocast(Precision):
    """Runs every step under autocast and leaves backward to the strategy.

    Autocast decides what is computed in low precision, whatever dtype the strategy keeps the
    parameters in (`docs/parallelism.md` has the table).
    """

    def __init__(self, precision: str, device_type: str):
        """Take `precision=fp32|bf16|fp16` and the kind of device, `cpu` or `cuda`."""
        self.dtype = DTYPES[precision]
        self.device_type = device_type
        self.strategy: Any = None  # set where there are gradients to scale

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Autocast, without its cache: sharded parameters change under it."""
        is_low = self.dtype != torch.float32
        with torch.autocast(
            self.device_type,
            dtype=self.dtype if is_low else None,
            enabled=is_low,
            cache_enabled=False,
        ):
            yield

    def backward(
        self, tensor: Tensor, model: LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Differentiate as the strategy does."""
        self.strategy.differentiate(tensor, *args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """The loss scales."""
        return self.strategy.loss_scale_state() if self.strategy else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with saved loss scales."""
        self.strategy.load_loss_scale_state(state_dict)
