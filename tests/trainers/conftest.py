"""A small checkpoint, for the tests of what is in one."""

import pytest
import torch

from trainers.checkpoint_writer import CheckpointDirectory


@pytest.fixture
def content():
    """As Lightning gives it to be saved."""
    torch.manual_seed(0)
    return {
        "state_dict": {"a.weight": torch.randn(3, 4), "b": torch.arange(5)},
        "global_step": 7,
        "optimizer_states": [{"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": []}],
        "loops": {"fit_loop": {"epoch": 0}},
    }


@pytest.fixture
def saved(content, tmp_path):
    """Its directory."""
    path = tmp_path / "step-00000007"
    CheckpointDirectory({"strategy": "ddp"}).save_checkpoint(content, path)
    return path
