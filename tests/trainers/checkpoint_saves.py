"""What tests of checkpoints save, and ranks that are threads of one process."""

import hashlib
import json
import threading

import torch
from safetensors.torch import save_file

from trainers.callbacks.checkpointing import Checkpointing
from trainers.checkpoint_writer import CheckpointDirectory
from trainers.stored_tensors import Run, deal


class Surprise:
    """An object whose unpickling would run code."""

    def __reduce__(self):
        return (print, ("code from a checkpoint ran",))


def lightning_content(step, value=None):
    """Lightning's dictionary of a small run: its tensors are full of `value`."""
    value = float(step if value is None else value)
    weight = torch.full((3, 4), value)
    state = {"step": torch.tensor(value), "exp_avg": Run.whole(torch.full((3, 4), value))}
    return {
        "state_dict": {"a.weight": weight, "count": torch.tensor(int(value)), "tied": weight},
        "global_step": step,
        "optimizer_states": [
            {"state": {"a.weight": state}, "param_groups": [{"lr": 0.1, "params": ["a.weight"]}]}
        ],
        "loops": {"fit_loop": {"epoch": 0}},
    }


def write_format_2(path, weights, state, **facts):
    """As trainyard wrote it then: weights whole in one file, all else in `state.pt`."""
    path.mkdir()
    save_file(weights, path / "weights.safetensors", metadata={"format": "pt"})
    torch.save(state, path / "state.pt")
    files = {}
    for name in ("weights.safetensors", "state.pt"):
        content = (path / name).read_bytes()
        digest = hashlib.blake2b(content, digest_size=32).hexdigest()
        files[name] = {"bytes": len(content), "blake2b": digest}
    manifest = facts | {"format": 2, "files": files, "data_digest": None}
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1))


def policy(directory, **settings):
    """The callback that says what is kept."""
    settings = {"keep_last": 1, "keep_every_steps": None, "max_gib": None} | settings
    return Checkpointing(
        directory,
        every_steps=1,
        every_minutes=None,
        monitor="val/loss",
        guard=None,
        vote=None,
        **settings,
    )


def save_as_a_run_does(directory, step, best=None, value=None, writer=None, **settings):
    """Save a step, and move the pointers."""
    name = f"step-{step:08d}"
    writer = writer or CheckpointDirectory({"strategy": "single"})
    writer.save_checkpoint(
        lightning_content(step, value),
        directory / name,
        lambda: policy(directory, **settings)._point_to(name, best),
    )


class OneOfSeveral(CheckpointDirectory):
    """The writer of a rank that is a thread of this process."""

    def __init__(self, rank, num_ranks, barrier, token="launch", asynchronous=False):
        super().__init__({"strategy": "ddp"}, asynchronous=asynchronous)
        self.own_rank, self.own_num_ranks, self.barrier = rank, num_ranks, barrier
        self.token = token

    @property
    def rank(self):
        return self.own_rank

    @property
    def num_ranks(self):
        return self.own_num_ranks

    def _barrier(self):
        self.barrier.wait(timeout=30)


def ranks(num_ranks, **options):
    """Their writers."""
    barrier = threading.Barrier(num_ranks)
    return [OneOfSeveral(rank, num_ranks, barrier, **options) for rank in range(num_ranks)]


def held_by(rank, num_ranks, step, value=None):
    """What one of several ranks gives to its writer: its share of what all have, and a run."""
    content = lightning_content(step, value)
    runs = {name: Run.whole(tensor) for name, tensor in content["state_dict"].items()}
    runs["tied"] = runs["a.weight"]
    dealt = deal(runs, rank, num_ranks)
    dealt["tied"] = dealt["a.weight"]
    piece = torch.full((5,), float(rank))
    dealt["sharded"] = Run(torch.Size([num_ranks, 5]), 5 * rank, piece)
    state = content["optimizer_states"][0]["state"]["a.weight"]
    state["exp_avg"] = deal({"it": state["exp_avg"]}, rank, num_ranks)["it"]
    return content | {"state_dict": dealt}


def at_once(functions):
    """Run one function a thread; give what they returned or raised."""
    results: list[object] = [None] * len(functions)

    def work(index):
        try:
            results[index] = functions[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results


def spoil(file, damage):
    """Flip a bit of a file, cut it, or remove it."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    if damage != "remove":
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
