"""DeepSpeed ZeRO: optimizer state (1), gradients (2) and parameters (3) in shards.

Rajbhandari et al. 2019, arXiv 1910.02054. DeepSpeed wants one engine per model; a module with
several parts gets one engine for each, with its own stage and clipping. The module goes on calling
its plain networks (ZeRO-3's hooks fire there too), so that gradients may be differentiated twice.

What DeepSpeed would default silently is written out in `deepspeed_settings`, and what goes wrong
silently there is refused by `PartsStrategy.differentiate`.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from trainers.stored_tensors import Run, Stored
from trainers.strategies.deepspeed_settings import (
    complete_config,
    import_deepspeed,
    read_scale,
    set_scale,
)
from trainers.strategies.gradient_order import GradientOrder
from trainers.strategies.initial_values import give_initial_values
from trainers.strategies.parts import PartsStrategy
from trainers.strategies.precision import StepCalledOff, call_off
from trainers.strategies.stretches import lay_out
from trainers.strategies.zero_shards import (
    ShardedParameter,
    find_shards,
    refresh,
    run_of_frozen,
    trained_copy,
)


class ZeRO(PartsStrategy):
    """A DeepSpeed engine for each part.

    The optimizer that the module makes stays what the module, its schedule and Lightning see, with
    the real parameters; DeepSpeed turns a copy of it to its flat shards, and takes rates from it.

    Args:
        stage: 1, 2 or 3.
        part_stages: Stage of a part where it differs. A part whose gradients are differentiated
            twice is at most at stage 2, which alone can.
        parameters: What the model's parameters are kept and sent in under bf16: `fp32`, or `low`
            for bf16 beside fp32 masters. In fp16 they are always low, for DeepSpeed to scale.
        config: DeepSpeed's own configuration, as in its documentation.
        **options: As `PartsStrategy`.
    """

    def __init__(
        self,
        *,
        stage: int,
        part_stages: Mapping[str, int],
        parameters: str,
        config: Mapping[str, Any],
        **options: Any,
    ):
        super().__init__(**options)
        is_fp16 = self.dtype == torch.float16
        self.storage = self.storage_dtype("low" if is_fp16 else parameters)
        self.stage, self.part_stages, self.config = stage, dict(part_stages), dict(config)
        self.shards_parameters = 3 in (stage, *self.part_stages.values())
        self.engines: dict[str, Any] = {}
        self.shards: dict[Tensor, ShardedParameter] = {}
        self.gradient_order = GradientOrder()
        self._veto: Tensor | None = None
        self._is_judged = False

    def stage_of(self, part: str) -> int:
        """ZeRO stage of a part."""
        is_twice = part in getattr(self.module, "double_backward", ())
        return self.part_stages.get(part, min(self.stage, 2) if is_twice else self.stage)

    def deepspeed_config(self, part: str) -> dict[str, Any]:
        """DeepSpeed's configuration for a part."""
        return complete_config(
            self.config, stage=self.stage_of(part), clip=self.clip_of(part), dtype=self.storage
        )

    # -- setting up -----------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Connect the ranks, and tell DeepSpeed about them."""
        super().setup_environment()
        deepspeed = import_deepspeed(self.root_device.type)
        os.environ["LOCAL_RANK"] = str(self.local_rank)  # where it looks for the device
        deepspeed.init_distributed(dist_backend=self.process_group_backend, verbose=False)
        # Its groups would have torch's default, which may be shorter than a run wants.
        backend = deepspeed.comm.comm.cdb
        backend.new_group = partial(torch.distributed.new_group, timeout=self._timeout)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Give parts at stage 3 that are on the meta device storage and values, in shards."""
        for name, part in self.parts.items():
            if self.stage_of(name) == 3 and any(p.is_meta for p in part.parameters()):
                self._fill_in_shards(part, self.deepspeed_config(name))
        yield

    def _fill_in_shards(self, part: nn.Module, config: dict[str, Any]) -> None:
        """Only one whole parameter exists at a time."""
        deepspeed = import_deepspeed(self.root_device.type)
        zero_init = deepspeed.zero.Init(config_dict_or_path=config, dtype=self.storage)
        own = set(part.parameters())
        names = [n for n, p in self.module.named_parameters() if p.is_meta and p in own]

        def keep(leaf: nn.Module, name: str, parameter: nn.Parameter, value: Tensor) -> None:
            filled = nn.Parameter(value.to(self.storage), requires_grad=parameter.requires_grad)
            for module in self.module.modules():  # everywhere it is used
                for key, other in module._parameters.items():
                    if other is parameter:
                        module._parameters[key] = filled
            zero_init._convert_to_zero_parameters([filled])

        give_initial_values(self.module, names, keep)

    def distribute(self) -> None:
        """Move what no engine will; remember the fp32 values that engines are about to round."""
        sharded = {
            parameter
            for name, part in self.parts.items()
            if self.stage_of(name) == 3
            for parameter in part.parameters()
        }
        self.module._apply(lambda t: t if t in sharded else t.to(self.root_device))
        self.module._device = self.root_device  # what `LightningModule.to` notes
        self._originals = {
            name: parameter.data
            for name, parameter in self.module.named_parameters()
            if self.storage != torch.float32 and not hasattr(parameter, "ds_id")
        }

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Let the module sort its parameters by shapes, which stage 3 has emptied."""
        emptied = {p: p.data for p in self.module.parameters() if hasattr(p, "ds_shape")}
        for parameter, data in emptied.items():
            shape = parameter.ds_shape  # type: ignore[attr-defined]
            parameter.data = data.new_empty(1).expand(shape)  # no memory
        super().setup_optimizers(trainer)
        for parameter, data in emptied.items():
            parameter.data = data

    def distribute_optimizers(self) -> None:
        """Make an engine of each part and a copy of its optimizer."""
        deepspeed = import_deepspeed(self.root_device.type)
        for (name, part), optimizer in zip(self.parts.items(), self.optimizers, strict=True):
            inner = trained_copy(optimizer)
            engine, *_ = deepspeed.initialize(
                model=part,
                optimizer=inner,
                model_parameters=[p for p in part.parameters() if p.requires_grad],
                config=self.deepspeed_config(name),
            )
            if self.dtype == torch.float16:  # the guard says when to give up, and why
                engine.optimizer.loss_scaler.raise_error_at_min_scale = False
            inner.register_step_pre_hook(lambda *_, part=name: self._before_inner_step(part))
            self.engines[name] = engine
            if self.stage_of(name) < 3:
                self.gradient_order.watch(engine.optimizer)
            lay_out(engine, optimizer)
            self.shards.update(find_shards(engine))
        if self.storage != torch.float32:
            self._restore_digits()

    def _restore_digits(self) -> None:
        """Start from the masters that other strategies start from, not from rounded values."""
        for name, parameter in self.module.named_parameters():
            if parameter in self.shards:
                if (value := self._originals.get(name)) is None:
                    value = self.module.initial_value(name)  # type: ignore
                self.shards[parameter].take(Stored.of(value))
        self._originals = {}

    # -- a step ---------------------------------------------------------------------------------

    def backward_of(self, part: str, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiate by the part's engine."""
        engine = self.engines[part]
        engine.set_gradient_accumulation_boundary(self._exchanges_gradients)
        # What `engine.forward` would arrange, had the module called it.
        engine.optimizer.clear_backward_seen_flag()
        if loss.requires_grad:
            loss.register_hook(lambda gradient: engine._backward_prologue())
        engine.backward(loss, *args, scale_wrt_gas=False, **kwargs)

    def step_part(self, part: str, optimizer: Optimizer) -> None:
        """Clip and step by the part's engine; rates are those of the module's optimizer."""
        engine = self.engines[part]
        inner = engine.optimizer.optimizer
        trained = (g for g in optimizer.param_groups if any(p in self.shards for p in g["params"]))
        for mine, theirs in zip(trained, inner.param_groups, strict=True):
            theirs |= {key: value for key, value in mine.items() if key != "params"}
        self._is_judged, self._veto = False, None
        engine.step()
        optimizer._opt_called = True  # type: ignore[attr-defined]  # its schedule asks
        if not self._is_judged:  # DeepSpeed found the gradient not finite and did not step
            self.judge(part, self._norm(part))
        self.gradient_norms[part] = self._norm(part)

    def _before_inner_step(self, part: str) -> None:
        """DeepSpeed steps its copy group by group; the guard judges the step once."""
        inner = self.engines[part].optimizer.optimizer
        if not self._is_judged:
            self._is_judged = True
            self._veto = self.judge(part, self._norm(part))
        if self._veto is not None:
            try:
                call_off(inner, self._veto)
            except StepCalledOff as reason:
                assert self.guard is not None
                self.guard.check(self.module.trainer)  # it may know that the run ends, and why
                raise ValueError(
                    f"trainer.guard -> a step is to be left out, and {type(inner).__name__} cannot "
                    "do that in a DeepSpeed engine -> make the optimizer with fused=True"
                ) from reason

    def _norm(self, part: str) -> Tensor:
        norm = self.engines[part].optimizer._global_grad_norm
        norm = torch.as_tensor(norm, dtype=torch.float32, device=self.root_device)
        return norm.where(norm >= 0, torch.inf)  # -1 where it was not finite and not looked at

    # -- state ----------------------------------------------------------------------------------

    def whole(self, value: Tensor) -> Tensor:
        """A master, put together; what is a copy of it or has none, as the model uses it."""
        is_copy = self.storage == torch.float32 and not hasattr(value, "ds_id")
        if value in self.shards and not is_copy:
            return self.shards[value].get()
        with self._gathered(value):
            whole = value.detach().clone()
        return whole.float() if isinstance(value, nn.Parameter) else whole

    def held(self, value: Tensor) -> Run:
        """This rank's run of a master; of what has none, as the model uses it."""
        if value in self.shards or hasattr(value, "ds_id"):
            return self.shards[value].held() if value in self.shards else run_of_frozen(value)
        return Run.whole(value.float()) if isinstance(value, nn.Parameter) else super().held(value)

    def take(self, value: Tensor, stored: Stored) -> None:
        """Set this rank's run of a master; what has none, as the model uses it."""
        if value in self.shards:
            self.shards[value].take(stored)
            return
        with self._gathered(value, modifier_rank=0):
            value.detach().copy_(stored.whole())

    def _gathered(self, value: Tensor, **options: Any) -> AbstractContextManager[None]:
        if not hasattr(value, "ds_id"):
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters([value], **options)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """As `PartsStrategy.load_model_state_dict`; the model's parameters follow their masters."""
        super().load_model_state_dict(checkpoint, strict)
        for engine in self.engines.values():
            refresh(engine)

    def held_state(self, optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
        """As `PartsStrategy.held_state`, of DeepSpeed's; nothing of what is not trained."""
        if (shard := self.shards.get(parameter)) is None:
            return {}
        return {key: shard.held(key) for key in shard.state_keys()} | shard.unsharded()

    def take_state(
        self, optimizer: Optimizer, parameter: nn.Parameter, key: str, value: Any
    ) -> None:
        """Give DeepSpeed's optimizer this rank's run; it steps on nothing that is not trained."""
        if parameter in self.shards:
            self.shards[parameter].set_state(key, value)

    def loss_scale_state(self) -> dict[str, Any]:
        """As `PartsStrategy.loss_scale_state`, and DeepSpeed's `hysteresis` left."""
        if self.dtype != torch.float16:
            return {}
        return {part: read_scale(e.optimizer.loss_scaler) for part, e in self.engines.items()}

    def load_loss_scale_state(self, state: Mapping[str, Any]) -> None:
        """Continue with the loss scales of a checkpoint."""
        for part, saved in state.items():
            set_scale(self.engines[part].optimizer.loss_scaler, saved)

    def teardown(self) -> None:
        """Take DeepSpeed's hooks and buffers off the parts."""
        for engine in self.engines.values():
            engine.destroy()
        self.engines, self.shards = {}, {}
        super().teardown()
