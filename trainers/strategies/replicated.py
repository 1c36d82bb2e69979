"""Every rank holds the whole model."""

import warnings
from typing import Any

import torch
from lightning.pytorch.overrides.distributed import prepare_for_backward
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from trainers.strategies.parts import PartsStrategy


class Single(PartsStrategy):
    """One device, one process, no process group."""

    trains_unfrozen = True

    def setup_environment(self) -> None:
        """Choose the device; there is nobody to connect to."""
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self.set_world_ranks()


class DataParallel(PartsStrategy):
    """A replica per rank, gradients averaged while the backward pass goes on.

    One `DistributedDataParallel` for each part, for the sake of its reducer alone: the module calls
    its networks directly, and a backward pass is announced to the reducer of its part. So parts
    may be called several times, in any order, and differentiated twice.

    Args:
        ddp: Arguments of `DistributedDataParallel`.
        **options: As `PartsStrategy`.
    """

    def __init__(self, *, ddp: dict[str, Any], **options: Any):
        super().__init__(**options)
        self.ddp = ddp
        self.reducers: dict[str, DistributedDataParallel] = {}

    def distribute_optimizers(self) -> None:
        """Build the parts' reducers; values are those of rank 0."""
        super().distribute_optimizers()
        # Kernels of one channel have several strides that mean the same.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view", UserWarning)
        device_ids = self.determine_ddp_device_ids()
        for name, part in self.parts.items():
            self.reducers[name] = DistributedDataParallel(part, device_ids=device_ids, **self.ddp)
            if device_ids is not None:  # DDP warms up on a stream of its own
                torch.cuda.synchronize()

    def backward_of(self, part: str, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiate, and average with the other ranks unless gradients are kept back."""
        if self._exchanges_gradients:
            prepare_for_backward(self.reducers[part], loss)
        super().backward_of(part, loss, *args, **kwargs)

    def teardown(self) -> None:
        """Let the reducers go: they hold buckets as large as the gradients."""
        self.reducers = {}
        super().teardown()
