"""A run's directory, `runs/<name>/`: what is in it, and when it may be continued.

config.yaml      the configuration, with the facts of its data and its plan
status.json      starting | running | done | preempted | failed, and why
summary.json     what a finished run reports
metrics.jsonl    every logged row                losses.png    their picture
checkpoints/  samples/  evaluations/  logs/  tokenizer.json  target_tokenizer.json  wandb.json
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
from socket import gethostname
from typing import Any

from omegaconf import DictConfig, OmegaConf

from launch.resume_rules import check_resume, drops_optimizer, refuse_changes
from trainers.durable_files import no_room, write_atomically

TOKENIZERS = ("tokenizer.json", "target_tokenizer.json")
"""Of what a model reads, and of what it writes where that is another."""


class StoppedError(BaseException):
    """A signal to stop came before the training loop could take care of it.

    Like KeyboardInterrupt no `Exception`, which libraries swallow.
    """


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
        facts = {"state": state, "reason": reason, "time": time.time(), "pid": os.getpid()} | facts
        _replace(self.path / "status.json", json.dumps(facts, indent=1) + "\n")

    def write_failure(self, reason: str, step: int) -> None:
        """Say why the run failed, by who knows the cause; what ranks run into after it is none."""
        self.write_status("failed", reason, step=step, is_cause=True)

    @contextmanager
    def noting_failed_start(self) -> Iterator[None]:
        """Write down why a run ends before there is a trainer.

        What all ranks run into is rank 0's to say; what one of the others does, that rank's.
        """
        rank = os.environ.get("RANK", "0")
        try:
            yield
        except StoppedError as error:
            if rank == "0" and self.status.get("state") == "starting":
                self.write_status("preempted", f"{error} before the first step")
            raise
        except Exception as error:
            reason = no_room(error) or str(error.__cause__ or error) or type(error).__name__
            state, step = (status := self.status).get("state"), status.get("step", 0)
            if rank != "0" and state in ("starting", "running"):
                self.write_failure(f"rank {rank} on {gethostname()} failed: {reason}", step)
            if rank == "0" and (state == "starting" or status.get("reason", "").endswith(reason)):
                self.write_failure(reason, step)
            raise

    @contextmanager
    def status_of(self, trainer: Any) -> Iterator[Callable[..., None]]:
        """Keep `status.json` true while `trainer` works; gives a function to say how it ended.

        Written by rank zero; an exception that passes through is the reason of a failed run.
        """

        def write(state: str, reason: str = "", **facts: Any) -> None:
            if trainer.is_global_zero:
                self.write_status(state, reason, step=trainer.global_step, **facts)
                if state == "running":  # how it ends is the command's last line
                    print(f"run {self.path.name}: {state}: {reason}", flush=True)

        path = self.find_checkpoint("last")
        first = int(path.name.removeprefix("step-")) if path else 0
        begins = self._describe_start(path, trainer.strategy.checkpoint_io.drops_optimizer)
        write("running", f"{begins}, up to {trainer.max_steps} steps, in {self.path}")
        try:
            yield write
        except BaseException as error:
            if trainer.is_global_zero and not self.status.get("is_cause"):
                if isinstance(error, StoppedError) and trainer.global_step <= first:
                    self.write_status("preempted", f"{error} before the first step")
                else:
                    state = "preempted" if isinstance(error, StoppedError) else "failed"
                    write(state, no_room(error) or f"{type(error).__name__}: {error}")
            raise

    def _describe_start(self, path: Path | None, drops_optimizer: bool) -> str:
        from trainers.checkpoint import read_manifest

        if path is None:
            return "begins"
        manifest = read_manifest(path)
        saved, ranks = manifest.get("strategy"), manifest.get("world_size")
        without = ", without its optimizer state" if drops_optimizer else ""
        return f"continues from {path.name} (saved by {saved} on {ranks} rank(s)){without}"

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Keep what a finished run reports."""
        _replace(self.path / "summary.json", json.dumps(summary, indent=1) + "\n")

    def is_done(self, config: DictConfig) -> bool:
        """Whether the run has already trained as long as `config` asks, and need not go back."""
        is_long_enough = self.summary.get("step", 0) >= config.plan.max_steps
        is_done = self.status.get("state") == "done" and is_long_enough
        return is_done and self._is_there_already(str(config.checkpoint))

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
            pointers = [name for name in ("last", "best") if (self.checkpoints / name).exists()]
            names = ", ".join([*pointers, *(p.name for p in list_checkpoints(self.checkpoints))])
            raise ValueError(
                f"checkpoint={which} -> {self.path} has none of that name -> use one of {names}"
            )
        return path

    def continuation(self, config: DictConfig) -> dict[str, Any]:
        """Where the run continues: arguments of `trainers.build.build_trainer`.

        Raises:
            ValueError: The checkpoint has the state of another optimizer.
        """
        from trainers.checkpoint import read_manifest

        path = self.find_checkpoint("last")
        manifest = read_manifest(path) if path else {"step": 0}
        drops = bool(path) and drops_optimizer(manifest, config)
        return {"resume_step": manifest["step"], "drops_optimizer": drops}

    def verify_checkpoint(self, which: str, how: str = "digests") -> None:
        """Check the bytes of the checkpoint that the run would continue from, if there is one.

        Args:
            which: As `find_checkpoint`.
            how: `digests`, or `sizes` to read none of them.

        Raises:
            ValueError: They are not what was saved; names the file and the checkpoint before it.
        """
        from trainers.checkpoint import verify

        path = self.find_checkpoint(which)
        if path is not None:
            verify(path, digests=how == "digests")

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

    def go_back_to(self, which: str, verify: str = "digests") -> None:
        """Make the checkpoint that `checkpoint=<name>|best` names the one to continue from, once.

        Later ones are set aside in `checkpoints/abandoned`, and `best` is dropped if it is later.
        The same command again then continues like any other.

        Raises:
            ValueError: It is not one of this run's, or its bytes are not what was saved.
        """
        if self._is_there_already(which):
            if which != "last":
                mark = self.checkpoints / "went_back"
                print(f"checkpoint={which}: went back before; to do so again delete {mark}")
            return
        path = self.find_checkpoint(which)
        if path is None or path.parent.resolve() != self.checkpoints.resolve():
            raise ValueError(
                f"checkpoint={which} -> it is not of run {self.path.name} -> to start from another "
                f"run's weights use init_from={which} under a new run.name"
            )
        self.verify_checkpoint(which, verify)
        write_atomically(self.checkpoints / "last", path.name + "\n")
        if _read_json(self.checkpoints / "best").get("checkpoint", "") > path.name:
            (self.checkpoints / "best").unlink()
        self.set_aside_after(path.name)
        self.write_status("starting", f"went back to {path.name}")
        write_atomically(self.checkpoints / "went_back", json.dumps({"to": which}) + "\n")

    def set_aside_after(self, name: str) -> None:
        """Move checkpoints of later steps than `name` to `checkpoints/abandoned`."""
        from trainers.checkpoint import list_checkpoints

        for later in list_checkpoints(self.checkpoints):
            if later.name > name:
                aside = self.checkpoints / "abandoned" / later.name
                aside.parent.mkdir(exist_ok=True)
                shutil.rmtree(aside, ignore_errors=True)
                later.replace(aside)

    def _is_there_already(self, which: str) -> bool:
        return which == "last" or _read_json(self.checkpoints / "went_back").get("to") == which

    def compare(self, config: DictConfig) -> None:
        """Refuse a configuration that does not continue what is there.

        A run that has saved nothing may change in everything.

        Raises:
            ValueError: It differs in keys that may not change, or ends before what is trained.
        """
        from trainers.checkpoint import list_checkpoints

        saved = list_checkpoints(self.checkpoints)
        check_resume(config)
        if saved:
            refuse_changes(self.config, config, str(self.path))
            newest = int(saved[-1].name.removeprefix("step-"))
            stays = self._is_there_already(str(config.checkpoint))
            if config.resume.extend and stays and newest > config.plan.max_steps:
                raise ValueError(
                    f"resume.extend=true -> {saved[-1]} is beyond the {config.plan.max_steps} "
                    f"steps asked for -> ask for more, or go back with checkpoint=<name>"
                )

    def accept(self, config: DictConfig) -> None:
        """Write `config` as the run's, and that it is starting."""
        self.write_status("starting")
        _replace(self.path / "config.yaml", OmegaConf.to_yaml(config))
        for name in TOKENIZERS if config.data else ():  # so that a run can be read without its data
            if (tokenizer := Path(config.data.path, name)).exists():
                shutil.copy(tokenizer, self.path)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _replace(path: Path, text: str) -> None:
    write_atomically(path, text, writer=f".{gethostname()}-{os.getpid()}")  # one of several ranks
