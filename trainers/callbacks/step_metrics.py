"""What a run reports while it trains: losses, learning rate, throughput, memory."""

import resource
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from trainers.callbacks.own_work import OwnWork
from trainers.callbacks.step_guard import StepGuard
from trainers.data_rates import DataRates
from trainers.slowest_rank import SlowestRank

# Dense peak of matrix products in bf16, FLOP/s, from the makers' data sheets.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L4": 121e12,
    "L40S": 362e12,
    "A10G": 70e12,
}


class StepMetrics(Callback):
    """Averages what `training_step` returns over micro-batches and ranks, and logs it.

    Reads every `train/<name>` of the step's dictionary, and `loss` where it has no such loss. Of
    what some rounds of a module with several optimizers lack, a row has the last one's before it.
    Logs besides `train/lr`, `train/grad_norm` (before clipping; of several parts with `/<part>`
    behind), `train/skipped_steps` (those that `StepGuard` left out, since the run began),
    `perf/samples_per_s`, where progress is counted in another unit that, `perf/tokens_per_s` or
    `perf/images_per_s`, `perf/peak_memory_mib`, what `DataRates` says of reading the data, what
    `SlowestRank` says of several ranks and, where the device's peak is known, `perf/mfu`:

        model FLOPs utilisation = flops_per_sample * samples_per_s / (ranks * peak FLOP/s)

    with `flops_per_sample` from the module (forward and backward, attention counted as causal).
    The clock stands still during validation. Between two rows this callback reads nothing back
    from the device and exchanges nothing between ranks.

    Raises:
        FloatingPointError: The run has diverged (`StepGuard`), which is looked up for every row.
    """

    def __init__(
        self,
        *,
        log_every_steps: int,
        batch_samples: int,
        tokens_per_sample: int,
        unit: str,
        guard: StepGuard,
        own_work: OwnWork,
        slowest: SlowestRank,
    ):
        """Remember how often to log, what a step counts for, and who judges steps and ranks."""
        self.guard, self.own_work, self.slowest = guard, own_work, slowest
        self.log_every_steps = log_every_steps
        self.batch_samples = batch_samples
        self.tokens_per_sample, self.unit = tokens_per_sample, unit
        self.latest: dict[str, float] = {}
        self.total_samples, self.total_seconds = 0, 0.0
        self._sums: dict[str, torch.Tensor] = {}
        self._rates: dict[str, float] = {}
        self._earlier: dict[str, Any] = {}  # outputs of rounds since the last row
        self._data = DataRates()

    @property
    def samples_per_s(self) -> float:
        """Mean over the training time of this process, start-up and validation left out."""
        return self.total_samples / max(self.total_seconds, 1e-9)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._mark, self._marked_step = time.perf_counter(), trainer.global_step
        self._data.start(trainer)
        self._paused_at: float | None = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._paused_at = time.perf_counter()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the clock go on after a validation and the samples and saves that come with it."""
        self.own_work.begin_forward(trainer)
        if self._paused_at is not None:
            self._mark += time.perf_counter() - self._paused_at
            self._paused_at = None

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Take the step's learning rate, where it is logged."""
        if self._logs_step(trainer, trainer.global_step + 1):
            part = trainer.strategy.part_of(optimizer)  # type: ignore[attr-defined]
            self._rates[part] = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up this micro-batch where its step is logged; log after the step's last one."""
        accum = trainer.accumulate_grad_batches
        step = batch_idx // accum + 1
        if not self._logs_step(trainer, step):
            if not pl_module.automatic_optimization:
                self._earlier |= outputs
            return
        values, self._earlier = self._earlier | outputs, {}
        if not any(key.startswith("train/") and key.endswith("loss") for key in values):
            # Lightning has divided `loss` by the number of micro-batches, and nothing else.
            values["train/loss"] = outputs["loss"] * accum
        for key, value in values.items():
            if key.startswith("train/"):
                total, weight = value if isinstance(value, tuple) else (value, 1.0)
                pair = torch.stack([total.detach().float(), torch.as_tensor(weight).to(total)])
                self._sums[key] = self._sums.get(key, 0) + pair
        if (batch_idx + 1) % accum == 0:
            self._log(trainer, pl_module, step)

    def _logs_step(self, trainer: Trainer, step: int) -> bool:
        return step % self.log_every_steps == 0 or step in (1, trainer.max_steps)

    def _log(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        self.guard.check(trainer)
        sums = torch.stack(list(self._sums.values()))
        own = sums.new_zeros(trainer.world_size, 2)  # each rank's in its row: one exchange for all
        own[trainer.global_rank, 0] = self.own_work.take(trainer)
        sums = trainer.strategy.reduce(torch.cat([sums, own]), reduce_op="sum").tolist()
        row = {
            key: total / weight
            for key, (total, weight) in zip(self._sums, sums[: len(self._sums)], strict=True)
        }
        own_s = [seconds for seconds, _ in sums[len(self._sums) :]]
        norms = trainer.strategy.gradient_norms  # type: ignore[attr-defined]
        for part, rate in self._rates.items():
            suffix = f"/{part}" if len(trainer.optimizers) > 1 else ""
            row |= {f"train/lr{suffix}": rate, f"train/grad_norm{suffix}": float(norms[part])}
        self._sums, self._rates = {}, {}  # of a part that does not step next time, nothing is said
        row |= self.guard.row() | self._throughput(trainer, pl_module, step, own_s)
        self.latest = row
        for logger in trainer.loggers:
            logger.log_metrics(row, step)

    def _throughput(
        self, trainer: Trainer, pl_module: LightningModule, step: int, own_s: list[float]
    ) -> dict[str, float]:
        now, num_steps = time.perf_counter(), step - self._marked_step
        seconds, samples = now - self._mark, num_steps * self.batch_samples
        self._mark, self._marked_step = now, step
        self.total_samples += samples
        self.total_seconds += seconds
        row = {
            "perf/samples_per_s": samples / seconds,
            "perf/peak_memory_mib": peak_memory_mib(pl_module.device),
        }
        row[f"perf/{self.unit}_per_s"] = samples * self.tokens_per_sample / seconds
        row |= self._data.row(trainer, seconds=seconds, num_steps=num_steps)
        if trainer.world_size > 1:
            own_s = [own / num_steps for own in own_s]
            says = trainer.is_global_zero
            row |= self.slowest.row(own_s, step_s=seconds / num_steps, says=says)
        peak, flops_per_sample = peak_flops(pl_module.device), _flops_per_sample(pl_module)
        if peak and flops_per_sample:
            flops_per_s = flops_per_sample * samples / seconds
            row["perf/mfu"] = flops_per_s / (trainer.world_size * peak)
        return row


def _flops_per_sample(module: Any) -> float | None:
    return module.flops_per_sample() if hasattr(module, "flops_per_sample") else None


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a known GPU in FLOP/s; None for other devices."""
    if device.type != "cuda":
        return None
    # Such as "NVIDIA A100-SXM4-80GB"; padded, so that a name is found as a whole word.
    words = f" {torch.cuda.get_device_name(device).replace('-', ' ')} "
    return next((peak for key, peak in PEAK_FLOPS.items() if f" {key} " in words), None)


def peak_memory_mib(device: torch.device) -> float:
    """Highest memory so far in MiB: the allocator's on a GPU, the process's resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    units_per_mib = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units_per_mib
