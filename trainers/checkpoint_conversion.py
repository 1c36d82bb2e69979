"""A checkpoint written anew in the present format: in other files, or in another precision."""

import io
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainers.checkpoint import StoredCheckpoint
from trainers.checkpoint_parts import Save, finish, flatten, read_part, write_files
from trainers.stored_tensors import Run, Stored, deal


@dataclass(frozen=True)
class StoredRun(Run):
    """All of a stored tensor, which is read when it is written; `values` is on the meta device."""

    stored: Stored | None = None

    def read(self) -> Tensor:
        """The values, of one that was not dealt to others."""
        assert self.stored is not None
        return self.stored.whole().flatten()


def convert(
    source: StoredCheckpoint,
    to: Path,
    *,
    num_files: int,
    dtype: torch.dtype | None,
    advance: Callable[[int], Any],
) -> None:
    """Write a checkpoint to the directory `to`, one tensor at a time.

    All of its run's state is in it, so that it can be resumed from like the one that it was made
    of. The optimizer's state of one in format 2, which is not in files of tensors, is in memory.

    Args:
        source: Of any format that is read.
        to: Is not there yet.
        num_files: Of weights, and of optimizer state; tensors are dealt to them whole.
        dtype: Of floating weights; None: as they are. Optimizer state stays as it is.
        advance: Is told how many bytes more are done.

    Raises:
        ValueError: A weight is beyond the range of `dtype`.
    """
    runs, aliases, rest = flatten(_lazily(source, dtype, advance))
    state = io.BytesIO()
    torch.save(rest, state)
    scratch = to.with_name(f".{to.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    save = Save(to, scratch, runs, aliases, state.getvalue(), source.manifest["step"])
    try:
        for number in range(num_files):
            write_files(replace(save, runs=deal(runs, number, num_files)), number, num_files)
        parts = [read_part(scratch, number) for number in range(num_files)]
        finish(save, [part for part in parts if part is not None], _facts(source))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _facts(source: StoredCheckpoint) -> dict[str, Any]:
    """What the manifest of the source says of its run, and where this one is from."""
    others = ("format", "step", "files", "world_size", "aliases", "tensors")
    facts = {key: value for key, value in source.manifest.items() if key not in others}
    before = {key: source.manifest.get(key) for key in ("format", "world_size")}
    return facts | {"converted": {"from": str(source.path), **before}}


def _lazily(
    source: StoredCheckpoint, dtype: torch.dtype | None, advance: Callable[[int], Any]
) -> dict[str, Any]:
    """The checkpoint as Lightning has it when it saves, with runs that are yet to be read."""
    known: dict[int, StoredRun] = {}

    def run_of(name: str, stored: Stored, dtype: torch.dtype | None = None) -> StoredRun:
        if id(stored) not in known:  # tied values are one
            known[id(stored)] = _run_of(name, stored, dtype, advance)
        return known[id(stored)]

    weights = source.weights  # kept, as are states: a freed one's id would be another's
    states = source.optimizer_states
    small = [
        {
            parameter: {
                key: run_of(parameter, value) if isinstance(value, Stored) else value
                for key, value in values.items()
            }
            for parameter, values in saved["state"].items()
        }
        for saved in states
    ]
    return {
        **source.state,
        "state_dict": {name: run_of(name, stored, dtype) for name, stored in weights.items()},
        "optimizer_states": [
            {**saved, "state": state} for saved, state in zip(states, small, strict=True)
        ],
    }


def _run_of(
    name: str, stored: Stored, dtype: torch.dtype | None, advance: Callable[[int], Any]
) -> StoredRun:
    rounded = stored.to(dtype)

    def read(start: int, stop: int) -> Tensor:
        try:
            run = rounded.read(start, stop)
        except OverflowError as error:
            raise ValueError(f"dtype -> {name}: {error} -> use bf16 or fp32") from error
        advance(run.numel() * stored.dtype.itemsize)
        return run

    values = torch.empty(stored.shape.numel(), dtype=rounded.dtype, device="meta")
    told = Stored(stored.shape, rounded.dtype, read)
    return StoredRun(stored.shape, 0, values, is_copied=True, stored=told)
