"""A user's callback that writes down what each rank is trained on, and how such notes are read."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

Samples = dict[int, dict[int, list[str]]]
"""Step -> rank -> digests of the rows it was trained on, in order."""


class Journal(Callback):
    """Writes the rows of every step, a file for each rank of each launch.

    Args:
        folder: Of these files.
        linger_s: Seconds that steps take longer in a launch that begins with the first one, so
            that there is time to disturb it. A launch that continues the run hurries.
        linger_from: The first of these steps.
    """

    def __init__(self, *, folder: str, linger_s: float, linger_from: int = 6):
        self.folder = Path(folder)
        self.launch = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        self.linger_s, self.linger_from = linger_s, linger_from

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin this rank's file."""
        if trainer.global_step > 0:
            self.linger_s = 0.0
        self.folder.mkdir(exist_ok=True)
        name = f"launch-{self.launch}-rank-{trainer.global_rank}.jsonl"
        self.file = (self.folder / name).open("w", buffering=1)  # a line is there at once

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write down a step's rows before they are trained on."""
        step = trainer.global_step + 1
        rows = [hashlib.blake2b(row.numpy(), digest_size=8).hexdigest() for row in batch["inputs"]]
        self.file.write(json.dumps({"step": step, "rows": rows}) + "\n")
        if step >= self.linger_from:
            time.sleep(self.linger_s)


def read_launches(folder: Path) -> list[Samples]:
    """What each launch that has trained was trained on."""
    launches: dict[int, Samples] = {}
    for path in folder.glob("launch-*"):
        _, launch, _, rank = path.stem.split("-")
        for line in path.read_text().splitlines():
            note = json.loads(line)
            steps = launches.setdefault(int(launch), {})
            steps.setdefault(note["step"], {})[int(rank)] = note["rows"]
    return [launches[launch] for launch in sorted(launches)]


def what_counts(launches: list[Samples]) -> Samples:
    """What the last weights have seen: a launch undoes what others did from its first step on."""
    seen: Samples = {}
    for launch in launches:
        begins = min(launch)
        seen = {step: seen[step] for step in seen if step < begins} | launch
    return seen
