"""A run whose checkpoint was written in format 2 goes on as from its own."""

import hashlib
import json
import shutil

import torch
from safetensors.torch import save_file
from torch import equal

from trainers.checkpoint import load_weights, open_checkpoint, verify


def rewrite_in_format_2(path):
    """As trainyard wrote it then: weights whole in one file, all else in `state.pt`."""
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
    manifest = {key: stored.manifest[key] for key in ("step", "versions", "strategy")}
    state = stored.state | {"optimizer_states": states}
    shutil.rmtree(path)
    path.mkdir()
    save_file(weights, path / "weights.safetensors", metadata={"format": "pt"})
    torch.save(state, path / "state.pt")
    files = {}
    for name in ("weights.safetensors", "state.pt"):
        content = (path / name).read_bytes()
        digest = hashlib.blake2b(content, digest_size=32).hexdigest()
        files[name] = {"bytes": len(content), "blake2b": digest}
    manifest |= {"format": 2, "files": files, "world_size": 1, "data_digest": None}
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1))


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
