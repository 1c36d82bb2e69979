"""A user's callback that writes down what each rank is trained on, and how such notes are read."""

import contextlib
import hashlib
import json
import os
import time
from itertools import chain
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

Samples = dict[int, dict[int, list[str]]]
"""Step -> rank -> digests of the rows it was trained on, in order."""


PLACE = ("MASTER_ADDR", "MASTER_PORT")
"""Where the ranks of a launch meet: another place for each."""


class Journal(Callback):
    """Writes the rows of every step, a file for each rank of each launch.

    Args:
        folder: Of these files. While it has one with the name `linger_s`, its seconds count.
        linger_s: Seconds that steps take longer in a launch that begins with the first one, so
            that there is time to disturb it. A launch that continues the run hurries.
        linger_from: The first of these steps.
    """

    def __init__(self, *, folder: str, linger_s: float = 0.0, linger_from: int = 6):
        self.folder = Path(folder)
        self.linger_s, self.linger_from = linger_s, linger_from

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin this rank's file."""
        if trainer.global_step > 0:
            self.linger_s = 0.0
        self.folder.mkdir(exist_ok=True)
        launch = ":".join(os.environ.get(name, str(os.getpid())) for name in PLACE)
        self.facts = {"launch": launch, "began": time.time(), "rank": trainer.global_rank}
        name = f"{time.time_ns()}-rank-{trainer.global_rank}.jsonl"
        self.file = (self.folder / name).open("w", buffering=1)  # a line is there at once

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End it; a launch that is disturbed leaves that to its process."""
        self.file.close()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write down the rows of a micro-batch before they are trained on."""
        step = trainer.global_step + 1
        rows = [hashlib.blake2b(row.numpy(), digest_size=8).hexdigest() for row in batch["inputs"]]
        self.file.write(json.dumps({**self.facts, "step": step, "rows": rows}) + "\n")
        linger_s = self.linger_s if step >= self.linger_from else 0.0
        with contextlib.suppress(FileNotFoundError):
            linger_s = float((self.folder / "linger_s").read_text())
        time.sleep(linger_s)


def read_launches(folder: Path) -> list[Samples]:
    """What each launch that has trained was trained on, in their order."""
    launches: dict[str, Samples] = {}
    lines = chain.from_iterable(path.read_text().splitlines() for path in folder.glob("*.jsonl"))
    for note in sorted(map(json.loads, lines), key=lambda note: note["began"]):
        ranks = launches.setdefault(note["launch"], {}).setdefault(note["step"], {})
        ranks.setdefault(note["rank"], []).extend(note["rows"])
    return list(launches.values())


def what_counts(launches: list[Samples]) -> Samples:
    """What the last weights have seen: a launch undoes what others did from its first step on."""
    seen: Samples = {}
    for launch in launches:
        begins = min(launch)
        seen = {step: seen[step] for step in seen if step < begins} | launch
    return seen


def in_order(samples: Samples) -> dict[int, list[str]]:
    """Rows of each step in their global order: the p-th is of rank `p % num_ranks`."""
    return {
        step: list(chain.from_iterable(zip(*(ranks[r] for r in sorted(ranks)), strict=True)))
        for step, ranks in samples.items()
    }
