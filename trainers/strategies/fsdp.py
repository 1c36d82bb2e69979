"""Every rank holds a shard of each parameter, of its gradient and of its optimizer state (FSDP2).

Weights are gathered around the forward and backward of each block and freed after it; gradients are
averaged into shards. Zhao et al. 2023, arXiv 2304.11277; ZeRO stage 3 of Rajbhandari et al. 2020,
arXiv 1910.02054. FSDP2 (`torch.distributed.fsdp.fully_shard`) cuts each parameter by rows instead
of flattening several, so that shards keep names and optimizers see them as tensors (`DTensor`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import broadcast
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from trainers.stored_tensors import Run, Stored, is_elementwise
from trainers.strategies.fsdp_shards import (
    FusedOnShards,
    Slots,
    follow,
    gather,
    make_mesh,
    run_of,
    take_shard,
    take_stored,
)
from trainers.strategies.initial_values import (
    give_initial_values,
    names_on_meta,
    refuse_buffers_on_meta,
)
from trainers.strategies.parts import PartsStrategy


class FullySharded(PartsStrategy):
    """Parameters, gradients and optimizer state in shards; weights gathered block by block.

    Each part is a root of FSDP2 with the module's `blocks` in it as units. The module has to call
    parts themselves, not their methods or layers. What is in no part stays whole on every rank.

    Shards, the averaging of gradients and the optimizer's state are fp32.

    Args:
        parameters: What weights are gathered in under bf16 and fp16: `fp32`, or `low` for the
            run's precision.
        shard_size: Ranks that share one copy of the model, neighbours in rank; copies average
            their gradients. None: all ranks share one.
        reshard_after_forward: Free a block's weights after its forward and gather them again for
            its backward; else keep them in between: faster, and memory for the whole model.
        cpu_offload: Keep shards, gradients and optimizer state in host memory.
        exchange_every_micro_batch: Average into shards after every micro-batch; else keep whole
            gradients until the last: fewer transfers, and memory for the whole model.
        **options: As `PartsStrategy`.
    """

    shards_parameters = True
    trains_unfrozen = True

    def __init__(
        self,
        *,
        parameters: str,
        shard_size: int | None,
        reshard_after_forward: bool,
        cpu_offload: bool,
        exchange_every_micro_batch: bool,
        **options: Any,
    ):
        super().__init__(**options)
        self.gathered = self.storage_dtype(parameters)
        self.shard_size = shard_size
        self.reshard_after_forward = reshard_after_forward
        self.cpu_offload = cpu_offload
        self.exchange_every_micro_batch = exchange_every_micro_batch
        self.mesh: DeviceMesh | None = None
        self._networks: dict[str, list[nn.Module]] = {}  # of each part; mostly one, itself
        self._slots: dict[nn.Module, Slots] = {}  # of each network

    # -- setting up -----------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Connect the ranks, and lay them out."""
        super().setup_environment()
        device_type = self.root_device.type
        assert self._timeout is not None
        self.mesh = make_mesh(device_type, self.world_size, self.shard_size, self._timeout)

    def _get_process_group_backend(self) -> str:
        if self.cpu_offload and self.root_device.type == "cuda":
            return "cpu:gloo,cuda:nccl"  # norms of gradients on the host are added up there
        return super()._get_process_group_backend()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Lightning calls `configure_model` in there: by then meta parameters have their shards."""
        if names_on_meta(self.module) and hasattr(self.module, "initial_value"):
            self._shard()
        yield

    def model_to_device(self) -> None:
        """Shard what is not sharded yet, and move all else to the device."""
        self._shard()

    def _shard(self) -> None:
        refuse_buffers_on_meta(self.module)
        self.release_weights()
        on_meta = names_on_meta(self.module)
        for name, part in self.parts.items():
            self._networks[name] = list(self._roots(part))
            for network in self._networks[name]:
                if not isinstance(network, FSDPModule):
                    self._shard_network(name, network)
        self.module._apply(self._placed)
        self.module._device = self.root_device  # what `LightningModule.to` notes
        give_initial_values(self.module, on_meta, lambda _, __, p, value: take_shard(p, value))
        for network in (n for networks in self._networks.values() for n in networks):
            if network not in self._slots:
                self._finish(network)
        self._refuse_whole_parameters()

    def _roots(self, part: nn.Module) -> Iterator[nn.Module]:
        """Networks whose calls gather a part: itself, or its members if nobody calls it."""
        if part is self.module or isinstance(part, nn.ModuleList | nn.ModuleDict):
            for child in part.children():
                yield from self._roots(child)
        elif next(part.parameters(), None) is not None:
            yield part

    def _shard_network(self, part: str, network: nn.Module) -> None:
        """Apply FSDP2 to the blocks in a network and to the network, inner ones first."""
        # A gradient differentiated once more needs the weights between its own backward passes,
        # where FSDP2 would have freed them.
        is_twice = part in getattr(self.module, "double_backward", ())
        policy = MixedPrecisionPolicy()
        if self.gathered != torch.float32:  # autocast says what is computed in it, not FSDP2
            policy = MixedPrecisionPolicy(self.gathered, torch.float32, cast_forward_inputs=False)
        offload = OffloadPolicy()
        if self.cpu_offload:
            offload = CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda")
        blocks = set(getattr(self.module, "blocks", None) or ())
        for unit in reversed(list(network.modules())):
            if unit is not network and unit not in blocks:
                continue
            self._agree(unit)
            # None: FSDP2 keeps what a root gathers, for its backward comes next.
            reshard = None if unit is network else self.reshard_after_forward
            fully_shard(
                unit,
                mesh=self.mesh,
                reshard_after_forward=False if is_twice else reshard,
                mp_policy=policy,
                offload_policy=offload,
            )
        if is_twice:
            network.set_reshard_after_backward(False)  # type: ignore[operator]

    def _agree(self, unit: nn.Module) -> None:
        """Take values that exist already from rank 0, as DDP does."""
        for tensor in (*unit.parameters(), *unit.buffers()):
            if not isinstance(tensor, DTensor) and not tensor.is_meta:
                tensor.data = tensor.data.to(self.root_device).contiguous()
                broadcast(tensor.data, src=0)

    def _placed(self, tensor: Tensor) -> Tensor:
        is_offloaded = self.cpu_offload and isinstance(tensor, DTensor)
        device = torch.device("cpu") if is_offloaded else self.root_device
        if tensor.is_meta:
            return torch.empty_like(tensor, device=device)
        return tensor.to(device)

    def _finish(self, network: nn.Module) -> None:
        """Let FSDP2 settle, with every parameter trainable, and follow what is toggled later.

        It settles at the first forward otherwise, and would take a part that is frozen then for
        one whose gradients need no fp32.
        """
        shards = [p for p in network.parameters() if p.is_floating_point()]
        trained = [parameter.requires_grad for parameter in shards]
        for parameter in shards:
            parameter.requires_grad_(True)
        fully_shard.state(network)._lazy_init()  # type: ignore[attr-defined]
        for parameter, is_trained in zip(shards, trained, strict=True):
            parameter.requires_grad_(is_trained)
        slots = self._slots[network] = [
            (leaf, name, parameter)
            for leaf in network.modules()
            for name, parameter in leaf.named_parameters(recurse=False)
        ]
        network.register_forward_pre_hook(lambda *_: follow(slots))

    def _refuse_whole_parameters(self) -> None:
        for part in self.parts.values():
            for name, parameter in part.named_parameters():
                if not isinstance(parameter, DTensor):
                    raise ValueError(
                        f"strategy=fsdp -> the parameter `{name}` is in no network whose call "
                        "would gather it -> move it into an nn.Module that training_step calls"
                    )

    # -- a step ---------------------------------------------------------------------------------

    def differentiate(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiate the loss of one part; weights that are gathered are toggled as shards."""
        for slots in self._slots.values():
            follow(slots)
        super().differentiate(loss, *args, **kwargs)

    def backward_of(self, part: str, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiate, and average into shards as the settings and the micro-batch have it."""
        is_last = self._exchanges_gradients
        for network in self._networks[part]:
            assert isinstance(network, FSDPModule)
            network.set_requires_gradient_sync(is_last or self.exchange_every_micro_batch)
            network.set_requires_all_reduce(is_last)  # between copies of the model
            network.set_is_last_backward(is_last)
        super().backward_of(part, loss, *args, **kwargs)

    def step_part(self, part: str, optimizer: Optimizer) -> None:
        """Clip and step."""
        with FusedOnShards():
            super().step_part(part, optimizer)

    def finish_gradients(self, part: str) -> None:
        """Leave only shards: weights that stay gathered over the step would be the old ones."""
        self.release_weights()

    # -- state ----------------------------------------------------------------------------------

    def release_weights(self) -> None:
        """Leave only shards."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def whole(self, value: Tensor) -> Tensor:
        """As `PartsStrategy.whole`, by way of the device where shards are elsewhere."""
        return gather(value, self.root_device)

    def held(self, value: Tensor) -> Run:
        """This rank's rows."""
        if not isinstance(value, DTensor):
            return super().held(value)
        run, is_mine = run_of(value)
        return run if is_mine else run.without_values()

    def take(self, value: Tensor, stored: Stored) -> None:
        """Read this rank's rows; nothing is sent."""
        take_stored(value, stored)

    def held_state(self, optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
        """As `PartsStrategy.held_state`, this rank's rows; what is smaller is gathered."""
        state = optimizer.state.get(parameter, {})
        return {
            key: self.held(value)
            if is_elementwise(key, value, parameter.shape)
            else gather(value, self.root_device)
            for key, value in state.items()
        }

    def take_state(
        self, optimizer: Optimizer, parameter: nn.Parameter, key: str, value: Any
    ) -> None:
        """Read what has a value for each element as the parameter is cut; take others whole."""
        if isinstance(value, Stored):
            shard = torch.empty_like(parameter, dtype=value.dtype)
            take_stored(shard, value)
            value = shard
        super().take_state(optimizer, parameter, key, value)
