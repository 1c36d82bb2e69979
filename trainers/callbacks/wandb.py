"""Weights & Biases by its own client. Imported only with `logger=wandb`."""

import json
import os
import secrets
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import wandb
from lightning.fabric.utilities.rank_zero import rank_zero_only

from trainers.callbacks.preemption import PreemptedError
from trainers.checkpoint_parts import without_credentials
from trainers.durable_files import write_atomically
from trainers.metrics import StampedLogger, read_metrics

NUM_RECENT = 200
"""Rows that a client is given once more; what the one before may not have written is of seconds."""


class WandbLogger(StampedLogger):
    """One W&B run per run directory, however often it is stopped and continued.

    The id is kept in `wandb.json` beside the configuration and given to every start, and every row
    carries its optimizer step explicitly, so that a continued run goes on where it stopped; the
    x-axis is `samples` (`tokens` is there to choose). Without an API key the client works offline
    and makes one directory per start under `<run directory>/wandb`, all with the same id.

    The client writes by a process of its own, which loses its latest rows when it is killed.
    SIGTERM ends it too, and schedulers send that to every process of a job. The run goes on to save
    all the same, and each new client is first given the latest rows of `metrics.jsonl` once more.
    Those that have arrived already are dropped by W&B, whose steps only rise.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        run_config: Mapping[str, Any],
        project: str,
        entity: str | None,
        group: str | None,
        tags: list[str],
        mode: str | None,
    ):
        """Take what `wandb.init` needs; `mode` None: as WANDB_MODE, or by the key."""
        super().__init__()
        self.directory = Path(directory)
        self.run_config, self.project, self.entity = (
            without_credentials(run_config),
            project,
            entity,
        )
        self.group, self.tags = group, tags
        default = "online" if _has_api_key() else "offline"
        self.mode = mode or os.environ.get("WANDB_MODE") or default
        self._run: Any = None
        self._is_lost = False

    @property
    def name(self) -> str:
        """The project's name."""
        return self.project

    @property
    def version(self) -> str:
        """The W&B run's id, made on the first start and kept in the run directory."""
        path = self.directory / "wandb.json"
        if not path.exists():
            write_atomically(path, json.dumps({"id": secrets.token_hex(4)}) + "\n")
        return json.loads(path.read_text())["id"]

    @property
    def experiment(self) -> Any:
        """The client's run; Lightning asks for it before training, which starts it."""
        return self._start()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log a row at the run's optimizer step."""
        self._log(dict(metrics) | self.stamp())

    @rank_zero_only
    def log_table(self, key: str, rows: list[dict[str, str]]) -> None:
        """Log rows of text as a table."""
        if rows:
            data = [list(row.values()) for row in rows]
            table = wandb.Table(columns=[*rows[0]], data=data)
            self._log({key: table} | self.stamp())

    @rank_zero_only
    def log_pictures(self, pictures: Mapping[str, Path], num_images: int) -> None:
        """Log PNG files; rows of steps gone by are refused, so captions say when they are from."""
        caption = f"after {num_images:,} images"
        row = {
            f"pictures/{name}": wandb.Image(str(path), caption=caption)
            for name, path in pictures.items()
        }
        self._log(row | self.stamp())

    def _log(self, row: dict[str, Any]) -> None:
        if self._is_lost:
            self._start_anew()
        try:
            self.experiment.log(row, step=int(row["step"]))
        except ConnectionError:  # a stop may be asked for, and to save it is more urgent
            self._is_lost = True

    def _start_anew(self) -> None:
        with suppress(ConnectionError):
            wandb.teardown()
        self._run, self._is_lost = None, False
        self._start()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the client's run; Lightning says `failed` of one that was asked to stop, too."""
        if self._run is not None:
            is_failed = status == "failed" and not isinstance(sys.exc_info()[1], PreemptedError)
            try:
                self._run.finish(exit_code=int(is_failed))
            except ConnectionError:
                self._start_anew()
                self._run.finish(exit_code=int(is_failed))
            self._run = None

    @rank_zero_only
    def _start(self) -> Any:
        if self._run is None:
            self._run = wandb.init(
                dir=self.directory,
                id=self.version,
                resume="allow",
                name=self.directory.name,
                project=self.project,
                entity=self.entity,
                group=self.group,
                tags=self.tags,
                config=self.run_config,
                mode=self.mode,  # pyright: ignore[reportArgumentType]
                settings=wandb.Settings(silent=True),
            )
            self._run.define_metric("samples", hidden=True)
            self._run.define_metric("*", step_metric="samples")
            for row in read_metrics(self.directory / "metrics.jsonl")[-NUM_RECENT:]:
                self._run.log(row, step=int(row["step"]))
        return self._run


def _has_api_key() -> bool:
    return bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
