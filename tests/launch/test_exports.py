"""Exports: any checkpoint as safetensors files, bit for bit, a tensor at a time."""

import gc
import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from launch.export import build_without_values, export_run, stored_networks
from launch.initial_weights import load_initial_weights
from tests.launch.gathered_weights import GATHERED
from trainers.checkpoint import open_checkpoint, verify
from trainers.checkpoint_parts import Save, finish, read_part, write_files
from trainers.safetensors_file import TensorFile
from trainers.stored_tensors import Run, Stored


class Tied(nn.Module):
    """A network with one parameter under two names, another one cut, and buffers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7)
        self.head.weight = self.embedding.weight
        self.register_buffer("count", torch.arange(3))
        self.register_buffer("flag", torch.tensor(True))


def cut(value, fractions):
    """Runs of a tensor for as many ranks, of different lengths, some of no element."""
    ends = [round(f * value.numel()) for f in (0, *fractions)]
    flat = value.detach().flatten()
    return [Run(value.shape, a, flat[a:b]) for a, b in pairwise(ends)]


def save_cut(weights, aliases, path, ranks):
    """Write a checkpoint in which every tensor is cut in other places."""
    draw = torch.Generator().manual_seed(0)
    cuts = {}
    for name, value in weights.items():
        fractions = torch.rand(ranks - 1, generator=draw).sort().values.tolist()
        cuts[f"weights/{name}"] = cut(value, [*fractions, 1.0])
    saves = [
        Save(
            path=path,
            scratch=path.with_name(".scratch"),
            runs={name: runs[rank] for name, runs in cuts.items()},
            aliases={f"weights/{a}": f"weights/{b}" for a, b in aliases.items()},
            state=b"",
            step=3,
        )
        for rank in range(ranks)
    ]
    for rank, save in enumerate(saves):
        write_files(save, rank, ranks)
    finish(saves[0], [read_part(saves[0].scratch, rank) for rank in range(ranks)], {})


@pytest.fixture
def run(small_run, train):
    return train(*small_run, "max_steps=2", "module.schedule.warmup_samples=0")


def test_checkpoint_in_uneven_pieces_is_exported_bit_for_bit(run, compose, tmp_path):
    whole = load_file(run.find_checkpoint("last") / "weights.safetensors")
    path = tmp_path / "step-00000003"
    save_cut(whole, {}, path, ranks=3)
    verify(path)
    places = [TensorFile(file).places for file in path.glob("weights-*.safetensors")]
    sizes = [sum(place.numel for place in each.values()) for each in places]
    assert len(sizes) == 3
    assert max(sizes) > 1.05 * min(sizes)
    export_run(compose("export", [f"run={run.path}", f"checkpoint={path}"]))
    exported = load_file(run.path / "exports" / "step-00000003" / "model.safetensors")
    assert exported.keys() == {name.removeprefix("network.") for name in whole}
    assert all(torch.equal(exported[n.removeprefix("network.")], whole[n]) for n in whole)
    facts = json.loads((run.path / "exports" / "step-00000003" / "config.json").read_text())
    assert facts["configuration"]["module"] == facts["module"]
    assert facts["configuration"]["plan"]["max_steps"] == 2
    assert facts["tied"] == {"model": {}}


def test_export_rounds_to_the_dtype_that_is_asked_for(run, compose):
    whole = load_file(run.find_checkpoint("last") / "weights.safetensors")
    for name, dtype in {"bf16": torch.bfloat16, "fp16": torch.float16}.items():
        export_run(compose("export", [f"run={run.path}", f"dtype={name}"]))
        file = run.path / "exports" / "step-00000002" / "model.safetensors"
        exported = load_file(file)
        assert all(torch.equal(v, whole[f"network.{n}"].to(dtype)) for n, v in exported.items())
    with pytest.raises(ValueError, match="dtype=int8 -> unknown -> use fp32, bf16, fp16"):
        export_run(compose("export", [f"run={run.path}", "dtype=int8"]))


def test_value_beyond_the_range_of_fp16_is_named_and_leaves_no_file(run, compose):
    path = run.path / "checkpoints" / "step-00000003"
    whole = load_file(run.find_checkpoint("last") / "weights.safetensors")
    whole["network.norm.weight"][3] = 7e4
    save_cut(whole, {}, path, ranks=2)
    overrides = [f"run={run.path}", "checkpoint=step-00000003", "dtype=fp16"]
    with pytest.raises(ValueError, match=r"norm.weight: 1 value\(s\) or more are beyond .* bf16"):
        export_run(compose("export", overrides))
    assert [*(run.path / "exports").rglob("*model*")] == []
    export_run(compose("export", [*overrides[:2], "dtype=bf16"]))


def test_value_that_is_not_in_the_checkpoint_is_named(run, compose):
    path = run.path / "checkpoints" / "step-00000003"
    whole = load_file(run.find_checkpoint("last") / "weights.safetensors")
    other = whole | {"network.norm.weight": torch.zeros(3)}
    save_cut(other, {}, path, ranks=2)
    overrides = [f"run={run.path}", "checkpoint=step-00000003"]
    message = r"`network.norm.weight` is \[3\] in it, and \[32\] in the run's module"
    with pytest.raises(ValueError, match=message):
        export_run(compose("export", overrides))
    del whole["network.norm.weight"]
    save_cut(whole, {}, path, ranks=2)
    with pytest.raises(ValueError, match=r"`network.norm.weight` is not in it"):
        export_run(compose("export", overrides))


def test_tied_names_and_buffers_are_found_by_what_they_are(tmp_path):
    module = nn.Module()
    module.part = Tied()
    own = module.state_dict()
    aliases = {"part.head.weight": "part.embedding.weight"}
    saved = {name: value for name, value in own.items() if name not in aliases}
    save_cut(saved, aliases, tmp_path / "step-00000003", ranks=3)
    stored = open_checkpoint(tmp_path / "step-00000003").weights
    found = stored_networks(module.to("meta"), stored, "x")["model"]
    assert found.keys() == own.keys()
    assert found["part.head.weight"] is found["part.embedding.weight"]
    assert all(torch.equal(found[name].whole(), own[name]) for name in own)
    assert {n: found[f"part.{n}"].to(torch.bfloat16).dtype for n in ("count", "flag")} == {
        "count": torch.int64,
        "flag": torch.bool,
    }


def test_network_that_is_no_part_of_the_module_is_refused():
    module = nn.Linear(2, 2)
    module.exports = {"copy": nn.Linear(2, 2)}
    stored = {name: Stored.of(value) for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"`copy: weight` is no value of the module"):
        stored_networks(module, stored, "x")


class Stubborn(nn.Module):
    """Cannot be built without values."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.largest = float(self.layer.weight.max())


def test_module_that_needs_values_is_built_with_them(compose, capfd):
    config = compose("train", ["experiment=gpt_char_cpu"])
    config.module = {"_target_": "tests.launch.test_exports.Stubborn"}
    assert not build_without_values(config).layer.weight.is_meta
    assert "note: module=Stubborn is held in memory" in capfd.readouterr().err


def test_tied_parameters_stay_one_when_a_run_starts_from_weights(run, compose, tmp_path):
    first, module = Tied(), Tied()
    own = first.state_dict()
    del own["head.weight"]
    save_cut(own, {"head.weight": "embedding.weight"}, tmp_path / "step-00000003", ranks=2)
    (tmp_path / "step-00000003" / "state.pt").write_bytes(b"")
    config = compose("train", ["experiment=gpt_char_cpu", f"init_from={tmp_path}/step-00000003"])
    load_initial_weights(module, config)
    assert module.head.weight is module.embedding.weight
    assert torch.equal(module.head.weight, first.head.weight)
    assert len([*module.parameters()]) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_3_of_two_ranks_is_exported_as_its_gathered_weights(
    small_run, train, compose, precision
):
    small = "strategy.make.config.zero_optimization.stage3_param_persistence_threshold=100"
    ranks = ["strategy=zero3", "trainer.devices=2", f"precision={precision}", small]
    run = train(*small_run, *ranks, "max_steps=4", "module.schedule.warmup_samples=0", GATHERED)
    checkpoint = run.find_checkpoint("last")
    assert len([*checkpoint.glob("weights-*-of-00002.safetensors")]) == 2
    export_run(compose("export", [f"run={run.path}"]))
    exported = load_file(run.path / "exports" / checkpoint.name / "model.safetensors")
    gathered = load_file(run.path / "gathered.safetensors")
    assert {f"network.{name}" for name in exported} == gathered.keys()
    assert all(torch.equal(value, gathered[f"network.{n}"]) for n, value in exported.items())
    gc.collect()  # the agent leaves its files open
