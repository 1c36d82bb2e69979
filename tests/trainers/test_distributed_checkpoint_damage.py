"""torch's distributed checkpoints that were crafted or damaged: named, and no code is run."""

import io
import os
import pickle
import warnings

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

from tests.trainers.checkpoint_saves import Surprise
from trainers.distributed_checkpoint import METADATA, open_dcp

RAN = "code from a checkpoint ran"


@pytest.fixture
def theirs(tmp_path):
    path = tmp_path / "theirs"
    content = {"model": {"a.weight": torch.randn(5, 4, 3), "scale": torch.tensor(2.5)}, "step": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        save_dcp(content, checkpoint_id=path, no_dist=True)
    return path


class Shell:
    def __reduce__(self):
        return (os.system, (f"echo {RAN}",))


class Evaluated:
    def __reduce__(self):
        return (eval, (f"print({RAN!r})",))


class Within:
    """A class of ours that only has a state."""


@pytest.mark.parametrize(
    ("crafted", "named"),
    [
        (Shell(), r"posix\.system"),
        (Surprise(), r"builtins\.print"),
        (Evaluated(), r"builtins\.eval"),
        (Within(), r"test_distributed_checkpoint_damage\.Within"),
    ],
)
@pytest.mark.parametrize("where", ["alone", "planner_data", "key", "shape"])
def test_crafted_metadata_runs_nothing(crafted, named, where, theirs, capfd):
    metadata = FileSystemReader(theirs).read_metadata()
    if where == "planner_data":
        metadata.planner_data = crafted
    if where == "key":
        metadata.storage_data[MetadataIndex("x")] = crafted
    if where == "shape":
        metadata.state_dict_metadata["model.scale"].size = crafted
    (theirs / METADATA).write_bytes(pickle.dumps(crafted if where == "alone" else metadata))
    with pytest.raises(ValueError, match=rf"metadata -> no metadata .*names .*{named}.*not read"):
        open_dcp(theirs)
    assert RAN not in capfd.readouterr().out


def test_torch_itself_would_run_it(theirs, capfd):
    metadata = FileSystemReader(theirs).read_metadata()
    metadata.planner_data = Surprise()
    (theirs / METADATA).write_bytes(pickle.dumps(metadata))
    FileSystemReader(theirs).read_metadata()
    assert RAN in capfd.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        b"ctorch\nload\n",
        b"ctorch.serialization\nload\n",
        b"ctorch\n_C\n",
        b"cos\nsystem\n",
        b"ctorch.distributed.checkpoint.metadata\nos.system\n",
        b"cpathlib\nPosixPath.open\n",
    ],
)
def test_names_beside_those_that_are_needed_are_refused(name, theirs):
    (theirs / METADATA).write_bytes(name + b"(S'echo'\ntR.")
    with pytest.raises(ValueError, match="which is not read for safety"):
        open_dcp(theirs)


def test_pickle_changes_no_class_of_torch(theirs):
    """`BUILD` sets attributes of whatever was made before, functions and classes too."""
    before = dict(MetadataIndex.__dict__)
    for name in (b"torch.distributed.checkpoint.metadata\nMetadataIndex", b"torch\nSize"):
        build = b"c" + name + b"\n(N}S'__hash__'\nNstb."
        (theirs / METADATA).write_bytes(build)
        with pytest.raises(ValueError, match="no metadata of a distributed checkpoint"):
            open_dcp(theirs)
    assert dict(MetadataIndex.__dict__) == before


def test_crafted_piece_runs_nothing(theirs, capfd):
    metadata = FileSystemReader(theirs).read_metadata()
    place = metadata.storage_data[MetadataIndex("model.a.weight", torch.Size([0, 0, 0]))]
    file = theirs / place.relative_path
    content = io.BytesIO()
    torch.save(Surprise(), content)
    with file.open("r+b") as data:
        data.seek(place.offset)
        data.write(content.getvalue().ljust(place.length, b"\0"))
    with pytest.raises(ValueError, match=r"distcp -> its piece of model.a.weight is damaged"):
        open_dcp(theirs)["model.a.weight"].whole()
    assert RAN not in capfd.readouterr().out


def change(path, function):
    metadata = FileSystemReader(path).read_metadata()
    index = MetadataIndex("model.a.weight", torch.Size([0, 0, 0]))
    function(metadata.state_dict_metadata["model.a.weight"], metadata.storage_data[index])
    (path / METADATA).write_bytes(pickle.dumps(metadata))


LIES = {
    "another tensor": lambda f, p: setattr(f, "size", torch.Size([5, 4, 4])),
    "a piece less": lambda f, p: setattr(f, "chunks", []),
    "outside": lambda f, p: setattr(f.chunks[0], "sizes", torch.Size([6, 4, 3])),
    "no dtype": lambda f, p: setattr(f.properties, "dtype", torch.Size([])),
    "above": lambda f, p: setattr(p, "relative_path", "../__0_0.distcp"),
    "elsewhere": lambda f, p: setattr(p, "relative_path", "/etc/passwd"),
    "the parent": lambda f, p: setattr(p, "relative_path", ".."),
    "missing": lambda f, p: setattr(p, "relative_path", "__9_0.distcp"),
    "beyond": lambda f, p: setattr(p, "offset", 10**9),
    "negative": lambda f, p: setattr(p, "offset", -1),
    "a fraction": lambda f, p: setattr(p, "offset", 1.5),
    "compressed": lambda f, p: setattr(p, "transform_descriptors", ["stream.zstd"]),
    "huge": lambda f, p: (
        setattr(f, "size", torch.Size([2**40])),
        setattr(f.chunks[0], "sizes", torch.Size([2**40])),
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_metadata_that_lies_is_named(lie, theirs):
    change(theirs, LIES[lie])
    with pytest.raises(ValueError, match=r"\.metadata -> no metadata .* -> save it again"):
        open_dcp(theirs)


def test_place_of_another_piece_is_named(theirs):
    change(theirs, lambda facts, place: setattr(place, "offset", place.offset + 64))
    with pytest.raises(ValueError, match=r"__0_0.distcp -> .* -> restore it"):
        open_dcp(theirs)["model.a.weight"].whole()


def test_piece_of_another_dtype_is_named(theirs):
    change(theirs, lambda facts, place: setattr(facts.properties, "dtype", torch.float16))
    with pytest.raises(ValueError, match=r"__0_0.distcp -> no piece of model.a.weight is there"):
        open_dcp(theirs)["model.a.weight"].whole()


def test_data_file_that_is_cut_is_named(theirs):
    file = theirs / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"__0_0.distcp ends before .* -> save it again"):
        open_dcp(theirs)


@pytest.mark.parametrize("keeps", [0, 1, 100, -1])
def test_metadata_that_is_cut_is_named(keeps, theirs):
    content = (theirs / METADATA).read_bytes()
    (theirs / METADATA).write_bytes(content[:keeps])
    with pytest.raises(ValueError, match=r"\.metadata -> no metadata .* -> save it again"):
        open_dcp(theirs)
