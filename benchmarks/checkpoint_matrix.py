"""A run that was begun by any strategy on any number of ranks continues on any other.

    python -m benchmarks.checkpoint_matrix [modules=gpt,gan] [from=zero1@4,...] [to=fsdp@2,...]

{single@1; ddp, zero1, zero2, zero3, fsdp at 1, 2 and 4 ranks} each train three steps and save; each
of them continues from what each has saved, for two more. A GPT with AdamW and a schedule, in
micro-batches of two, so that accumulation changes with the ranks, and a GAN with Adam, R1 and the
moving average of its generator; fp32. Losses of the steps after the change and the final weights,
moving averages among them, are compared with those of one rank that was never stopped, and the
samples of each step, taken together over the ranks, must be the very same.

Controls: what continues without its optimizer's state must differ in losses, and what continues one
step late in its data must differ in samples.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from trainers.checkpoint import load_weights, read_last
from trainers.metrics import read_metrics

SHARDED = ("zero1", "zero2", "zero3", "fsdp")
LAUNCHES = ("single@1", *(f"{s}@{n}" for n in (1, 2, 4) for s in ("ddp", *SHARDED)))
"""Strategies with numbers of ranks."""
WHOLE = "single@1"
NUM_STEPS, BEGUN_STEPS = 5, 3
TOLERANCE = 1e-4
"""Of losses; what fp32 adds up in another order is 1e-6 away."""
WEIGHTS_TOLERANCE = 3e-4
"""Adam divides gradients by their own size, also those that are nothing but rounding."""


@dataclass(frozen=True)
class Run:
    """A run, or a part of one.

    Attributes:
        module: `gpt`, or one of `benchmarks.gan_cells.GANS`.
        launch: Strategy and number of ranks, such as `zero2@4`.
        continues: By what launch it was begun; None for a run that begins here.
        num_steps: At which it ends.
        control: What to break: `lost_state` or `late_data`.
    """

    module: str
    launch: str
    continues: str | None = None
    num_steps: int = NUM_STEPS
    control: str | None = None

    @property
    def name(self) -> str:
        """Of its directory."""
        begun = f"{self.continues}-to-" if self.continues else ""
        control = f"-{self.control}" if self.control else ""
        return f"{self.module}-{begun}{self.launch}-{self.num_steps}{control}"

    @property
    def strategy(self) -> str:
        """As `strategy=`."""
        return self.launch.split("@")[0]

    @property
    def num_ranks(self) -> int:
        """As `trainer.devices=`."""
        return int(self.launch.split("@")[1])

    @property
    def beginning(self) -> "Run | None":
        """The run that it continues."""
        return begun(self.module, self.continues) if self.continues else None

    @property
    def whole(self) -> "Run":
        """What it is compared with."""
        return Run(self.module, WHOLE)


@dataclass(frozen=True)
class Difference:
    """How far a run is from one that was never stopped.

    Attributes:
        losses: Largest difference of those of the steps that both have made.
        weights: Largest difference of parameters and buffers at the end.
        other_samples: Steps whose samples differ.
        error: What the run ended with.
    """

    losses: float = float("inf")
    weights: float = float("inf")
    other_samples: tuple[int, ...] = ()
    error: str | None = None

    @property
    def is_none(self) -> bool:
        """Whether the run has continued as if nothing had happened."""
        is_near = self.losses <= TOLERANCE and self.weights <= WEIGHTS_TOLERANCE  # false of nan
        return is_near and not self.other_samples and not self.error


def begun(module: str, launch: str) -> Run:
    """The first steps of a run."""
    return Run(module, launch, num_steps=BEGUN_STEPS)


def changes(modules: Iterable[str], begun: Iterable[str], continued: Iterable[str]) -> list[Run]:
    """All ways to go on with what some have begun, on the one or the other."""
    return [Run(m, launch, continues=b) for m, b, launch in product(modules, begun, continued)]


def controls(module: str) -> list[Run]:
    """What must not pass."""
    run = Run(module, "ddp@2", continues="zero2@2")
    return [replace(run, control=control) for control in ("lost_state", "late_data")]


def is_as_expected(run: Run, found: Difference) -> bool:
    """Whether a run has gone on as if nothing had happened, or has shown what is broken of it."""
    if run.control is None:
        return found.is_none
    has_differed = TOLERANCE < found.losses < float("inf") and found.error is None
    return has_differed and bool(found.other_samples) == (run.control == "late_data")


def train_runs(runs: Iterable[Run], folder: Path) -> None:
    """Train runs, what they continue and what they are compared with, in one process that forks.

    Raises:
        RuntimeError: What is compared with has failed, or that process.
    """
    runs = list(runs)
    needed = [other for run in runs for other in (run.whole, run.beginning, run) if other]
    jobs = folder / "jobs.json"
    jobs.write_text(json.dumps([asdict(run) for run in dict.fromkeys(needed)]))
    program = [sys.executable, "-m", "benchmarks.checkpoint_ranks", str(jobs)]
    if code := subprocess.run(program, cwd=Path(__file__).parent.parent).returncode:
        raise RuntimeError(f"{program[2]} -> code {code}")
    for run in {run.whole for run in runs}:
        if error := _error_of(folder / run.name):
            raise RuntimeError(f"{run.name} -> {error}")


def compare(run: Run, folder: Path) -> Difference:
    """Compare what a run has left with the one that was never stopped."""
    path, whole = folder / run.name, folder / run.whole.name
    if error := _error_of(path):
        return Difference(error=error)
    losses, expected = _losses(path), _losses(whole)
    assert list(losses) == list(range(BEGUN_STEPS + 1, NUM_STEPS + 1)), losses
    samples, expected_samples = _samples(path, run.num_ranks), _samples(whole, 1)
    weights, expected_weights = _last_weights(path), _last_weights(whole)
    assert weights.keys() == expected_weights.keys()
    return Difference(
        losses=max(
            abs(losses[step][key] - expected[step][key]) for step in losses for key in losses[step]
        ),
        weights=max(
            float((weights[name] - expected_weights[name]).abs().max()) for name in weights
        ),
        other_samples=tuple(step for step in losses if samples[step] != expected_samples[step]),
    )


def _error_of(path: Path) -> str | None:
    return (path / "error.txt").read_text() if (path / "error.txt").exists() else None


def _losses(path: Path) -> dict[int, dict[str, float]]:
    rows = read_metrics(path / "metrics.jsonl")
    ends = ("loss", "penalty")
    return {int(r["step"]): {k: v for k, v in r.items() if k.endswith(ends)} for r in rows}


def _samples(path: Path, num_ranks: int) -> dict[int, list[str]]:
    """Step -> what all ranks together have seen in it, sorted."""
    seen = [json.loads((path / f"samples-{rank}.json").read_text()) for rank in range(num_ranks)]
    return {int(step): sorted(key for rank in seen for key in rank[step]) for step in seen[0]}


def _last_weights(path: Path) -> dict[str, Any]:
    last = path / "checkpoints" / f"step-{NUM_STEPS:08d}"
    assert read_last(last.parent) == last.name
    return {name: value.float() for name, value in load_weights(last).items()}


def report(module: str, found: dict[Run, Difference]) -> Table:
    """Largest difference of losses, begun by row and continued by column."""
    columns = list(dict.fromkeys(run.launch for run in found))
    table = Table(module, *(name.replace("@", "\n@ ") for name in columns), padding=(0, 0))
    for row in dict.fromkeys(run.continues for run in found):
        cells = [found[Run(module, column, continues=row)] for column in columns]
        table.add_row(row, *(f"{each.losses:.0e}{'' if each.is_none else '!'}" for each in cells))
    return table


def summarize(module: str, found: dict[Run, Difference]) -> list[str]:
    """Lines about a module's runs, those that differ among them."""
    largest = {key: max(getattr(d, key) for d in found.values()) for key in ("losses", "weights")}
    same = sum(not (each.other_samples or each.error) for each in found.values())
    lines = [f"{run.name}: {each}" for run, each in found.items() if not each.is_none]
    return [
        f"{module}: largest difference of losses {largest['losses']:.2g}, of weights "
        f"{largest['weights']:.2g}; {same} of {len(found)} saw the very samples; "
        f"{len(lines)} differ",
        *lines,
    ]


def main() -> None:
    """Train the matrix and print it."""
    options = {"modules": "gpt,gan", "from": ",".join(LAUNCHES), "to": ",".join(LAUNCHES)}
    given = OmegaConf.to_container(OmegaConf.from_dotlist(sys.argv[1:]))
    assert isinstance(given, dict)
    for key in given:
        if key not in options:
            sys.exit(f"{key}={given[key]} -> no such key -> use one of {', '.join(options)}")
    options |= {str(key): str(value) for key, value in given.items()}
    modules, sources, targets = (value.split(",") for value in options.values())
    runs, started = changes(modules, sources, targets), time.perf_counter()
    broken = [control for module in modules for control in controls(module)]
    with tempfile.TemporaryDirectory() as name:
        train_runs([*runs, *broken], Path(name))
        found = {run: compare(run, Path(name)) for run in [*runs, *broken]}
    for module in modules:
        own = {run: found[run] for run in runs if run.module == module}
        Console(width=140).print(report(module, own))
        print(*summarize(module, own), sep="\n")
    for control in broken:
        print(f"control {control.name}: {found[control]}")
    failed = [run for run in found if not is_as_expected(run, found[run])]
    print(f"{len(runs)} changes, {len(failed)} not as they should be,", end=" ")
    print(f"{time.perf_counter() - started:.0f} s")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
