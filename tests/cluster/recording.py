"""Which samples each rank of each start was given, kept outside the run, and read back in order."""

import contextlib
import json
import os
import time
from collections import defaultdict
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Recording(Callback):
    """A user's callback that writes down the rows of every micro-batch, and takes its time.

    Args:
        folder: Where; a file for each rank of each start. While it has a file `pause_s`, so many
            seconds are added to each micro-batch: a run can be disturbed, and then hurries.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open this rank's file; a start is known by where its ranks have met."""
        place = "-".join(os.environ.get(key, "") for key in ("MASTER_ADDR", "MASTER_PORT"))
        self.facts: dict[str, Any] = {"start": place, "begun": time.time()}
        self.facts |= {"rank": trainer.global_rank, "world_size": trainer.world_size}
        self.file = self.folder / f"{time.time_ns()}-{trainer.global_rank}.jsonl"

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write down the rows of a micro-batch before it is trained on."""
        rows = [
            blake2b(row.numpy().tobytes(), digest_size=8).hexdigest() for row in batch["inputs"]
        ]
        line = json.dumps({**self.facts, "step": trainer.global_step + 1, "rows": rows}) + "\n"
        with self.file.open("a") as file:  # in one write: whoever is killed leaves whole lines
            file.write(line)
        with contextlib.suppress(FileNotFoundError):
            time.sleep(float((self.folder / "pause_s").read_text()))


def recorded(folder: Path) -> str:
    """Make a folder for records, and give the override that adds them to a run."""
    folder.mkdir(parents=True, exist_ok=True)
    return f"+trainer.callbacks.recording={{_target_: {__name__}.Recording, folder: {folder}}}"


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All that was written down, in the order of starts."""
    lines = chain.from_iterable(path.read_text().splitlines() for path in folder.glob("*.jsonl"))
    return sorted(map(json.loads, lines), key=lambda record: record["begun"])


def world_sizes(folder: Path) -> list[int]:
    """Number of ranks of each start that has come to a step, in their order."""
    starts = {record["start"]: record["world_size"] for record in read_records(folder)}
    return list(starts.values())


def samples_of(folder: Path) -> dict[int, list[str]]:
    """The samples of each step in their global order, as the last start that made it was given.

    Position p of a step is sample `p // ranks` of rank `p % ranks`.
    """
    made: dict[int, dict[str, dict[int, list[str]]]] = defaultdict(dict)
    for record in read_records(folder):
        ranks = made[record["step"]].setdefault(record["start"], {})
        ranks.setdefault(record["rank"], []).extend(record["rows"])
    last = {step: list(starts.values())[-1] for step, starts in sorted(made.items())}
    return {
        step: list(chain.from_iterable(zip(*(ranks[r] for r in sorted(ranks)), strict=True)))
        for step, ranks in last.items()
    }
