"""What keeps scales in check: spectral norm of weights and batch norm of activations.

Legend: B batch, C channels, H rows, W columns, K classes.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Size, Tensor, nn

from modules.gan_initial_values import Draw, ones, zeros

START_ITERATIONS = 15
"""Power iterations on initial values, as torch makes; a training step then makes one."""

SYNCED, PER_RANK = "synced", "per_rank"
"""Whether batch norm sees the images of all ranks, or each rank its own."""


class WideBuffers(nn.Module):
    """Keeps its buffers in fp32 where a network is cast to bf16 or fp16 as a whole.

    Moving averages that change by a hundredth at a time would stand still in bf16.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, before[name].to(buffer.device))
        return self


class SpectralNorm(WideBuffers):
    """Spectral normalisation (Miyato et al. 2018, arXiv 1802.05957, equation 8 and algorithm 1).

    sigma = u^T W v with W as a matrix [outputs, rest], differentiable in W, u and v constants. They
    move when somebody says that it is time (`is_due`), not with every forward as in the paper's
    code: a step that is several forwards (real and generated images, micro-batches, recomputation)
    has one sigma, and so have its ranks.

    Args:
        size: Of the weight.
    """

    u: Tensor
    v: Tensor

    def __init__(self, size: Size):
        super().__init__()
        self.register_buffer("u", torch.zeros(size[0]))
        self.register_buffer("v", torch.zeros(size[1:].numel()))
        self.is_due = False
        """Whether the next forward in training makes a power iteration first."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return W / sigma in fp32, the size of `weight`."""
        with torch.autocast(weight.device.type, enabled=False):
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
            if self.is_due and self.training:
                self._iterate(weight)
                self.is_due = False
            # Copies: the backward pass may come after the buffers have moved on.
            u, v = self.u.to(weight.dtype, copy=True), self.v.to(weight.dtype, copy=True)
            return weight / (u @ (weight.flatten(1) @ v))

    @torch.no_grad()
    def start(self, weight: Tensor, generator: torch.Generator) -> None:
        """Draw u and v, and bring them near the singular vectors of `weight`."""
        for vector in (self.u, self.v):
            vector.copy_(F.normalize(vector.normal_(generator=generator), dim=0))
        for _ in range(START_ITERATIONS):
            self._iterate(weight)

    @torch.no_grad()
    def _iterate(self, weight: Tensor) -> None:
        matrix = weight.flatten(1)
        u = F.normalize(matrix @ self.v.to(matrix.dtype), dim=0)
        self.u.copy_(u)
        self.v.copy_(F.normalize(matrix.mT @ u, dim=0))


class BatchNorm(WideBuffers):
    """Batch normalisation (Ioffe and Szegedy 2015, arXiv 1502.03167), perhaps class-conditional.

    Statistics are fp32, whatever the input. Those for evaluation are moving averages that each
    forward pass in training moves; one that only recomputes for a backward pass does not, nor do
    statistics that are not finite: a step that is left out for them would spoil them for ever.

    Args:
        channels: C.
        num_classes: K, then every class has its gains and biases (Dumoulin et al. 2017, arXiv
            1610.07629); None: all share one.
        momentum: Share of a batch's statistics in the moving averages.
        epsilon: Added to the variance.
        is_normalising: False leaves gains and biases alone: samples are then independent.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        channels: int,
        *,
        num_classes: int | None = None,
        momentum: float,
        epsilon: float,
        is_normalising: bool,
    ):
        super().__init__()
        size = (channels,) if num_classes is None else (num_classes, channels)
        self.weight, self.bias = nn.Parameter(torch.empty(size)), nn.Parameter(torch.empty(size))
        self.draws: dict[str, Draw] = {"weight": ones, "bias": zeros}
        self.momentum, self.epsilon, self.is_normalising = momentum, epsilon, is_normalising
        self.is_conditional = num_classes is not None
        self.is_synced = False
        """Whether a batch in training is that of all ranks, as many samples of each."""
        if is_normalising:
            self.register_buffer("running_mean", torch.zeros(channels))
            self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Normalise `x` [B, C] or [B, C, H, W] by channel; `labels` int64 [B] where K is set."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        gain, bias = self.weight.to(dtype), self.bias.to(dtype)  # [C] or [K, C]
        if self.is_normalising and not self.is_conditional and not self.is_synced:
            return self._normalise(x, gain, bias)
        if self.is_conditional:
            assert labels is not None
            gain, bias = F.embedding(labels, gain), F.embedding(labels, bias)  # [B, C]
        ones = (1,) * (x.dim() - 2)
        gain, bias = (each.view(-1, x.size(1), *ones) for each in (gain, bias))
        normalised = self._normalise(x) if self.is_normalising else x
        return (normalised * gain + bias).to(x.dtype)

    def _normalise(
        self, x: Tensor, gain: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        if not self.training:
            mean, variance = self.running_mean, self.running_var
            return F.batch_norm(x, mean, variance, gain, bias, eps=self.epsilon)
        mean, variance = self.running_mean.clone(), self.running_var.clone()
        if self.is_synced:
            normalised = self._normalise_together(x, mean, variance)
        else:
            normalised = F.batch_norm(
                x, mean, variance, gain, bias, True, self.momentum, self.epsilon
            )
        # Set while autograd runs a backward pass: this forward is activation checkpointing's then.
        if torch._C._current_graph_task_id() == -1:
            is_sound = mean.isfinite() & variance.isfinite()
            for average, moved in ((self.running_mean, mean), (self.running_var, variance)):
                average.copy_(torch.where(is_sound, moved, average))
        return normalised

    def _normalise_together(self, x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
        dims = [0, *range(2, x.dim())]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = mean_over_ranks(x.mean(dims, keepdim=True))
        x = x - mean
        variance = mean_over_ranks(x.square().mean(dims, keepdim=True))
        with torch.no_grad():
            count = x.numel() // x.size(1) * dist.get_world_size()
            running_mean.lerp_(mean.flatten(), self.momentum)
            running_var.lerp_(variance.flatten() * count / (count - 1), self.momentum)
        return x * (variance + self.epsilon).rsqrt()


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return mean_over_ranks(gradient)  # each rank's loss depends on the values of all


def mean_over_ranks(value: Tensor) -> Tensor:
    """Average over ranks, which all call this; can be differentiated any number of times.

    A gradient is that of the sum of all ranks' losses, in this rank's value.
    """
    return _MeanOverRanks.apply(value)  # type: ignore[return-value]


def sync_statistics(network: nn.Module, is_synced: bool) -> None:
    """Let all batch norms of a network see the images of all ranks, or of their own alone.

    As `nn.SyncBatchNorm`, on any device and with gradients of gradients.
    """
    for module in network.modules():
        if isinstance(module, BatchNorm):
            module.is_synced = is_synced


def check_batch_norm(setting: str) -> None:
    """Refuse what is neither `SYNCED` nor `PER_RANK`.

    Raises:
        ValueError: It is something else.
    """
    if setting not in (SYNCED, PER_RANK):
        raise ValueError(f"module.batch_norm={setting} -> unknown -> choose {SYNCED} or {PER_RANK}")
