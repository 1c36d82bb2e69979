"""torch's own distributed checkpoints (DCP), of weights: written for it, and read with no code run.

A directory: `.metadata`, a pickle that says where the pieces of all tensors are, and files
`__<rank>_<number>.distcp`, in which `torch.save` wrote piece after piece. torch unpickles whatever
`.metadata` names, so that a crafted one runs code; here every class in it becomes a stand-in that
does nothing, and pieces are read with `weights_only=True`.
"""

import io
import os
import pickle
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainers.checkpoint import StoredCheckpoint, reason_of
from trainers.stored_tensors import Stored

METADATA, DATA = ".metadata", "__0_0.distcp"

_OF_METADATA = "torch.distributed.checkpoint.metadata"
_OF_SHARDS = "torch.distributed._shard.sharded_tensor.metadata"  # before torch 2.3
STAND_INS = {
    *((_OF_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((_OF_METADATA, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata")),
    *((_OF_METADATA, name) for name in ("ChunkStorageMetadata", "TensorProperties")),
    (_OF_METADATA, "_MEM_FORMAT_ENCODING"),
    (_OF_SHARDS, "TensorProperties"),
    (_OF_SHARDS, "MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
    ("pathlib._local", "WindowsPath"),
}
"""What `.metadata` may name, beside dtypes and `torch.Size`."""

PREFIXES = ("", "model.", "app.model.", "state_dict.", "module.")
"""What others put before the names of parameters."""
NOT_WEIGHTS = ("optim", "lr_scheduler", "train_state", "dataloader", "data_loader")
"""Beginnings of what lies beside weights whose names have no prefix, as torchtitan saves them."""


# -- writing ------------------------------------------------------------------------------------


def write_dcp(stored: StoredCheckpoint, out: Path, dtype: torch.dtype | None = None) -> None:
    """Write the weights of a checkpoint for `torch.distributed.checkpoint.load`, with flat names.

    In the memory of one tensor; there is no process group. Tied names share their bytes.

    Args:
        stored: The checkpoint.
        out: The directory, which is not there yet.
        dtype: Of floating-point tensors; None: as they are.

    Raises:
        ValueError: The directory is there already, or the file system refuses.
    """
    if out.exists():
        raise ValueError(f"to={out} -> it is there already -> name a directory that is not")
    scratch = out.with_name(f".{out.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        metadata = _write_data(stored, scratch / DATA, dtype)
        with (scratch / METADATA).open("wb") as file:
            pickle.dump(metadata, file)
        scratch.replace(out)
    except (OSError, RuntimeError) as error:  # torch's writer has a RuntimeError for a full disk
        raise ValueError(f"to={out} -> it could not be written ({error}) -> make room") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_data(stored: StoredCheckpoint, path: Path, dtype: torch.dtype | None) -> Any:
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo

    written: dict[Stored, tuple[Any, Any]] = {}
    tensors, places = {}, {}
    with path.open("wb") as file:
        for name, tensor in stored.weights.items():
            if tensor not in written:
                try:
                    start, whole = file.tell(), tensor.to(dtype).whole()
                except OverflowError as error:
                    raise ValueError(
                        f"dtype={dtype} -> {name}: {error} -> use one of a wider range"
                    ) from error
                torch.save(whole, file)
                written[tensor] = (
                    _StorageInfo(path.name, start, file.tell() - start),
                    dcp.TensorProperties(dtype=whole.dtype),
                )
                del whole  # before the next is read
            begin = torch.Size([0] * len(tensor.shape))
            places[dcp.MetadataIndex(name, begin, 0)], properties = written[tensor]
            chunks = [dcp.ChunkStorageMetadata(begin, tensor.shape)]
            tensors[name] = dcp.TensorStorageMetadata(properties, tensor.shape, chunks)
        file.flush()
        os.fsync(file.fileno())
    return dcp.Metadata(
        state_dict_metadata=tensors,
        planner_data={name: (name,) for name in tensors},
        storage_data=places,
        storage_meta=dcp.StorageMeta(),
        version=CURRENT_DCP_VERSION,
    )


# -- reading ------------------------------------------------------------------------------------


def open_dcp(path: str | Path) -> dict[str, Stored]:
    """The tensors of a directory by their flattened names; other values are left out.

    Raises:
        ValueError: It names classes that have no business there, is damaged, or is compressed.
    """
    path = Path(path)
    try:
        with (path / METADATA).open("rb") as file:
            metadata = _Metadata(file).load()
        places = {
            (key.fqn, tuple(key.offset or ())): info for key, info in metadata.storage_data.items()
        }
        return {
            name: _Pieces(path, name, facts, places).stored()
            for name, facts in metadata.state_dict_metadata.items()
            if type(facts).__name__ == "TensorStorageMetadata"
        }
    except Exception as error:  # what damaged bytes raise can be anything
        raise ValueError(
            f"{path / METADATA} -> no metadata of a distributed checkpoint that can be read "
            f"({error}) -> save it again"
        ) from error


def load_dcp_weights(path: str | Path, names: Collection[str]) -> dict[str, Tensor]:
    """Read weights for a module that has parameters and buffers of these `names`.

    A prefix that others put before names is left out where all names are there with it.

    Raises:
        ValueError: As `open_dcp`.
    """
    stored = open_dcp(path)
    for prefix in PREFIXES:
        if all(prefix + name in stored for name in names):
            stored = {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}
            break
    beside = [name for name in stored if name.startswith(NOT_WEIGHTS) and name not in names]
    return {name: tensor.whole() for name, tensor in stored.items() if name not in beside}


class _StandIn:
    """Has what a pickle gives it, and does nothing."""

    fqn: str
    offset: Any = None
    transform_descriptors: Any = None

    def __init__(self, *args: Any):
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.dtype = state[0]  # of properties of tensors, a tuple


class _Metadata(pickle.Unpickler):
    """Reads metadata; classes are stand-ins of this reading only, for a pickle can change them."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) in STAND_INS:
            return type(global_name, (_StandIn,), {})
        if module_name == "torch":
            found = getattr(torch, global_name, None)
            if found is torch.Size or isinstance(found, torch.dtype):
                return found
        raise ValueError(f"it names {module_name}.{global_name}, which is not read for safety")


@dataclass(frozen=True)
class _Piece:
    """A block of a tensor, and where it is."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


class _Pieces:
    """A tensor in blocks, which together are all of it."""

    def __init__(self, path: Path, name: str, facts: Any, places: dict[Any, Any]):
        self.name, self.shape, self.dtype = name, torch.Size(facts.size), facts.properties.dtype
        if not isinstance(self.dtype, torch.dtype):
            raise ValueError(f"{name} has no dtype")
        self.pieces = []
        for chunk in facts.chunks:
            place = places[name, tuple(chunk.offsets)]
            if place.transform_descriptors:
                raise ValueError(f"{name} is compressed by {place.transform_descriptors}")
            piece = _Piece(
                tuple(map(index, chunk.offsets)),
                tuple(map(index, chunk.sizes)),
                path / place.relative_path,
                index(place.offset),
                index(place.length),
            )
            self._check(piece, path)
            self.pieces.append(piece)
        if sum(prod(piece.sizes) for piece in self.pieces) != prod(self.shape):
            raise ValueError(f"the pieces of {name} are not all of it")

    def _check(self, piece: _Piece, path: Path) -> None:
        if piece.file.parent != path or piece.file.name in ("", ".."):
            raise ValueError(f"it names {piece.file}, outside of it")
        if not piece.file.is_file():
            raise ValueError(f"{piece.file.name} is missing")
        if not 0 <= piece.start <= piece.start + piece.length <= piece.file.stat().st_size:
            raise ValueError(f"{piece.file.name} ends before {self.name} does")
        if prod(piece.sizes) * self.dtype.itemsize > piece.length:
            raise ValueError(f"{piece.file.name} has too little for {self.name}")
        for offset, size, all_of_it in zip(piece.offsets, piece.sizes, self.shape, strict=True):
            if not 0 <= offset <= offset + size <= all_of_it:
                raise ValueError(f"a piece of {self.name} is outside of it")

    def stored(self) -> Stored:
        return Stored(self.shape, self.dtype, self._read)

    def _read(self, start: int, stop: int) -> Tensor:
        """Put the rows together in which the run is."""
        if not self.shape:
            return self._load(self.pieces[0]).view(1)[start:stop]
        width = max(1, prod(self.shape[1:]))
        first, last = start // width, min(-(-stop // width), self.shape[0])
        rows = torch.zeros(last - first, *self.shape[1:], dtype=self.dtype)
        for piece in self.pieces:
            begin = max(first, piece.offsets[0])
            end = min(last, piece.offsets[0] + piece.sizes[0])
            if begin < end:
                place = [slice(begin - first, end - first)]
                place += [slice(o, o + s) for o, s in zip(piece.offsets, piece.sizes, strict=True)][
                    1:
                ]
                mine = slice(begin - piece.offsets[0], end - piece.offsets[0])
                rows[tuple(place)] = self._load(piece)[mine]
        return rows.flatten()[start - first * width : stop - first * width]

    def _load(self, piece: _Piece) -> Tensor:
        with piece.file.open("rb") as file:
            file.seek(piece.start)
            content = io.BytesIO(file.read(piece.length))
        try:
            tensor = torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = f"its piece of {self.name} is damaged ({reason_of(error)})"
            raise ValueError(f"{piece.file} -> {reason} -> restore it") from error
        is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        if not is_plain or (tensor.dtype, tuple(tensor.shape)) != (self.dtype, piece.sizes):
            raise ValueError(f"{piece.file} -> no piece of {self.name} is there -> restore it")
        return tensor.detach()
