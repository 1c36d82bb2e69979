"""Runs that start from what others wrote."""

import warnings

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from trainers.checkpoint import load_weights, open_checkpoint
from trainers.distributed_checkpoint import write_dcp

SHORT = ["max_steps=1", "module.schedule.warmup_samples=0"]


def test_weights_of_a_distributed_checkpoint_start_a_run(small_run, train, tmp_path):
    run = train(*small_run, "max_steps=5")
    stored = open_checkpoint(run.find_checkpoint("last"))
    write_dcp(stored, tmp_path / "dcp")
    low, prefixed = tmp_path / "low", tmp_path / "prefixed"
    write_dcp(stored, low, torch.bfloat16)
    content = {"model": load_weights(stored.path), "optimizer": {"exp_avg": torch.ones(3)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        save(content, checkpoint_id=prefixed, no_dist=True)
    sources = {"run": run.path, "dcp": tmp_path / "dcp", "prefixed": prefixed, "low": low}
    found = {}
    for name, source in sources.items():
        began = train(*small_run, *SHORT, f"run.name={name}", f"init_from={source}")
        found[name] = load_weights(began.find_checkpoint("last"))
    for name, value in found["run"].items():
        assert torch.equal(found["dcp"][name], value)
        assert torch.equal(found["prefixed"][name], value)
        assert found["low"][name].dtype == value.dtype
    name = next(name for name, value in found["run"].items() if value.ndim == 2)
    assert not torch.equal(found["low"][name], found["run"][name])
    wide = ["module.network.width=64", "run.name=wide", f"init_from={tmp_path / 'dcp'}"]
    with pytest.raises(ValueError, match=r"init_from=.*dcp -> its weights do not fit .*size misma"):
        train(*small_run, *SHORT, *wide)
