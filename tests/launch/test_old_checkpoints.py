"""A run whose checkpoint was written in format 2 goes on as from its own."""

import shutil

import torch
from torch import equal

from tests.trainers.checkpoint_saves import write_format_2
from trainers.checkpoint import load_weights, open_checkpoint, verify


def rewrite_in_format_2(path):
    """Replace a checkpoint by what trainyard would have written then."""
    stored = open_checkpoint(path)
    weights = {name: tensor.clone() for name, tensor in load_weights(path).items()}
    states = [
        {
            **saved,
            "state": {
                name: {k: v if isinstance(v, torch.Tensor) else v.whole() for k, v in each.items()}
                for name, each in saved["state"].items()
            },
        }
        for saved in stored.optimizer_states
    ]
    facts = {key: stored.manifest[key] for key in ("step", "versions", "strategy")}
    state = stored.state | {"optimizer_states": states}
    shutil.rmtree(path)
    write_format_2(path, weights, state, world_size=1, **facts)


def test_run_goes_on_from_format_2_as_from_format_3(small_run, train):
    run = train(*small_run, "max_steps=10")
    longer = [*small_run, "resume.extend=true", "max_steps=15"]
    other = run.path.with_name("other")
    shutil.copytree(run.path, other)
    rewrite_in_format_2(other / "checkpoints" / "step-00000010")
    assert verify(other / "checkpoints" / "step-00000010")["format"] == 2
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("name: small", "name: other"))
    found = [
        load_weights(train(*longer, f"run.name={name}").find_checkpoint("last"))
        for name in ("small", "other")
    ]
    assert all(equal(value, found[1][name]) for name, value in found[0].items())
    assert not equal(found[0]["network.norm.weight"], torch.ones(32))
