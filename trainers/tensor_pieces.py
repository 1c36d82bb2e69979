"""Pieces of tensors in the files of a checkpoint: where each is, and tensors read from them."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from trainers.safetensors_file import TensorFile
from trainers.stored_tensors import Stored

WEIGHTS, OPTIMIZER = "weights", "optimizer"


def file_name(kind: str, rank: int, num_ranks: int) -> str:
    """File of a rank: `kind` is `weights` or `optimizer`."""
    part = f"-{rank + 1:05d}-of-{num_ranks:05d}" if num_ranks > 1 else ""
    return f"{kind}{part}.safetensors"


def kind_of(name: str) -> str:
    """Which file has a tensor: `weights/<parameter>`, `optimizer.<index>/<key>/<parameter>`."""
    return WEIGHTS if name.startswith(f"{WEIGHTS}/") else OPTIMIZER


def key_of(name: str, start: int, stop: int, numel: int) -> str:
    """Name in its file of a run of a tensor."""
    key = name.removeprefix(f"{WEIGHTS}/")
    return key if (start, stop) == (0, numel) else f"{key}[{start}:{stop}]"


class PieceReader:
    """Reads runs of tensors from the files of ranks; their headers are read once."""

    def __init__(self, path: Path, num_ranks: int):
        """Take the directory of a checkpoint, and how many ranks wrote it."""
        self.path, self.num_ranks = path, num_ranks
        self.files: dict[str, TensorFile] = {}

    def file(self, name: str) -> TensorFile:
        """A file of the directory.

        Raises:
            ValueError: It is missing or damaged.
        """
        if name not in self.files:
            self.files[name] = TensorFile(self.path / name)
        return self.files[name]

    def stored(
        self, name: str, dtype: torch.dtype, shape: Iterable[int], pieces: list[list[int]]
    ) -> Stored:
        """A tensor by its full name, in pieces (rank, start, stop)."""
        size = torch.Size(shape)

        def read(start: int, stop: int) -> Tensor:
            run, rest = torch.empty(stop - start, dtype=dtype), stop - start
            for rank, first, last in pieces:
                begin, end = max(start, first), min(stop, last)
                if begin < end:
                    file = self.file(file_name(kind_of(name), rank, self.num_ranks))
                    key = key_of(name, first, last, size.numel())
                    file.read_into(run[begin - start : end - start], key, begin - first)
                    rest -= end - begin
            if rest:
                raise ValueError(f"{self.path} -> its manifest names no piece for some of {name}")
            return run

        return Stored(size, dtype, read)
