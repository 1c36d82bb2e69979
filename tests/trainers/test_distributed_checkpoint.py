"""torch's distributed checkpoints, against torch itself and against crafted ones."""

import os
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.state_dict_loader import load as load_dcp
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.trainers.checkpoint_saves import lightning_content
from trainers import distributed_checkpoint
from trainers.checkpoint import load_weights, open_checkpoint
from trainers.checkpoint_writer import CheckpointDirectory
from trainers.distributed_checkpoint import METADATA, load_dcp_weights, open_dcp, write_dcp


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(5, 4, 3),
        "scale": torch.tensor(2.5),
        "low": torch.randn(7).bfloat16(),
        "nothing": torch.zeros(0, 3),
        "count": torch.arange(6).view(2, 3),
        "mask": torch.tensor([True, False]),
    }


def save(content, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        save_dcp(content, checkpoint_id=path, no_dist=True)


@pytest.fixture
def theirs(tensors, tmp_path):
    """As a trainer saves: weights by name under `model`, and much beside."""
    optimizer = {"lr": 0.1, "state": [{"exp_avg": torch.ones(3)}, None]}
    path = tmp_path / "theirs"
    save({"model": tensors, "optimizer": optimizer, "step": 3}, path)
    return path


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    return True


# -- theirs, read -------------------------------------------------------------------------------


def test_what_torch_writes_is_read(theirs, tensors):
    stored = open_dcp(theirs)
    names = {f"model.{name}" for name in tensors} | {"optimizer.state.0.exp_avg"}
    assert stored.keys() == names  # and no value that is no tensor
    for name, value in tensors.items():
        mine = stored[f"model.{name}"]
        assert (mine.shape, mine.dtype) == (value.shape, value.dtype)
        assert torch.equal(mine.whole(), value)
        for start, stop in (
            (0, 0),
            (1, 2),
            (0, value.numel()),
            (value.numel() // 2, value.numel()),
        ):
            if stop <= value.numel():
                assert torch.equal(mine.run(start, stop), value.flatten()[start:stop])


def test_blocks_of_ranks_are_put_together(tmp_path):
    """What several ranks write, of which one at a time plays the part."""
    whole = torch.arange(7 * 5 * 2).view(7, 5, 2).float()
    path = tmp_path / "blocks"
    save({"x": whole}, path)
    metadata = FileSystemReader(path).read_metadata()
    facts, places = metadata.state_dict_metadata["x"], {}
    facts.chunks = []
    with (path / "__1_0.distcp").open("wb") as file:
        for rows in (slice(0, 3), slice(3, 4), slice(4, 7)):
            for columns in (slice(0, 2), slice(2, 5)):
                block, start = whole[rows, columns].clone(), file.tell()
                torch.save(block, file)
                begin = torch.Size([rows.start, columns.start, 0])
                facts.chunks.append(ChunkStorageMetadata(begin, block.shape))
                info = _StorageInfo("__1_0.distcp", start, file.tell() - start)
                places[MetadataIndex("x", begin)] = info
    metadata.storage_data = places
    (path / METADATA).write_bytes(pickle.dumps(metadata))
    there = {"x": torch.zeros(7, 5, 2)}
    load(there, path)
    assert same(there, {"x": whole})  # torch reads it so
    stored = open_dcp(path)["x"]
    assert torch.equal(stored.whole(), whole)
    for start, stop in ((0, 70), (11, 12), (25, 47), (69, 70), (30, 30)):
        assert torch.equal(stored.run(start, stop), whole.flatten()[start:stop])


@pytest.fixture
def world_of_one(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_shards_of_fsdp_are_read(world_of_one, tensors, tmp_path):
    weight = distribute_tensor(tensors["a.weight"], world_of_one, [Shard(0)])
    path = tmp_path / "sharded"
    save_dcp({"model": {"a.weight": weight, "scale": tensors["scale"]}}, checkpoint_id=path)
    found = load_dcp_weights(path, ["a.weight", "scale"])
    assert same(found, {name: tensors[name] for name in ("a.weight", "scale")})


@pytest.mark.parametrize("prefix", ["", "model.", "app.model."])
def test_prefix_is_left_out_where_all_names_are_there_with_it(prefix, tensors, tmp_path):
    beside = {"optimizer.state.exp_avg": torch.ones(3), "train_state.step": torch.tensor(3)}
    content = {prefix + name: value for name, value in tensors.items()}
    save(content | beside, tmp_path / "x")
    assert same(load_dcp_weights(tmp_path / "x", tensors), tensors)
    found = load_dcp_weights(tmp_path / "x", [*tensors, "more"])
    assert found.keys() == content.keys()  # for the module to say what does not fit


# -- ours, read by theirs -----------------------------------------------------------------------


def load(content, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_dcp(content, checkpoint_id=path, no_dist=True)


@pytest.fixture
def stored(tensors, tmp_path):
    path = tmp_path / "step-00000001"
    content = lightning_content(1)
    content["state_dict"] |= tensors | {"tied too": tensors["a.weight"]}
    content["optimizer_states"] = []
    CheckpointDirectory({}).save_checkpoint(content, path)
    return open_checkpoint(path)


def test_torch_reads_what_is_written(stored, tmp_path):
    write_dcp(stored, tmp_path / "ours")
    expected = load_weights(stored.path)
    found = {name: torch.zeros_like(value) for name, value in expected.items()}
    load(found, tmp_path / "ours")
    assert same(found, expected)
    dcp_to_torch_save(tmp_path / "ours", tmp_path / "ours.pt")
    assert same(torch.load(tmp_path / "ours.pt"), expected)
    assert same(load_dcp_weights(tmp_path / "ours", expected), expected)
    assert sorted(os.listdir(tmp_path / "ours")) == [".metadata", "__0_0.distcp"]


def test_weights_are_written_in_another_precision(stored, tmp_path):
    write_dcp(stored, tmp_path / "ours", torch.bfloat16)
    expected = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in load_weights(stored.path).items()
    }
    dcp_to_torch_save(tmp_path / "ours", tmp_path / "ours.pt")
    assert same(torch.load(tmp_path / "ours.pt"), expected)
    assert same(load_dcp_weights(tmp_path / "ours", expected), expected)


def test_tied_names_share_their_bytes(stored, tmp_path):
    write_dcp(stored, tmp_path / "ours")
    places = FileSystemReader(tmp_path / "ours").read_metadata().storage_data
    offsets = {index.fqn: info.offset for index, info in places.items()}
    assert offsets["a.weight"] == offsets["tied too"] != offsets["low"]


def test_directory_that_is_there_is_refused(stored, tmp_path):
    (tmp_path / "ours").mkdir()
    with pytest.raises(ValueError, match=r"to=.*ours -> it is there already -> name"):
        write_dcp(stored, tmp_path / "ours")


def test_refused_write_leaves_nothing(stored, tmp_path, monkeypatch):
    before = sorted(tmp_path.rglob("*"))

    def no_room(*args):
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(distributed_checkpoint.torch, "save", no_room)
    with pytest.raises(ValueError, match=r"to=.*ours -> it could not be written .* -> make room"):
        write_dcp(stored, tmp_path / "ours")
    assert sorted(tmp_path.rglob("*")) == before
