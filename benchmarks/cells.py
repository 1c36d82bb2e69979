"""Small runs by the launcher's own `fit`, on ranks that are started once for all of them."""

import contextlib
import copy
import json
import os
import random
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from benchmarks.gan_cells import COMMON, GANS, write_images
from launch.completion import complete
from launch.run_directory import RunDirectory
from trainers.checkpoint import load_weights
from trainers.metrics import read_metrics

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp")
STEPS = 8
PAIRS = {
    "encoder_decoder": "tiny, network: {num_heads: 2, head_width: 8, width: 16, mlp_width: 32}",
    "lstm": "lstm_small, network: "
    "{embedding_width: 8, encoder_width: 8, hidden_width: 16, dropout: 0, attention: additive}",
}
"""Preset and sizes of the encoder-decoders, by the name that cells have for them."""
VARIANTS = {
    "masked": "benchmarks.parity_ranks.MaskedGPT",
    "frozen": "benchmarks.parity_ranks.FrozenGPT",
    "given": "benchmarks.parity_ranks.FrozenAndGivenGPT",
    "spoiled": "benchmarks.parity_ranks.SpoiledGPT",
    "spoiled_unfused": "benchmarks.parity_ranks.SpoiledUnfusedGPT",
    "let_go": "benchmarks.parity_ranks.LetGoGPT",
}


_CONSTANT = "module.schedule={name: constant, final_lr_fraction: null, warmup_samples: 0}"
_HERE = "corpus.num_processes=1"  # starting others takes longer than preparing so little
_OF_TEXT = [
    "experiment=gpt_char_cpu",
    "datamodule.sequence_length=16",
    "module.network={num_layers: 2, num_heads: 2, width: 32, dropout: 0.0}",
    "module.preview.max_new_tokens=1",
    _CONSTANT,
    _HERE,
]
_OF_PAIRS = [
    "experiment=translation_small",
    "max_samples=null",
    "corpus.tokenizer=char",
    "corpus.lowercase=false",
    "corpus.min_frequency=null",
    "corpus.joint_vocabulary=true",
    "module.scores.names=[]",
    "module.generation.max_new_tokens=12",
    "datamodule.eval_pairs=2",
    _CONSTANT,
    _HERE,
]


@dataclass(frozen=True)
class Cell:
    """One run of the matrix.

    Attributes:
        module: `gpt`, one of `VARIANTS` of it, one of `PAIRS`, one of `GANS`, or `two_networks`.
        strategy: As `strategy=`.
        precision: As `precision=`.
        recompute: As `activation_checkpointing=`.
        micro: Samples per rank and forward pass; None for all.
        control: Name of something to break (`benchmarks.parity_ranks.CONTROLS`), or None.
        stop_at: Step to stop and continue at, or None.
        begun: Strategy up to that step, where it is another.
        optimizer: As `module.optimizer.name=`, of a GPT.
        seed: Of the run.
        parameters: As `strategy.make.parameters=`, of strategies that have it.
        guard: As `trainer.guard.nonfinite=`.
    """

    module: str
    strategy: str
    precision: str = "fp32"
    recompute: str = "none"
    micro: int | None = None
    control: str | None = None
    stop_at: int | None = None
    optimizer: str = "sgd"
    seed: int = 1
    parameters: str = "fp32"
    begun: str | None = None
    guard: str = "stop"

    @property
    def name(self) -> str:
        """Of its run."""
        return "-".join(str(value) for value in asdict(self).values() if value is not None)

    def as_dict(self) -> dict[str, Any]:
        """Its fields, for a file."""
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """What a run trained: losses [logged steps], weights by name; or the error it ended with."""

    losses: torch.Tensor
    weights: dict[str, torch.Tensor]
    error: str | None = None
    num_skipped: int = 0
    exchanged: frozenset[str] = frozenset()
    """Dtypes of the gradients that ranks exchanged, where that was noted."""
    samples: tuple[str, ...] = ()
    """Lines of what was generated at the end, sorted."""


def configure(cell: Cell, folder: Path, ranks: int, accelerator: str) -> DictConfig:
    """Compose and complete the configuration of a cell."""
    config = copy.deepcopy(
        _composed(cell.strategy, cell.module if cell.module in (*PAIRS, *GANS) else "text")
    )
    settings = {
        "seed": cell.seed,
        "precision": cell.precision,
        "activation_checkpointing": cell.recompute,
        "runs_dir": str(folder / "runs"),
        "data_dir": str(folder / "data"),
        "run.name": cell.name,
        "trainer.devices": ranks,
        "trainer.accelerator": accelerator,
        # A guard that is read late has had steps to judge in between.
        "trainer.log_every_steps": STEPS // 2 if cell.module.startswith("spoiled") else 1,
        "trainer.guard.nonfinite": cell.guard,
        "micro_batch": cell.micro,
        "module.optimizer.name": cell.optimizer,
        "module.optimizer.lr": 0.1 if cell.optimizer in ("sgd", "adamw") else 0.02,
    }
    if cell.module in GANS:
        settings |= {"corpus.path": str(folder / "images"), "module.optimizer.lr": 0.02}
    elif cell.module in PAIRS:
        settings |= {f"corpus.train.{side}": str(folder / side) for side in ("source", "target")}
    else:
        settings["corpus.path"] = str(folder / "text.txt")
    for key, value in settings.items():
        OmegaConf.update(config, key, value)
    if cell.module in VARIANTS:
        config.module._target_ = VARIANTS[cell.module]
    if cell.module == "two_networks":
        _use_two_networks(config, cell)
    if "config" in config.strategy.make:  # small buffers, for the sake of the machine
        small = {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}
        if "stage3_param_persistence_threshold" in config.strategy.make.config.zero_optimization:
            small["stage3_param_persistence_threshold"] = 100  # or these networks stay whole
        config.strategy.make.config.zero_optimization.merge_with(small)
    if "parameters" in config.strategy.make:
        config.strategy.make.parameters = cell.parameters
    complete(config, ranks)
    return config


@cache
def _composed(strategy: str, module: str) -> DictConfig:
    """What the cells of a strategy have in common; composing takes longer than some of them."""
    own = _OF_TEXT
    if module in PAIRS:
        own = [*_OF_PAIRS, f"module={{preset: {PAIRS[module]}}}"]
    elif module in GANS:
        own = [*COMMON, *GANS[module]]
    overrides = [
        f"strategy={strategy}",
        "trainer.timeout_s=120",
        f"trainer.val_every_steps={10 * STEPS}",
        "datamodule.val_max_samples=8",
        "checkpoints.every_steps=null",
        "batch_samples=8",
        f"max_steps={STEPS}",
        "module.optimizer.gradient_clip=0.5",
    ]
    with hydra.initialize_config_module("conf", version_base=None):
        return hydra.compose("train", [*own, *overrides])


def _use_two_networks(config: DictConfig, cell: Cell) -> None:
    config.module = {
        "_target_": "benchmarks.two_networks.TwoNetworks",
        "optimizer": {"lr": 0.1, "gradient_clip": {"discriminator": 0.2, "generator": 0.05}},
        "r1": 0.5,
        "ema_decay": 0.9,
        "seed": cell.seed,
    }
    config.datamodule = {"_target_": "benchmarks.two_networks.Points", "plan": "${plan}"}
    config.corpus = {"name": "none"}


def run_cells(cells: list[Cell], folder: Path, ranks: int, accelerator: str) -> dict[Cell, Outcome]:
    """Train every cell, on ranks that are started once."""
    write_text(folder)
    for cell in cells:
        run = RunDirectory(folder / "runs" / cell.name)
        run.path.mkdir(parents=True)
        run.accept(configure(cell, folder, ranks, accelerator))
    # Runs on one rank of a CPU use one core, and most machines have more.
    shares = [cells[::2], cells[1::2]] if (ranks, accelerator) == (1, "cpu") else [cells]
    with ThreadPoolExecutor(len(shares)) as starts:
        list(starts.map(lambda share: _train(share, folder, ranks), filter(None, shares)))
    return {cell: read_outcome(folder / "runs" / cell.name) for cell in cells}


def _train(cells: list[Cell], folder: Path, ranks: int) -> None:
    jobs = folder / f"cells-{ranks}-{cells[0].name}.json"
    jobs.write_text(json.dumps([cell.as_dict() for cell in cells]))
    start_ranks("benchmarks.parity_ranks", [str(jobs)], ranks)


def write_text(folder: Path) -> None:
    """Write what all cells train on: text, pairs of very different lengths, images of two kinds."""
    lines = (f"{i * i} little {i % 7} boats on {i % 11} seas.\n" for i in range(3000))
    (folder / "text.txt").write_text("".join(lines))
    names = "red green blue sea boat wind".split()  # noqa: SIM905
    words = [[names[(i * i + 3 * k) % 6] for k in range(1 + i % 7)] + [str(i)] for i in range(400)]
    (folder / "source").write_text("".join(" ".join(line) + "\n" for line in words))
    (folder / "target").write_text("".join(" ".join(line[::-2]) + "\n" for line in words))
    write_images(folder / "images")


def start_ranks(program: str, arguments: list[str], ranks: int) -> None:
    """Run a module of this project on every rank, and wait.

    Raises:
        RuntimeError: One failed.
    """
    port = find_port()
    command = [sys.executable, "-m", program, *arguments]
    root = Path(__file__).parent.parent
    processes = [
        subprocess.Popen(command, env=os.environ | rank_environment(rank, ranks, port), cwd=root)
        for rank in range(ranks)
    ]
    try:
        codes = [process.wait() for process in processes]
    finally:  # where the wait was ended from outside
        for process in processes:
            process.kill()
    if any(codes):
        raise RuntimeError(f"ranks ended with codes {codes}")


def find_port() -> int:
    """Find a port of this machine that nobody listens at.

    It is below those that the system gives out by itself: ranks come to it seconds later, and other
    processes open many of those meanwhile.
    """
    draw = random.SystemRandom()  # of equal seeds, processes beside each other would draw alike
    while True:
        port = draw.randrange(20_000, 32_768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def rank_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What torch's elastic agent tells a rank, all of which are on this machine."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
    own |= {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "MASTER_PORT": port}
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    texts = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "parity"}
    return {k: str(v) for k, v in own.items()} | texts | {"OMP_NUM_THREADS": threads}


def read_outcome(run: Path) -> Outcome:
    """Read what a run left."""
    if (error := run / "error.txt").exists():
        return Outcome(torch.tensor([]), {}, error.read_text())
    rows = read_metrics(run / "metrics.jsonl")
    losses = [
        row[key]
        for row in rows
        for key in sorted(row)
        if key.startswith("train/") and key.endswith(("loss", "penalty"))
    ]
    weights = load_weights(run / "checkpoints" / f"step-{STEPS:08d}")
    weights = {name: value.float() for name, value in weights.items()}
    num_skipped = max(row.get("train/skipped_steps", 0) for row in rows)
    noted = run / "exchanged.json"
    exchanged = frozenset(json.loads(noted.read_text()) if noted.exists() else ())
    path = run / "samples" / f"step-{STEPS:08d}.jsonl"
    samples = tuple(sorted(path.read_text().splitlines())) if path.exists() else ()
    return Outcome(torch.tensor(losses), weights, None, int(num_skipped), exchanged, samples)
