"""The program of the ranks of `test_sharded_optimizers.py`: shards against whole tensors.

A case is a strategy, an optimizer where it is not Muon, and words for how it differs:
`zero3_offload_bf16_clip`, `zero2_adafactor_veto`.
"""

import copy
import json
import os
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.multiprocessing.spawn import start_processes

import modules.adafactor
import modules.adamw_rms
import modules.muon
import modules.newton_schulz
import modules.stretches
from modules.adafactor import Adafactor
from modules.adamw_rms import AdamWRMS
from modules.muon import MuonAdamW
from tests.trainers.fsdp_modules import put_together

MATRICES = [(12, 20), (20, 12), (12, 20), (7, 5), (12, 20), (13, 32), (1, 6), (20, 12)]
OTHERS = [(9, 4), (5,), (3,)]
NUM_STEPS = 5
RATES = {"matrix": 0.02, "other": 0.01}
STATE = {
    "muon": ["momentum_buffer"],
    "rms": ["exp_avg", "exp_avg_sq"],
    "adafactor": ["exp_avg_sq_row", "exp_avg_sq_column"],
}
"""What an optimizer remembers of a matrix."""


class Weights(nn.Module):
    """Parameters whose gradients are what `forward` is given."""

    def __init__(self, optimizer):
        super().__init__()
        self.optimizer = optimizer
        draw = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(
            [nn.Parameter(_random(shape, draw)) for shape in [*MATRICES, *OTHERS]]
        )
        self.num_matrices = len(MATRICES)

    def forward(self, gradients):
        pairs = zip(self.weights, gradients, strict=True)
        return sum((weight * g.to(weight.dtype)).sum() for weight, g in pairs)

    def batch(self, step, rank):
        """Gradients, the same on every rank."""
        draw = torch.Generator().manual_seed(100 + step)
        return [_random(shape, draw) * 2**step for shape in [*MATRICES, *OTHERS]]


class Linear(nn.Module):
    """A small network, whose gradients are averages over ranks, and of full rank.

    Where a gradient has none, orthogonalising makes directions out of the last bits of a product,
    which differ by processor.
    """

    def __init__(self, optimizer):
        super().__init__()
        self.optimizer = optimizer
        torch.manual_seed(0)
        self.num_matrices = 4
        self.layers = nn.Sequential(*(nn.Linear(14, 14) for _ in range(self.num_matrices)))

    def forward(self, x):
        target = x.roll(1, 1)
        for layer in self.layers:
            x = layer(x).tanh()
        return (x - target).square().sum()

    def batch(self, step, rank):
        return torch.randn(64, 14, generator=torch.Generator().manual_seed(10 * step + rank))


def _random(shape, draw):  # numbers that bf16 holds exactly
    return torch.randn(shape, generator=draw).bfloat16().float()


def _optimizer(model):
    weights, betas, eps = _weights(model), (0.9, 0.95), 1e-8
    roles = {"matrix": weights[: model.num_matrices], "other": weights[model.num_matrices :]}
    if model.optimizer == "muon":
        return MuonAdamW(roles, lr=RATES, momentum=0.95, weight_decay=0.1, betas=betas, eps=eps)
    groups = [
        {"params": roles["matrix"], "weight_decay": 0.1},
        {"params": roles["other"], "weight_decay": 0.0},
    ]
    if model.optimizer == "rms":
        return AdamWRMS(groups, lr=0.02, betas=betas, eps=eps, min_rms=1e-3)
    moments = {"decay_exponent": 0.8, "clip_rms": 0.9, "eps": 1e-30}
    return Adafactor(groups, lr=0.02, **moments, scale_by_rms=True, min_rms=1e-3)


def _weights(model):
    if isinstance(model, Weights):
        return list(model.weights)
    return [layer.weight for layer in model.layers] + [layer.bias for layer in model.layers]


def _whole_run(make, num_ranks, clip_factors=None, vetoed=()):
    """One rank on whole matrices, with the gradients that `num_ranks` would average."""
    model = make()
    optimizer = _optimizer(model)
    for step in range(NUM_STEPS):
        if step in vetoed:
            continue
        optimizer.zero_grad()
        for rank in range(num_ranks):  # sums as collectives of two ranks do
            model(model.batch(step, rank)).div(num_ranks).backward()
        for weight in _weights(model):
            if clip_factors is not None:
                weight.grad.mul_(clip_factors[step])
        optimizer.step()
    weights = _weights(model)
    return weights, [optimizer.state[w][key] for w, key in _remembered(model)]


def _remembered(model):
    """The matrices with each key of their state."""
    matrices = _weights(model)[: model.num_matrices]
    return [(matrix, key) for matrix in matrices for key in STATE[model.optimizer]]


def _distance(found, expected, make):
    """Largest difference, by how far a parameter has come, or by what is remembered of it."""
    starts = _weights(make())
    scales = [(b - a).norm() for a, b in zip(starts, expected[0], strict=True)]
    scales += [value.norm() for value in expected[1]]
    triples = zip([*found[0], *found[1]], [*expected[0], *expected[1]], scales, strict=True)
    return torch.stack([(a - b).norm() / scale for a, b, scale in triples]).max().item()


def _zero(make, sharding, bf16, clip, vetoed=()):
    import deepspeed

    from trainers.strategies.stretches import lay_out
    from trainers.strategies.zero_shards import find_shards

    model = make()
    optimizer = _optimizer(model)
    inner = copy.copy(optimizer)  # as trainers/strategies/zero.py
    inner.param_groups = [dict(group) for group in optimizer.param_groups]
    inner.state = defaultdict(dict)
    config = {
        "zero_optimization": sharding,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": clip,
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": bf16},
    }
    engine: Any
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=inner, model_parameters=list(model.parameters()), config=config
    )
    lay_out(engine, optimizer)
    factors = []
    for step in range(NUM_STEPS):
        engine.optimizer.optimizer.found_inf = torch.tensor(float(step in vetoed))
        engine.backward(engine(model.batch(step, torch.distributed.get_rank())))
        engine.step()
        norm = torch.as_tensor(engine.optimizer._global_grad_norm)
        factors.append(1.0 / torch.clamp((norm + 1e-6) / clip, min=1.0) if clip else None)
    shards = find_shards(engine)
    state = [
        put_together(shards[w].held(key))
        if key in shards[w].state_keys()
        else shards[w].unsharded()[key]
        for w, key in _remembered(model)
    ]
    found = [shards[weight].get() for weight in _weights(model)], state
    engine.destroy()
    expected = _whole_run(
        make, torch.distributed.get_world_size(), factors if clip else None, vetoed
    )
    return _distance(found, expected, make)


def _fsdp(make, mesh_shape=None, vetoed=(), placement=None, through_state=False):
    from torch.distributed.checkpoint import state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    num_ranks = torch.distributed.get_world_size()
    names = ("replicate", "shard") if mesh_shape else ("shard",)
    mesh = init_device_mesh("cpu", mesh_shape or (num_ranks,), mesh_dim_names=names)
    model = make()
    for layer in getattr(model, "layers", []):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, shard_placement_fn=placement)
    optimizer = _optimizer(model)
    options = state_dict.StateDictOptions(full_state_dict=True)
    for step in range(NUM_STEPS):
        optimizer.found_inf = torch.tensor(float(step in vetoed))
        model(model.batch(step, torch.distributed.get_rank())).backward()
        if step in vetoed:
            for weight in model.parameters():
                weight.grad.fill_(float("nan"))
        optimizer.step()
        optimizer.zero_grad()
        if through_state and step == 2:
            saved = state_dict.get_optimizer_state_dict(model, optimizer, options=options)
            whole = torch.distributed.get_rank() == 0
            options = state_dict.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            optimizer = _optimizer(model)
            state_dict.set_optimizer_state_dict(
                model, optimizer, saved if whole else {}, options=options
            )
    state = [_full(optimizer.state[w][key]) for w, key in _remembered(model)]
    found = [weight.full_tensor() for weight in _weights(model)], state
    return _distance(found, _whole_run(make, num_ranks, None, vetoed), make)


def _full(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def _by_columns(weight):
    return Shard(1) if weight.shape == (12, 20) else None


def _stretches_alone(updates, layouts, owners, group):
    results = []
    for update, layout in zip(updates, layouts, strict=True):
        columns = layout.shape[1] if update.numel() % layout.shape[1] == 0 else update.numel()
        matrix = update.view(-1, columns) if update.numel() else update.view(0, 1)
        results.append(modules.newton_schulz.orthogonalise(matrix[None])[0].reshape(-1))
    return results


def _stretch_alone(values, held):
    return list(values)


def _run(case):
    strategy, *words = case.split("_")
    for batched in (modules.newton_schulz, modules.adafactor):
        batched.LARGEST_BATCH = 300 if "small" in words else 2**26
    for summed in (modules.adafactor, modules.adamw_rms):
        summed.add_up = _stretch_alone if "alone" in words else modules.stretches.add_up
    modules.muon.orthogonalise_stretches = (
        _stretches_alone if "alone" in words else modules.newton_schulz.orthogonalise_stretches
    )
    vetoed = (0, 3) if "veto" in words else ()
    optimizer = next((word for word in words if word in STATE), "muon")
    make = partial(Linear if "linear" in words else Weights, optimizer)
    if strategy == "fsdp":
        mesh = (2, 2) if "hybrid" in words else None
        place = _by_columns if "columns" in words else None
        return _fsdp(make, mesh, vetoed, place, through_state="state" in words)
    sharding: dict[str, Any] = {"stage": int(strategy[-1])}
    if "veto" in words:
        sharding["stage3_param_persistence_threshold"] = 0  # no small parameters stay whole
    if "offload" in words:
        sharding["offload_optimizer"] = {"device": "cpu"}
    if "small" in words:
        sharding["sub_group_size"] = 400  # several flat tensors of one group
    clip = 1.0 if "clip" in words else 0.5 if "linear" in words else 0.0
    return _zero(make, sharding, "bf16" in words, clip, vetoed)


def _rank(rank, num_ranks, out, cases):
    import deepspeed

    os.environ["LOCAL_RANK"] = str(rank)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{out}/store_{num_ranks}", rank=rank, world_size=num_ranks
    )
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    results: dict[str, Any] = {}
    for case in cases:
        try:
            results[case] = _run(case)
        except ValueError as err:
            results[case] = str(err)
    Path(out, f"{num_ranks}_{rank}").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    from trainers.strategies.zero import import_deepspeed

    import_deepspeed("cpu")  # once, for the ranks are forked
    for num, of_num in json.loads(sys.argv[2]).items():
        arguments = int(num), sys.argv[1], of_num
        start_processes(_rank, arguments, nprocs=int(num), start_method="fork")
