"""Files of tensors, against the safetensors library and against files that lie."""

import hashlib
import json
import struct
import weakref

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trainers.safetensors_file import CHUNK, DTYPES, Entry, TensorFile, write_tensors


def some(dtype, *shape):
    """Values of any bits."""
    count = torch.Size(shape).numel() * dtype.itemsize
    draw = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), generator=draw)
    return raw.to(torch.uint8).view(dtype).view(shape)


def same(one, other):
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    return one.flatten().view(torch.uint8).tolist() == other.flatten().view(torch.uint8).tolist()


def entries(tensors):
    return [Entry(k, v.dtype, tuple(v.shape), lambda v=v: v) for k, v in tensors.items()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "some.safetensors"


@pytest.fixture(params=DTYPES.values(), ids=DTYPES)
def tensors(request):
    dtype = request.param
    return {
        "matrix": some(dtype, 3, 5),
        "a scalar": some(dtype),
        "nothing": some(dtype, 0, 4),
        "größe": some(dtype, 7),
        "turned": some(dtype, 4, 2).t(),
    }


def test_library_reads_what_is_written(tensors, path):
    write_tensors(path, entries(tensors))
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(same(found[name], tensor) for name, tensor in tensors.items())


def test_what_the_library_writes_is_read(tensors, path):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"by": "it"})
    file = TensorFile(path)
    assert file.places.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert file.places[name].shape == tuple(tensor.shape)
        assert same(file.read(name), tensor.flatten())


def test_facts_are_those_of_the_file(path):
    facts = write_tensors(
        path, entries({"large": some(torch.uint8, CHUNK + 5), "x": some(torch.bool, 3)})
    )
    content = path.read_bytes()
    digest = hashlib.blake2b(content, digest_size=32).hexdigest()
    assert facts == {"bytes": len(content), "blake2b": digest}


def test_file_of_no_tensors_is_one(path):
    write_tensors(path, [])
    assert load_file(path) == {}
    assert TensorFile(path).places == {}


def test_tensors_are_asked_for_one_at_a_time_and_let_go(path):
    alive = []

    def read():
        assert not [each for each in alive if each() is not None]
        tensor = torch.zeros(8)
        alive.append(weakref.ref(tensor))
        return tensor

    write_tensors(path, [Entry(str(i), torch.float32, (8,), read) for i in range(3)])
    assert len(alive) == 3


@pytest.mark.parametrize("other", [torch.zeros(4), torch.zeros(3, dtype=torch.float16)])
def test_tensor_that_is_not_as_announced_is_refused(other, path):
    with pytest.raises(ValueError, match=r"x -> torch\.float"):
        write_tensors(path, [Entry("x", torch.float32, (3,), lambda: other)])


def test_runs_are_read_and_no_more(path):
    tensor = some(torch.float32, 4, 6)
    write_tensors(path, entries({"before": some(torch.int8, 3), "x": tensor}))
    file = TensorFile(path)
    for start, stop in [(0, 24), (5, 5), (5, 6), (7, 20), (23, 24)]:
        assert same(file.read("x", start, stop), tensor.flatten()[start:stop])
    for start, stop in [(-1, 3), (20, 25)]:
        with pytest.raises(ValueError, match=r"x is 24 of torch.float32 and not what is asked for"):
            file.read("x", start, stop)
    with pytest.raises(ValueError, match="not what is asked for"):
        file.read_into(torch.zeros(2, dtype=torch.int32), "x")
    with pytest.raises(ValueError, match="it has no y -> restore it"):
        file.read("y")


def test_file_that_is_cut_after_it_was_opened_is_named(path):
    write_tensors(path, entries({"x": some(torch.float32, 8)}))
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"some.safetensors -> it ends within x"):
        file.read("x")


def lying(path, header, values=b"\0" * 16, length=None):
    """A file with this header, and perhaps another length of it than it has."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", length) + text + values)


def tensor(first, last, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


LIES = {
    "behind_the_end": {"x": tensor(16, 24)},
    "beyond_the_end": {"x": tensor(0, 8), "y": tensor(8, 24, (4,))},
    "before_the_start": {"x": tensor(-8, 0)},
    "backwards": {"x": tensor(8, 0)},
    "overlap": {"x": tensor(0, 16, (4,)), "y": tensor(8, 16)},
    "the_same_bytes_twice": {"x": tensor(0, 16, (4,)), "y": tensor(0, 16, (4,))},
    "gap": {"x": tensor(0, 4, (1,)), "y": tensor(8, 16)},
    "something_at_the_end": {"x": tensor(0, 8)},
    "more_than_its_shape": {"x": tensor(0, 16)},
    "shape_that_wraps_around": {"x": tensor(0, 16, (2**32, 2**32)), "y": tensor(0, 16, (4,))},
    "shape_beyond_64_bits": {"x": tensor(0, 16, (2**70,))},
    "negative_shape": {"x": tensor(0, 16, (-2, -2))},
    "shape_of_fractions": {"x": tensor(0, 16, (4.0,))},
    "offsets_of_fractions": {"x": tensor(0.0, 16.0, (4,))},
    "offsets_of_text": {"x": {"dtype": "F32", "shape": [4], "data_offsets": ["0", "16"]}},
    "one_offset": {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0]}},
    "no_offsets": {"x": {"dtype": "F32", "shape": [4]}},
    "unknown_dtype": {"x": tensor(0, 16, (4,), "F1")},
    "list": [],
    "number": b"17",
    "no_json": b"{'x'",
    "no_utf8": b'{"\xff": 1}',
    "deep": b'{"x":' * 10**5 + b"1" + b"}" * 10**5,
}


@pytest.mark.parametrize("header", LIES.values(), ids=LIES)
def test_header_that_lies_is_named(header, path):
    lying(path, header)
    with pytest.raises(
        ValueError, match=r"some.safetensors -> damaged header \(.*\) -> restore it"
    ):
        TensorFile(path)
    with pytest.raises((SafetensorError, OverflowError, RecursionError)):
        load_file(path)


def test_header_that_does_not_lie_is_read(path):
    lying(path, {"y": tensor(8, 16), "x": tensor(0, 8)})
    assert TensorFile(path).read("y").tolist() == [0.0, 0.0]


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**63, 2**64 - 1])
def test_length_of_the_header_that_cannot_be_is_named(length, path):
    lying(path, {"x": tensor(0, 16, (4,))}, length=length)
    with pytest.raises(ValueError, match="no safetensors file, or cut short -> restore it"):
        TensorFile(path)


@pytest.mark.parametrize("end", [0, 7, 8, 20, -1])
def test_truncated_file_is_named(end, path):
    write_tensors(path, entries({"x": some(torch.float32, 8)}))
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(ValueError, match=r"some.safetensors -> .* -> restore it"):
        TensorFile(path)


def test_missing_file_is_named(path):
    with pytest.raises(ValueError, match=r"some.safetensors -> it is missing"):
        TensorFile(path)
