"""Ranks are killed at any instant, again and again, and runs end with the same bits all the same.

    python -m benchmarks.kills [strategies=single,ddp,...] [kills=50] [ranks=2] [steps=30] [seed=0]

A small GPT saves after every step. A rank drawn by lot is killed by SIGKILL at an instant drawn by
lot from the life of a run that is left alone: starting, steps and saves. The others are asked to
end, as torch's elastic agent asks them, and killed too if they have not after a time drawn by lot;
and the same command is repeated until the run is done. Then comes another run, until there were so
many kills. After each kill `last` names a checkpoint that is whole by its digests, unless nothing
was saved yet; the next attempt continues from it, and when it begins to train nothing half-written
is left. A run that is done has the very weights and optimizer state of the one left alone.

Ranks run the program `launch.train` as under torchrun, but are forks of one process that has
imported everything, so that an attempt takes three seconds and not ten.
"""

import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from benchmarks.cells import write_text
from benchmarks.forked_ranks import import_all
from benchmarks.kill_attempts import Attempt, half_written, read_notes
from trainers.checkpoint import open_checkpoint, read_last, verify

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp")
PATIENCE_S = (0.2, 1.0, 15.0)
"""In which ranks may end after SIGTERM. It takes four seconds to find out which rank is dead, ten
more to give up its part of a save, and without end where torch waits for it to come."""
WHOLE_S = 300
NUM_FAULTS = 3
"""Of a strategy, after which its runs are given up."""
OVERRIDES = [
    "experiment=gpt_char_cpu",
    "corpus.num_processes=1",
    "trainer.accelerator=cpu",
    "trainer.timeout_s=60",
    "trainer.log_every_steps=1",
    "checkpoints.every_steps=1",
    "batch_samples=8",
    "datamodule.sequence_length=16",
    "module.network={num_layers: 2, num_heads: 2, width: 32, dropout: 0.1}",
    "module.schedule.warmup_samples=16",
    "+trainer.callbacks.notes={_target_: benchmarks.kill_attempts.Notes}",
]


@dataclass
class Tally:
    """What became of a strategy's runs.

    Attributes:
        kills: Attempts that were killed.
        in_starts: Of these, before the first step.
        in_saves: While a checkpoint was half written.
        resumes: Attempts that have trained on from a checkpoint.
        repeated_steps: Steps that were made once more.
        runs: That were trained to their end.
        seconds: Of an attempt, in the mean.
        faults: What is not as it should be.
    """

    kills: int = 0
    in_starts: int = 0
    in_saves: int = 0
    resumes: int = 0
    repeated_steps: int = 0
    runs: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


class Kills:
    """Kills runs of one strategy.

    Args:
        strategy: As `strategy=`.
        num_ranks: As `trainer.devices=`.
        num_steps: Of each run.
        folder: Of data and runs.
        lots: For ranks and instants.
    """

    def __init__(
        self, strategy: str, num_ranks: int, num_steps: int, folder: Path, lots: random.Random
    ):
        self.strategy, self.num_ranks, self.lots = strategy, num_ranks, lots
        self.runs, self.errors = folder / "runs", folder / f"{strategy}.txt"
        self.tally, self.life_s = Tally(), 0.0
        paths = {"corpus.path": "text.txt", "data_dir": "data", "runs_dir": "runs"}
        self.overrides = [
            *OVERRIDES,
            *(f"{key}={folder / name}" for key, name in paths.items()),
            f"strategy={strategy}",
            f"trainer.devices={num_ranks}",
            f"max_steps={num_steps}",
        ]

    def run(self, num_kills: int) -> Tally:
        """Kill as often, and train what was killed last to its end."""
        is_prepared = (self.runs.parent / "data").exists()
        for name in ("whole",) if is_prepared else ("first", "whole"):
            begun = time.monotonic()
            attempt = self._attempt(name)
            attempt.wait(WHOLE_S)
            self.life_s = time.monotonic() - begun
            attempt.end(0)
            if attempt.has_failed:
                raise RuntimeError(f"{self.strategy}, left alone -> {self.errors.read_text()}")
        begun, tally = time.monotonic(), self.tally
        while tally.kills < num_kills and len(tally.faults) < NUM_FAULTS:
            self._train(f"{tally.runs}", num_kills)
        tally.seconds = (time.monotonic() - begun) / (tally.kills + tally.runs)
        return tally

    def _attempt(self, name: str) -> Attempt:
        overrides = [*self.overrides, f"run.name={self.strategy}-{name}"]
        return Attempt(overrides, self.num_ranks, self.errors)

    def _train(self, name: str, num_kills: int) -> None:
        """Train a run to its end, killed as often as it comes."""
        tally, run = self.tally, self.runs / f"{self.strategy}-{name}"
        while len(tally.faults) < NUM_FAULTS:
            seen, last = len(read_notes(run)), read_last(run / "checkpoints")
            older = half_written(run)
            attempt = self._attempt(name)
            life_s = self.lots.uniform(0, self.life_s) if tally.kills < num_kills else WHOLE_S
            if is_killed := not attempt.wait(life_s):
                os.kill(self.lots.choice(attempt.left), signal.SIGKILL)
                tally.kills += 1
                tally.in_saves += bool(half_written(run) - older)
                attempt.wait(WHOLE_S)
            elif attempt.has_failed:
                self._blame(run, f"ended with codes {attempt.codes}")
            attempt.end(self.lots.choice(PATIENCE_S))
            has_begun = self._check_start(run, seen, last)
            tally.in_starts += is_killed and not has_begun
            self._check_last(run)
            if not attempt.has_failed:
                self._compare(run)
                tally.runs += 1
                return

    def _check_start(self, run: Path, seen: int, last: str | None) -> bool:
        """See whether an attempt began to train, after `seen` notes, and from `last`."""
        notes = read_notes(run)
        begun = next((note for note in notes[seen:] if "from" in note), None)
        if begun is None:
            return False
        step = int(last.removeprefix("step-")) if last else 0
        if begun["from"] != step or begun["left"]:
            self._blame(run, f"{last} was the last, and it began to train with {begun}")
        self.tally.resumes += step > 0
        made = max((note["step"] for note in notes[:seen] if "step" in note), default=0)
        self.tally.repeated_steps += max(0, made - step)
        return True

    def _check_last(self, run: Path) -> None:
        """See that what was saved last is whole."""
        if last := read_last(run / "checkpoints"):
            try:
                verify(run / "checkpoints" / last)
            except ValueError as error:
                self._blame(run, str(error))

    def _compare(self, run: Path) -> None:
        """See that a run has ended as the one left alone."""
        mine, theirs = (
            open_checkpoint(path / "checkpoints" / str(read_last(path / "checkpoints"))).tensors
            for path in (run, self.runs / f"{self.strategy}-whole")
        )
        differing = [n for n in theirs if not torch.equal(mine[n].whole(), theirs[n].whole())]
        if mine.keys() != theirs.keys() or differing:
            self._blame(run, f"{len(differing)} of {len(theirs)} tensors differ")
        if left := half_written(run):
            self._blame(run, f"{left} are left at its end")

    def _blame(self, run: Path, fault: str) -> None:
        self.tally.faults.append(f"{run.name}: {fault}")


def main() -> None:
    """Kill runs of all strategies and print a table."""
    options: dict[str, Any] = {"strategies": ",".join(STRATEGIES)}
    options |= {"kills": 50, "ranks": 2, "steps": 30, "seed": 0}
    options |= dict(OmegaConf.from_dotlist(sys.argv[1:]))  # type: ignore[arg-type]
    titles = [name.replace("_", " ") for name in asdict(Tally())]
    table, faults = Table("strategy", *titles), []
    import_all()
    with tempfile.TemporaryDirectory() as name:
        write_text(folder := Path(name))
        for strategy in options["strategies"].split(","):
            ranks = 1 if strategy == "single" else options["ranks"]
            lots = random.Random(f"{options['seed']} {strategy}")
            kills = Kills(strategy, ranks, options["steps"], folder, lots)
            tally = kills.run(options["kills"])
            print(f"{strategy}: {tally}, {kills.life_s:.1f} s left alone", flush=True)
            *numbers, seconds, found = asdict(tally).values()
            table.add_row(strategy, *map(str, numbers), f"{seconds:.1f}", str(len(found)))
            if found:
                print(kills.errors.read_text()[-5000:])
            faults += found
    Console(width=140).print(table)
    print(*faults, sep="\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
