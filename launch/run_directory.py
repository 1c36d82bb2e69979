"""A run's directory, `runs/<name>/`: what is in it, and when it may be continued.

config.yaml      the configuration, with the facts of its data and its plan
status.json      running | done | preempted | failed, and why
summary.json     what a finished run reports
metrics.jsonl    every logged row                losses.png    their picture
checkpoints/  samples/  logs/  tokenizer.json  wandb.json
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

# On resume these may change; any other difference stops the run and is listed.
FREE_KEYS = (
    "trainer.devices", "trainer.accelerator", "cluster", "strategy", "micro_batch",
    "activation_checkpointing", "datamodule.num_workers", "logger", "runs_dir", "data_dir",
    "corpus.path", "data.path", "data.settings", "checkpoint", "checkpoints", "resume", "plan",
)  # fmt: skip
LENGTH_KEYS = ("max_tokens", "max_samples", "max_steps")


@dataclass(frozen=True)
class RunDirectory:
    """The directory of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.path / "checkpoints"

    @property
    def config(self) -> DictConfig:
        """The run's configuration, interpolations resolved on access."""
        config = OmegaConf.load(self.path / "config.yaml")
        assert isinstance(config, DictConfig)
        return config

    @property
    def status(self) -> dict[str, Any]:
        """The last written status; empty before the first start."""
        return _read_json(self.path / "status.json")

    @property
    def summary(self) -> dict[str, Any]:
        """What the finished run reported; empty before."""
        return _read_json(self.path / "summary.json")

    def write_status(self, state: str, reason: str = "", **facts: Any) -> None:
        """Say what the run is doing, or how and why it ended."""
        status = {"state": state, "reason": reason, "time": time.time(), "pid": os.getpid()}
        _replace(self.path / "status.json", json.dumps(status | facts, indent=1) + "\n")

    @contextmanager
    def status_of(self, trainer: Any) -> Iterator[Callable[[str, str], None]]:
        """Keep `status.json` true while `trainer` works; gives a function to say how it ended.

        Written by rank zero; an exception that passes through is the reason of a failed run.
        """

        def write(state: str, reason: str = "") -> None:
            if trainer.is_global_zero:
                self.write_status(state, reason, step=trainer.global_step)
                if state == "preempted":
                    print(f"{self.path.name}: {state}: {reason}", flush=True)

        write("running")
        try:
            yield write
        except BaseException as error:
            write("failed", f"{type(error).__name__}: {error}")
            raise

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Keep what a finished run reports."""
        _replace(self.path / "summary.json", json.dumps(summary, indent=1) + "\n")

    def is_done(self, config: DictConfig) -> bool:
        """Whether the run has already trained as long as `config` asks."""
        done_steps = self.summary.get("step", 0)
        return self.status.get("state") == "done" and done_steps >= config.plan.max_steps

    def find_checkpoint(self, which: str) -> Path | None:
        """Resolve `checkpoint=last|best|<name>|<path>`.

        Returns:
            The checkpoint's directory; None for `last` of a run that has saved nothing yet.

        Raises:
            ValueError: There is no such checkpoint.
        """
        from trainers.checkpoint import list_checkpoints, read_last

        name: str | None = which
        if which == "last":
            name = read_last(self.checkpoints)
            if name is None:
                return None
        elif which == "best":
            name = _read_json(self.checkpoints / "best").get("checkpoint")
        path = self.checkpoints / name if name else None
        if path is None or not path.is_dir():
            path = Path(which)
        if not path.is_dir():
            names = ", ".join(
                ["last", "best", *(p.name for p in list_checkpoints(self.checkpoints))]
            )
            raise ValueError(
                f"checkpoint={which} -> {self.path} has none of that name -> use one of {names}"
            )
        return path

    def verify_checkpoint(self, which: str) -> None:
        """Check the bytes of the checkpoint that the run would continue from, if there is one.

        Raises:
            ValueError: They are not what was saved; names the file and the checkpoint before it.
        """
        from trainers.checkpoint import verify

        path = self.find_checkpoint(which)
        if path is not None:
            verify(path)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process.

        Raises:
            ValueError: Another process is training this run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a") as file:
            try:
                # A record lock: loader workers that outlive a killed run do not inherit it.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ValueError(
                    f"run.name={self.path.name} -> process {self.status.get('pid')} is training it "
                    f"now ({self.path}) -> wait for it, stop it, or choose another run.name"
                ) from error
            yield

    def accept(self, config: DictConfig) -> None:
        """Write `config` as the run's, if it continues what is there or nothing is saved yet.

        Raises:
            ValueError: It differs in keys that may not change within a run.
        """
        if self.find_checkpoint("last") is not None:
            changed = changed_keys(self.config, config)
            free = FREE_KEYS + (LENGTH_KEYS if config.resume.extend else ())
            refused = [line for key, line in changed.items() if not _is_within(key, free)]
            if refused:
                longer = [key for key in changed if key in LENGTH_KEYS]
                remedy = "; to train longer add resume.extend=true" if longer else ""
                raise ValueError(
                    f"run.name={config.run.name} -> {self.path} was trained with another "
                    f"configuration:\n  " + "\n  ".join(refused) + "\n"
                    f"-> take these changes back to continue it, or choose another run.name{remedy}"
                )
        _replace(self.path / "config.yaml", OmegaConf.to_yaml(config))
        if config.data and (tokenizer := Path(config.data.path, "tokenizer.json")).exists():
            shutil.copy(tokenizer, self.path)  # so that a run can be read without its data


def find_run(run: str, runs_dir: str) -> RunDirectory:
    """Find a run by `run=<name|path>`.

    Raises:
        ValueError: There is none; the names that exist are given.
    """
    for path in (Path(runs_dir, run), Path(run)):
        if (path / "config.yaml").exists():
            return RunDirectory(path)
    known = sorted(path.parent.name for path in Path(runs_dir).glob("*/config.yaml"))
    names = ", ".join(known) or "none yet: train one first"
    raise ValueError(f"run={run} -> no such run in {runs_dir}/ -> there are: {names}")


def find_weights(source: str, runs_dir: str) -> Path:
    """Find the checkpoint that `init_from=<run|checkpoint directory>` names: a run's best or last.

    Raises:
        ValueError: There is no such run, or it has saved nothing.
    """
    from trainers.checkpoint import MANIFEST, verify

    path: Path | None = Path(source)
    if not (Path(source) / MANIFEST).exists():
        run = find_run(source, runs_dir)
        best = (run.checkpoints / "best").exists()
        path = run.find_checkpoint("best" if best else "last")
    if path is None:
        raise ValueError(f"init_from={source} -> that run has saved nothing -> train it first")
    verify(path)
    return path


def changed_keys(old: DictConfig, new: DictConfig) -> dict[str, str]:
    """Keys whose written values differ, interpolations compared as written, each with a line."""
    before, after = _flatten(old), _flatten(new)
    return {
        key: f"{key}: {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def _flatten(config: DictConfig) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                walk(value, f"{prefix}.{key}" if prefix else str(key))
        else:
            flat[prefix] = node

    walk(OmegaConf.to_container(config, resolve=False), "")
    return flat


def _is_within(key: str, roots: tuple[str, ...]) -> bool:
    return any(key == root or key.startswith(f"{root}.") for root in roots)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _replace(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(text)
    scratch.replace(path)
