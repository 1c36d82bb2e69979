"""Attempts at training a run, to be killed by `benchmarks.kills`, and what they note."""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.forked_ranks import fork_ranks

NOTES = "notes.jsonl"


class Notes(Callback):
    """Notes where an attempt begins to train, what is left there, and every step; no validation."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Validate nothing."""
        trainer.limit_val_batches = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Come to the first step."""
        self.is_first = True

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look around before this attempt has saved anything."""
        if self.is_first:
            left = half_written(Path(trainer.default_root_dir))
            self._note(trainer, {"from": trainer.global_step, "left": sorted(left)})
        self.is_first = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note a step."""
        self._note(trainer, {"step": trainer.global_step})

    def _note(self, trainer: Trainer, note: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            with Path(trainer.default_root_dir, NOTES).open("a") as file:
                file.write(json.dumps(note) + "\n")


class Attempt:
    """The program `launch.train` on every rank, once.

    Args:
        overrides: Of its configuration.
        num_ranks: As `trainer.devices=`.
        errors: File for all that ranks say.
    """

    def __init__(self, overrides: list[str], num_ranks: int, errors: Path):
        def program() -> int:
            from launch.train import main

            file = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(file, stream)
            sys.argv = ["train", *overrides]
            try:
                with mock.patch("trainers.metrics.plot_losses"):  # a second
                    main()
            except SystemExit as ended:
                return int(ended.code or 0)
            return 0

        self.pids, self.codes = fork_ranks(program, num_ranks), {}

    @property
    def has_failed(self) -> bool:
        """Whether a rank has ended otherwise than well."""
        return any(self.codes.values())

    @property
    def left(self) -> list[int]:
        """Ranks that live."""
        return [pid for pid in self.pids if pid not in self.codes]

    def wait(self, timeout_s: float) -> bool:
        """Wait until no rank lives, or one has failed; gives false after `timeout_s`."""
        deadline, num_failed = time.monotonic() + timeout_s, self._num_failed()
        while self.left and self._num_failed() == num_failed:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
            for pid in self.left:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return True

    def end(self, patience_s: float) -> int:
        """End it as the agent does; gives how many ranks had to be killed after so long."""
        for pid in self.left:
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + patience_s
        while self.left and self.wait(deadline - time.monotonic()):
            pass
        stubborn = self.left
        for pid in stubborn:
            os.kill(pid, signal.SIGKILL)
            self.codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return len(stubborn)

    def _num_failed(self) -> int:
        return sum(code != 0 for code in self.codes.values())


def half_written(run: Path) -> set[str]:
    """Names of what is half written or half deleted of checkpoints."""
    return {path.name for path in (run / "checkpoints").glob(".step-*")}


def read_notes(run: Path) -> list[dict[str, Any]]:
    """All whole lines; a kill may cut one."""
    notes = []
    for line in (run / NOTES).read_text().splitlines() if (run / NOTES).exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            notes.append(json.loads(line))
    return notes
