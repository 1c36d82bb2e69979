"""Writing a checkpoint: every rank what it holds, beside the training, whole or not at all.

A save copies tensors and returns; a thread of each rank then writes its files into a directory of
another name, digests them on the way, and syncs them. When the files of all ranks are there, rank 0
adds the manifest and renames the directory. Whoever needs it done waits (`wait`).
"""

import contextlib
import io
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.core.optimizer import do_nothing_closure
from torch import Tensor

from trainers.checkpoint import open_checkpoint, read_last, remove_checkpoint, unpickle
from trainers.checkpoint_parts import (
    Save,
    finish,
    flatten,
    read_part,
    remove_files,
    write_files,
)
from trainers.stored_tensors import Run

POLL_S, GRACE_S = 0.02, 60.0
"""How often rank 0 looks for the others' files; how long it waits when all say they have written:
file systems of several machines are not instant."""


@dataclass
class CheckpointDirectory(CheckpointIO):
    """Lightning's checkpoint dictionary as a directory of verified files, written by all ranks.

    Attributes:
        facts: What every manifest of the run says: strategy, configuration, data digest.
        asynchronous: Whether a save returns when tensors are copied, instead of when it is done.
        drops_optimizer: Whether to leave optimizer state out when a checkpoint is read.
        on_commit: Is called on rank 0, in the thread, with each checkpoint that is in its place.
    """

    facts: Mapping[str, Any]
    asynchronous: bool = False
    drops_optimizer: bool = False
    on_commit: Callable[[Path], None] | None = None
    _copies: dict[str, Tensor] = field(default_factory=dict)
    _written: Future[None] | None = None
    _committed: Future[None] | None = None
    _all_written: threading.Event = field(default_factory=threading.Event)

    @property
    def rank(self) -> int:
        """Of this process."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def num_ranks(self) -> int:
        """Of the run."""
        return dist.get_world_size() if dist.is_initialized() else 1

    @cached_property
    def token(self) -> str:
        """The same on all ranks and of this launch only, so that no older leftovers are taken."""
        token = [uuid.uuid4().hex[:12]]
        if self.num_ranks > 1:
            dist.broadcast_object_list(token)
        return token[0]

    # -- Lightning's interface ------------------------------------------------------------------

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Begin to write a checkpoint to the directory `path`; collective, on every rank.

        Args:
            checkpoint: Lightning's; tensors in `state_dict`, and those of optimizers with a value
                per element, are `Run`s, or tensors that every rank has.
            path: The directory.
            storage_options: A function for rank 0 to call when the checkpoint is in its place.

        Raises:
            ValueError: The file system refused, for example because the disk is full. What was
                written is removed and older checkpoints stay.
        """
        self.wait()
        path = Path(path)
        runs, aliases, rest = flatten(checkpoint)
        state = self._serialize(rest, path) if self.rank == 0 else b""
        save = Save(
            path=path,
            scratch=path.with_name(f".{path.name}.{self.token}.partial"),
            runs={name: self._copy(name, run) for name, run in runs.items()},
            aliases=aliases,
            state=state,
            step=checkpoint["global_step"],
            then=storage_options or do_nothing_closure,
        )
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self._start(save)
        if not self.asynchronous:
            self.wait()

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Open the directory `path`; tensors are read when they are taken. `verify` comes first."""
        stored = open_checkpoint(path)
        found = {**stored.state, "state_dict": stored.weights}
        if not self.drops_optimizer:
            return found | {"optimizer_states": stored.optimizer_states}
        schedules = [  # where they are, and not the rates of the optimizer that is no more
            {key: value for key, value in schedule.items() if key not in ("base_lrs", "_last_lr")}
            for schedule in found["lr_schedulers"]
        ]
        return found | {"optimizer_states": [], "lr_schedulers": schedules}

    def remove_checkpoint(self, path: Any) -> None:
        """Delete the directory `path`; a crash on the way leaves nothing that looks whole."""
        remove_checkpoint(Path(path))

    # -- waiting --------------------------------------------------------------------------------

    def wait(self) -> None:
        """Wait until the last save is done on all ranks; collective.

        Raises:
            ValueError: As `save_checkpoint`.
        """
        if self._written is None or self._committed is None:
            return
        written, committed = self._written, self._committed
        self._written = self._committed = None
        written.result()
        self._barrier()
        self._all_written.set()
        committed.result()
        self._barrier()

    def raise_failure(self) -> None:
        """Raise what went wrong in the thread, if something has."""
        for future in (self._written, self._committed):
            if future is not None and future.done():
                future.result()

    def abandon(self) -> None:
        """Let a save that is on its way finish if it can; for a run that ends by an error."""
        self._all_written.set()
        if self._committed is not None:
            with contextlib.suppress(Exception):
                self._committed.result(timeout=10)

    def _barrier(self) -> None:
        if self.num_ranks > 1:
            device_ids = None
            if dist.get_backend() == "nccl":
                device_ids = [torch.cuda.current_device()]
            dist.barrier(device_ids=device_ids)

    # -- on the training's time -----------------------------------------------------------------

    def _serialize(self, state: dict[str, Any], path: Path) -> bytes:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        unpickle(buffer, path)  # what could not be read should be known now
        return buffer.getvalue()

    def _copy(self, name: str, run: Run) -> Run:
        """Values as they are now, in memory that is used again for each save."""
        values = run.values
        copy = self._copies.get(name)
        if copy is None or (copy.shape, copy.dtype) != (values.shape, values.dtype):
            copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._copies[name] = copy
        copy.copy_(values, non_blocking=values.is_cuda)
        return Run(run.shape, run.start, copy)

    def _start(self, save: Save) -> None:
        self._all_written.clear()
        written: Future[None] = Future()
        committed: Future[None] = Future()
        rank, num_ranks = self.rank, self.num_ranks

        def work() -> None:
            try:
                with _refusals_named(save, rank):
                    write_files(save, rank, num_ranks)
                written.set_result(None)
                if rank == 0:
                    with _refusals_named(save, rank):
                        self._commit(save, num_ranks)
                committed.set_result(None)
            except BaseException as error:
                for future in (written, committed):
                    if not future.done():
                        future.set_exception(error)

        self._written, self._committed = written, committed
        # A daemon, for an interpreter that ends by an error need not wait for other ranks.
        threading.Thread(target=work, name="checkpoint", daemon=True).start()

    # -- in the thread --------------------------------------------------------------------------

    def _commit(self, save: Save, num_ranks: int) -> None:
        finish(save, self._collect(save, num_ranks), self.facts)
        if self.on_commit is not None:
            self.on_commit(save.path)

    def _collect(self, save: Save, num_ranks: int) -> list[dict[str, Any]]:
        """Read what each rank has written, when it has."""
        deadline = None
        parts: dict[int, dict[str, Any]] = {}
        while len(parts) < num_ranks:
            for rank in set(range(num_ranks)) - parts.keys():
                if (part := read_part(save.scratch, rank)) is not None:
                    parts[rank] = part
            if self._all_written.is_set() and deadline is None:
                deadline = time.monotonic() + GRACE_S
            if deadline is not None and time.monotonic() > deadline:
                missing = ", ".join(str(rank) for rank in range(num_ranks) if rank not in parts)
                raise OSError(
                    f"what rank {missing} wrote has not appeared in {GRACE_S:.0f} s: is runs_dir "
                    "on a file system that all nodes share?"
                )
            if len(parts) < num_ranks:
                time.sleep(POLL_S)
        return [parts[rank] for rank in range(num_ranks)]


class GivenUpError(ValueError):
    """Rank 0 does not finish a save, and says why."""


@contextlib.contextmanager
def _refusals_named(save: Save, rank: int) -> Iterator[None]:
    """Remove what was written, and say what can be done where the file system refused.

    Rank 0 removes everything. Another rank leaves what others are writing, and does not take for a
    reason of its own that the directory is gone.
    """
    try:
        yield
    except BaseException as caught:
        # Some errors for want of it have other names; and a third rank may make it again.
        is_gone = isinstance(caught, OSError) and not save.scratch.exists()
        if rank and (is_gone or isinstance(caught, FileNotFoundError)):
            raise GivenUpError(
                f"runs_dir -> the checkpoint {save.path} is not written: rank 0 has given it up -> "
                "its output says why"
            ) from caught
        remove_files(save, rank)
        if not isinstance(caught, OSError):
            raise
        there = next(path for path in save.path.absolute().parents if path.is_dir())
        free = shutil.disk_usage(there).free / 2**20
        raise ValueError(
            f"runs_dir -> the checkpoint {save.path} could not be written ({caught}; "
            f"{free:.0f} MiB free there) -> make room or lower checkpoints.keep_last, then run the "
            f"same command again: it continues from {read_last(save.path.parent) or 'the start'}"
        ) from caught
