"""What all strategies share: a module's parts, each with one optimizer, one clip, one backward.

A LightningModule says what its parts are and nothing about strategies:

    parts             {"discriminator": ..., "generator": ...}, disjoint networks; absent: one part
    blocks            the layers of all parts, each a unit to shard and to checkpoint
    initial_value     name -> initial value of a parameter, where they are on the meta device
    double_backward   names of parts whose gradients are differentiated once more (R1, WGAN-GP)

`configure_optimizers` returns one optimizer per part, in that order. A module with several parts
optimizes manually: for each part, under `optimizer.toggle_model(sync_grad=<last micro-batch>)`,
one `manual_backward` of all its terms summed; then `optimizer.step()` and `optimizer.zero_grad()`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import do_nothing_closure
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from trainers.strategies.precision import Autocast, step_unless
from trainers.strategies.whole_state import WholeState

Clip = float | None | Mapping[str, float | None]


class Guard(Protocol):
    """Judges steps (`trainers/callbacks/step_guard.py`)."""

    def __call__(self, part: str, loss: Tensor, norm: Tensor) -> Tensor | None:
        """Say whether a part is not to step, a bool scalar; None: step."""

    def check(self, trainer: Trainer) -> None:
        """Raise on all ranks if a step that was judged ends the run; collective."""


LATE_S = 60
"""Seconds that a collective waits longer than it may take: the watchdog, which knows whom it waits
for, is to speak first. NCCL would end the process without a word."""


class PartsStrategy(WholeState):
    """Base of the strategies: ranks, the contract of the parts, clipping, stepping, state.

    Lightning's DDPStrategy gives process groups and collectives; the model is never wrapped, so
    that a module may call its networks in any order and differentiate twice.

    Args:
        precision: `fp32`, `bf16` or `fp16`.
        device_type: `cpu` or `cuda`.
        gradient_clip: Largest norm of a part's gradient, one for all or by part; None: no clipping.
        guard: Judges each step by its loss and gradient norm before it is taken.
        timeout_s: Seconds that a collective may take; `LATE_S` more, and its ranks give up.
    """

    shards_parameters = False
    """Whether a rank alone cannot run the model."""
    trains_unfrozen = False
    """Whether parameters can be trained that did not require gradients at the start."""

    def __init__(
        self,
        *,
        precision: str,
        device_type: str,
        gradient_clip: Clip = None,
        guard: Guard | None = None,
        timeout_s: float,
    ):
        autocast = Autocast(precision, device_type)
        super().__init__(timeout=timedelta(seconds=timeout_s + LATE_S), precision_plugin=autocast)
        autocast.strategy = self
        self.dtype = autocast.dtype
        self.clip, self.guard = gradient_clip, guard
        self.gradient_norms: dict[str, Tensor] = {}
        """Norm of each part's whole gradient at its last step, before clipping; a 0-d tensor."""
        self.scalers: dict[str, torch.amp.GradScaler] = {}
        self._losses: dict[str, Tensor] = {}
        self._frozen: dict[str, list[nn.Parameter]] = {}
        self._exchanges_gradients = True
        self._is_exchanged: set[str] = set()

    # -- the parts ------------------------------------------------------------------------------

    def part_of(self, optimizer: Optimizer) -> str:
        """Name of the part that an optimizer drives."""
        index = next(i for i, mine in enumerate(self.optimizers) if mine is optimizer)
        return list(self.parts)[index]

    def clip_of(self, part: str) -> float | None:
        """Largest gradient norm of a part."""
        return self.clip[part] if isinstance(self.clip, Mapping) else self.clip

    def parameters(self, part: str) -> list[nn.Parameter]:
        """A part's parameters that its optimizer drives."""
        optimizer = self.optimizers[list(self.parts).index(part)]
        return [p for group in optimizer.param_groups for p in group["params"]]

    def storage_dtype(self, parameters: str) -> torch.dtype:
        """Dtype of parameters by `strategy.make.parameters`: `fp32`, or `low`: the precision."""
        return self.dtype if parameters == "low" else torch.float32

    # -- setting up -----------------------------------------------------------------------------

    def setup(self, trainer: Trainer) -> None:
        """Bring the module onto the devices; build and check its optimizers."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            self.model_to_device()
            return
        self.distribute()
        self.setup_optimizers(trainer)
        if len(self.optimizers) != len(self.parts):
            raise ValueError(
                f"module={type(self.module).__name__} -> it has parts {list(self.parts)} and "
                f"returns {len(self.optimizers)} optimizer(s) -> return one per part, in order"
            )
        for name, part in self.parts.items():
            self._frozen[name] = [p for p in part.parameters() if not p.requires_grad]
        self.distribute_optimizers()

    def distribute(self) -> None:
        """Place the parts, before optimizers are built on their parameters."""
        self.model_to_device()

    def distribute_optimizers(self) -> None:
        """Finish what needs both the parts and their optimizers."""
        if self.dtype == torch.float16:
            make = torch.amp.GradScaler
            self.scalers = {part: make(self.root_device.type) for part in self.parts}

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights are read into what is already in place."""
        return True

    # -- a step ---------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run a training step; a round of several optimizers counts as one `global_step`.

        It counts at its end, whichever of them have stepped in it and how often.
        """
        if self.module.automatic_optimization:
            return super().training_step(*args, **kwargs)
        for optimizer in self._lightning_optimizers:
            optimizer._on_before_step = optimizer._on_after_step = do_nothing_closure
        output = super().training_step(*args, **kwargs)
        if self._losses:
            raise RuntimeError(
                f"training_step -> it differentiated {' and '.join(self._losses)} without a step, "
                "and counts as a whole `global_step` -> go through all micro-batches of a step, "
                "which come as a list, in one training_step"
            )
        progress = self.module.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()
        return output

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Keep gradients on their rank in there; `toggle_model(sync_grad=False)` comes here."""
        self._exchanges_gradients = False
        try:
            yield
        finally:
            self._exchanges_gradients = True

    def differentiate(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiate the loss of one part, for which alone parameters require gradients.

        Raises:
            RuntimeError: Several parts require gradients, parameters do that cannot be trained any
                more, or gradients were exchanged already.
        """
        part = self._trained_part()
        self._refuse_unfrozen(part)
        if part in self._is_exchanged:
            raise RuntimeError(
                f"manual_backward for `{part}` -> its gradients are exchanged between ranks already"
                " and a second exchange before its step is wrong under ZeRO -> sum the terms and "
                "differentiate once, or keep all but the last back by toggle_model(sync_grad=False)"
            )
        if self._exchanges_gradients:
            self._is_exchanged.add(part)
        self._losses[part] = self._losses.get(part, 0) + loss.detach()
        if part in self.scalers:
            loss = self.scalers[part].scale(loss)
        self.backward_of(part, loss, *args, **kwargs)

    def backward_of(self, part: str, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiate; exchange gradients if `self._exchanges_gradients`."""
        self.module.backward(loss, *args, **kwargs)

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        """Finish a part's gradients (hooks, norm, clipping), and step unless the guard objects."""
        result = closure()  # of a module with one part: forward and backward
        part = self.part_of(optimizer)
        self.finish_gradients(part)
        if part in self.scalers:
            self.scalers[part].unscale_(optimizer)
        self.precision_plugin._after_closure(self.module, optimizer)
        self.step_part(part, optimizer)
        self._is_exchanged.discard(part)
        self._losses.pop(part, None)
        return result

    def finish_gradients(self, part: str) -> None:
        """Bring the gradients into the form that the optimizer steps on."""

    def step_part(self, part: str, optimizer: Optimizer) -> None:
        """Clip and step."""
        gradients = [p.grad for p in self.parameters(part) if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if (largest := self.clip_of(part)) is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters(part), largest, norm)
        norm = norm.to(self.root_device)  # from the host, where shards are offloaded
        self.gradient_norms[part] = norm
        veto = self.judge(part, norm)
        if part in self.scalers:  # too large a scale is found by trying; the scaler then lowers it
            overflow = ~norm.isfinite()
            step_unless(overflow if veto is None else veto | overflow, optimizer)
            self.scalers[part].update()
        else:
            step_unless(veto, optimizer)

    def judge(self, part: str, norm: Tensor) -> Tensor | None:
        """Ask the guard whether a part may step."""
        if self.guard is None or part not in self._losses:
            return None
        return self.guard(part, self._losses[part], norm)

    def _trained_part(self) -> str:
        trained = [
            name
            for name, part in self.parts.items()
            if any(p.requires_grad for p in part.parameters())
        ]
        if len(trained) != 1:
            raise RuntimeError(
                f"manual_backward -> parameters of {' and '.join(trained) or 'no part'} require "
                "gradients, and those of other parts than the one to step would be changed by it "
                "-> differentiate under `with optimizer.toggle_model():` of the part's optimizer"
            )
        return trained[0]

    def _refuse_unfrozen(self, part: str) -> None:
        unfrozen = [p for p in self._frozen[part] if p.requires_grad]
        if not unfrozen:
            return
        driven = set(self.parameters(part))
        if self.trains_unfrozen and driven.issuperset(unfrozen):
            self._frozen[part] = [p for p in self._frozen[part] if not p.requires_grad]
            return
        name = self.parameter_names()[unfrozen[0]]
        why = "no optimizer drives it -> give it to the part's optimizer in configure_optimizers"
        if not self.trains_unfrozen:
            why = (
                f"{type(self).__name__} arranges at the start what is exchanged and stepped, and "
                "would not train it -> let it require gradients when training starts and keep it "
                "by a rate of 0 until then, or use strategy=fsdp or single"
            )
        raise RuntimeError(f"requires_grad of `{name}` -> it was False at the start: {why}")

    # -- state ----------------------------------------------------------------------------------

    def loss_scale_state(self) -> dict[str, Any]:
        """Loss scale of each part under fp16: `scale`, and `steady_steps` since it changed."""
        return {
            part: {"scale": scaler.get_scale(), "steady_steps": scaler._get_growth_tracker()}
            for part, scaler in self.scalers.items()
        }

    def load_loss_scale_state(self, state: Mapping[str, Any]) -> None:
        """Continue with the loss scales of a checkpoint."""
        for part, scaler in self.scalers.items():
            steady = state[part]["steady_steps"] % scaler.get_growth_interval()
            saved = {"scale": state[part]["scale"], "_growth_tracker": steady}
            scaler.load_state_dict(scaler.state_dict() | saved)

    def teardown(self) -> None:
        """Leave parameters where they are: after a failed start some have no storage to move."""
        module, self._lightning_module = self._lightning_module, None
        try:
            super().teardown()
        finally:
            self._lightning_module = module
