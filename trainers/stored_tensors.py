"""Tensors on their way to a checkpoint and back, as runs of their flattened elements.

What a rank holds of a parameter is a run of its elements under every strategy: all of them, some
rows (FSDP2), or a stretch (ZeRO). So pieces of one kind are enough for all to read what any wrote.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

STRETCH = 2**20
"""Elements that are rounded at a time."""


@dataclass(frozen=True)
class Run:
    """What this rank is to save of a tensor.

    Attributes:
        shape: Of the whole tensor.
        start: Where the run begins in the flattened tensor.
        values: The run, 1-D, perhaps of no element.
        is_copied: Whether every rank has the same, so that any may save it.
    """

    shape: torch.Size
    start: int
    values: Tensor
    is_copied: bool = False

    @classmethod
    def whole(cls, value: Tensor) -> "Run":
        """All of a tensor that every rank has."""
        return cls(value.shape, 0, value.detach().flatten(), is_copied=True)

    def without_values(self) -> "Run":
        """The same tensor, of which this rank saves nothing."""
        return replace(self, start=0, values=self.values[:0], is_copied=False)

    def read(self) -> Tensor:
        """The values, 1-D, on the CPU where they are to be written."""
        return self.values

    @property
    def stop(self) -> int:
        """Where it ends."""
        return self.start + self.values.numel()


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint, read when it is asked for.

    Attributes:
        shape: Of the whole.
        dtype: As it is stored.
        read: (start, stop) -> these elements of the flattened tensor, 1-D, on the CPU.
    """

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "Stored":
        """A tensor that is in memory already."""
        return cls(tensor.shape, tensor.dtype, lambda start, stop: tensor.flatten()[start:stop])

    def run(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor, 1-D, on the CPU."""
        return self.read(start, stop)

    def whole(self) -> Tensor:
        """All of it, in its shape, on the CPU."""
        return self.run(0, self.shape.numel()).view(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return self.shape.numel() * self.dtype.itemsize

    def to(self, dtype: torch.dtype | None) -> "Stored":
        """The same in another precision, if it is floating; rounded when it is read, in stretches.

        Reading raises an `OverflowError` where a value is beyond the range of `dtype`.
        """
        if dtype is None or dtype == self.dtype or not self.dtype.is_floating_point:
            return self

        def read(start: int, stop: int) -> Tensor:
            found = torch.empty(stop - start, dtype=dtype)
            for first in range(start, stop, STRETCH):
                run = self.read(first, min(first + STRETCH, stop))
                found[first - start :][: len(run)] = run
                lost = found[first - start :][: len(run)].isinf() & ~run.isinf()
                if count := int(lost.sum()):
                    raise OverflowError(f"{count:,} value(s) or more are beyond {dtype}")
            return found

        return Stored(self.shape, dtype, read)


def is_elementwise(key: str, value: Any, shape: torch.Size) -> bool:
    """Whether an optimizer's `key` has a value for each element of a parameter of this shape."""
    return isinstance(value, Tensor) and value.shape == shape and key != "step"


def choose_dtype(name: str | None) -> torch.dtype | None:
    """The dtype that `dtype=` of a verb asks for; None: as it is saved.

    Raises:
        ValueError: There is none of that name.
    """
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name is not None and name not in dtypes:
        raise ValueError(f"dtype={name} -> unknown -> use {', '.join(dtypes)} or null")
    return dtypes[name] if name else None


def deal(runs: Mapping[str, Run], rank: int, num_ranks: int) -> dict[str, Run]:
    """Leave of what every rank has as much to each, so that all write and none writes twice.

    Args:
        runs: By name; those that are copied must be the same, in the same order, on every rank.
        rank: Whose share to give.
        num_ranks: Of the run.
    """
    loads = [0] * num_ranks
    copied = {name: run.values.nbytes for name, run in runs.items() if run.is_copied}
    owners = {}
    for name in sorted(copied, key=lambda name: -copied[name]):  # the largest first
        owners[name] = owner = min(range(num_ranks), key=lambda each: loads[each])
        loads[owner] += copied[name]
    return {
        name: run.without_values() if owners.get(name, rank) != rank else run
        for name, run in runs.items()
    }
