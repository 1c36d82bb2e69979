"""How long from a command to its first optimizer step, beside a plain script; and for `--help`.

    python -m benchmarks.startup [--rounds 5] [--ranks 1 2]

Starts in turn, on one rank and on two under DDP, each in processes of its own and on CPU:

    Trainyard      `python -m launch.train experiment=gpt_char_cpu`, a new run of prepared data
    plain script   `benchmarks/startup_plain.py`: Lightning, a network of the same sizes, the tokens
                   as an array on the disk; several ranks are started by torchrun

Both note the time when the first step is taken, and end there. The first round fills the caches of
the disk and is left out. The second table is one more start of each on one rank, with `python -X
importtime`: the packages that take longest to be imported, each without what it imports of others,
and what is left for all else. `--help` is timed beside `python -c "import hydra"`.
"""

import argparse
import collections
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from benchmarks.loop_overhead import configure, write_text
from modules.gpt_presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
NOTING, NUM_PACKAGES = "benchmarks.first_step.NoteFirstStep", 12
IMPORTED = re.compile(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\w+)", re.MULTILINE)
"""A line of `-X importtime`: microseconds without what it imports, and the package."""

MakeCommand = Callable[[int, Path], list[str]]
"""Arguments of Python for so many ranks, which note the time in a file."""


def our_side(folder: Path) -> MakeCommand:
    """Train a new run from the data in `folder`."""

    def make(num_ranks: int, note: Path) -> list[str]:
        ranks = ["strategy=ddp", f"trainer.devices={num_ranks}"] if num_ranks > 1 else []
        return [
            *("-m", "launch.train", "experiment=gpt_char_cpu", "trainer.accelerator=cpu", *ranks),
            *(f"corpus.path={folder / 'input.txt'}", f"data_dir={folder / 'data'}"),
            *(f"runs_dir={folder / 'runs'}", f"run.name={note.name}"),
            f"+trainer.callbacks.note={{_target_: {NOTING}, note: {note}}}",
        ]

    return make


def plain_side(folder: Path, config: DictConfig) -> MakeCommand:
    """Train on the same tokens, written to `folder` as an array."""
    tokenizer = Tokenizer.from_file(f"{config.data.path}/tokenizer.json")
    text = (folder / "input.txt").read_text()[: config.data.bytes.train]  # ASCII: bytes are letters
    np.save(folder / "tokens.npy", np.array(tokenizer.encode(text).ids))
    shape = PRESETS[config.module.preset]
    numbers = (
        *(config.data.vocab_size, shape.num_layers, shape.num_heads, shape.width),
        *(config.datamodule.sequence_length, config.plan.batch_samples),
    )

    def make(num_ranks: int, note: Path) -> list[str]:
        starter = ["-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}"]
        script = [str(ROOT / "benchmarks/startup_plain.py"), str(folder / "tokens.npy"), str(note)]
        return [*(starter if num_ranks > 1 else []), *script, *map(str, numbers)]

    return make


def run(arguments: list[str]) -> tuple[float, str]:
    """Run Python once; the time when it began, and what it wrote to stderr."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    begin = time.time()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return begin, done.stderr


def time_starts(
    sides: dict[str, MakeCommand], folder: Path, ranks: list[int], rounds: int
) -> Table:
    """Start all in turn; medians of seconds until the first step, and what they are of the last."""
    seconds = collections.defaultdict(list)
    for number in range(rounds + 1):
        for num_ranks in ranks:
            for name, make in sides.items():
                note = folder / f"note-{number}-{num_ranks}-{len(name)}"
                begin, _ = run(make(num_ranks, note))
                seconds[name, num_ranks].append(float(note.read_text()) - begin)
    table = Table("side", "ranks", "s to the first step", "from", "to", "x plain script")
    table.title = f"From a command to its first step, medians of {rounds}"
    plain = list(sides)[-1]
    for (name, num_ranks), values in seconds.items():
        median, reference = (
            statistics.median(each[1:]) for each in (values, seconds[plain, num_ranks])
        )
        ends = f"{min(values[1:]):.2f}", f"{max(values[1:]):.2f}"
        table.add_row(name, str(num_ranks), f"{median:.2f}", *ends, f"{median / reference:.2f}")
    return table


def profile_imports(sides: dict[str, MakeCommand], folder: Path) -> Table:
    """Seconds by package of one start of each side, on one rank."""
    columns, rest = {}, {}
    for name, make in sides.items():
        note = folder / f"imports-{len(name)}"
        begin, printed = run(["-X", "importtime", *make(1, note)])
        columns[name] = collections.Counter()
        for microseconds, package in IMPORTED.findall(printed):
            columns[name][package] += int(microseconds) / 1e6
        rest[name] = float(note.read_text()) - begin - columns[name].total()
    table = Table("package", *sides, title="Where the time goes (s, measuring slows it)")
    longest = [name for name, _ in sum(columns.values(), collections.Counter()).most_common()]
    for package in longest[:NUM_PACKAGES]:
        table.add_row(package, *(f"{column[package]:.2f}" for column in columns.values()))
    others = (
        {name: column[name] for name in longest[NUM_PACKAGES:]} for column in columns.values()
    )
    table.add_row("other packages", *(f"{sum(each.values()):.2f}" for each in others))
    table.add_row("no import", *(f"{seconds:.2f}" for seconds in rest.values()))
    return table


def time_help(rounds: int) -> str:
    """A sentence on `--help`: how long it takes, and whether it imports torch."""
    commands = {"--help": ["-m", "launch.train", "--help"], "import hydra": ["-c", "import hydra"]}
    seconds = collections.defaultdict(list)
    for _ in range(rounds + 1):
        for name, arguments in commands.items():
            begin, _ = run(arguments)
            seconds[name].append(time.time() - begin)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    _, printed = run(["-X", "importtime", *commands["--help"]])
    torch = "torch" if "torch" in {package for _, package in IMPORTED.findall(printed)} else "none"
    return (
        f"`launch.train --help`: {medians['--help']:.2f} s, of which `import hydra` "
        f"{medians['import hydra']:.2f} s; of torch and Lightning it imports {torch}"
    )


def main() -> None:
    """Start both sides in turn and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_text((folder := Path(name)) / "input.txt")
        config = configure(folder, seed=1, steps=1000)
        sides = {"Trainyard": our_side(folder), "plain script": plain_side(folder, config)}
        Console().print(time_starts(sides, folder, options.ranks, options.rounds))
        Console().print(profile_imports(sides, folder))
    Console().print(time_help(options.rounds))


if __name__ == "__main__":
    main()
