"""What all tests share: marks that skip themselves, and CI's rule that nothing else does."""

import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
import submitit  # noqa: F401 - closes all handlers; those of absl, later, would close our output
from omegaconf import DictConfig

from launch.run_directory import RunDirectory
from launch.run_home import directory_of
from tests.cluster.hosts import why_not

# Two ranks or workers beside the tests' own process would fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")

NAMED_MARKS = {"gpu", "hosts", "slurm", "slow"}
_other_skips: list[str] = []


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
    if item.get_closest_marker("slurm") and shutil.which("slurmctld") is None:
        pytest.skip("no Slurm installation")
    if item.get_closest_marker("hosts") and (reason := why_not()):
        pytest.skip(f"no hosts made of namespaces: {reason}")


@pytest.hookimpl(trylast=True)  # of what is left when the others have deselected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    allowed_s: Counter[Path] = Counter()
    for item in items:
        names = {mark.name for mark in item.iter_markers()}
        item.user_properties.append(("named", bool(names & NAMED_MARKS)))
        if timeout := item.get_closest_marker("timeout"):
            allowed_s[item.path] = max(allowed_s[item.path], timeout.args[0])
    # Of two processes one would end alone with the longest file, were it not among the first.
    items.sort(key=lambda item: -allowed_s[item.path])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal files to processes, and to one of them all that need the one Slurm of a machine."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            slurm = "tests/cluster/test_slurm"
            return slurm if nodeid.startswith(slurm) else super()._split_scope(nodeid)

    return Scheduling(config, log)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not dict(report.user_properties).get("named"):
        _other_skips.append(report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:  # a whole module, by importorskip
        _other_skips.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _other_skips and os.environ.get("CI"):
        print(f"\nskipped without one of the marks {sorted(NAMED_MARKS)}: {_other_skips}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session", autouse=True)
def _disk_is_not_waited_for():
    """Nobody cuts the power, and what is written is there for every process all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda file: None)
        yield


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Plain text that a small model can learn something from: 120 kB of sentences."""
    words = "the a small large old new cat dog house tree sees finds builds".split()  # noqa: SIM905
    draw = random.Random(0)
    lines = [" ".join(draw.choices(words, k=12)).capitalize() + ".\n" for _ in range(2000)]
    path = tmp_path_factory.mktemp("corpus") / "input.txt"
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="session")
def pair_files(tmp_path_factory) -> dict[str, Path]:
    """Two parallel text files, `source` and `target`: words, and the same ones backwards."""
    words = "red green blue sea boat wind house tree".split()  # noqa: SIM905
    draw = random.Random(0)
    lines = [draw.choices(words, k=draw.randint(2, 7)) for _ in range(600)]
    folder = tmp_path_factory.mktemp("pairs")
    paths = {side: folder / side for side in ("source", "target")}
    paths["source"].write_text("".join(" ".join(line) + "\n" for line in lines))
    paths["target"].write_text("".join(" ".join(line[::-1]) + "\n" for line in lines))
    return paths


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Prepared data, shared so that each corpus is prepared once."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def small_run(small_settings, tmp_path) -> list[str]:
    """Overrides for a run of 20 steps that takes about a second."""
    return [*small_settings, f"runs_dir={tmp_path / 'runs'}"]


@pytest.fixture(scope="session")
def small_settings(text_file, data_dir) -> list[str]:
    """Those of `small_run`, for runs that several tests share in a folder of their own."""
    return [
        "experiment=gpt_char_cpu",
        f"corpus.path={text_file}",
        f"data_dir={data_dir}",
        "run.name=small",
        "trainer.accelerator=cpu",
        "trainer.log_every_steps=1",
        "trainer.val_every_steps=8",
        "datamodule.val_max_samples=16",
        "checkpoints.every_steps=5",
        "checkpoints.keep_last=3",
        "batch_samples=8",
        "max_steps=20",
        "datamodule.sequence_length=16",
        "module.network.num_layers=2",
        "module.network.num_heads=2",
        "module.network.width=32",
        "module.network.dropout=0.1",
        "module.schedule.warmup_samples=16",
        "module.preview.max_new_tokens=8",
    ]


@pytest.fixture
def gan_run(gan_settings, tmp_path) -> list[str]:
    """Overrides for a GAN of digits of a few steps, without batch norm and dropout."""
    return [*gan_settings, f"runs_dir={tmp_path / 'runs'}"]


@pytest.fixture(scope="session")
def gan_settings(data_dir) -> list[str]:
    """Those of `gan_run`, for runs that several tests share in a folder of their own."""
    return [
        "experiment=gan_quickstart",
        f"data_dir={data_dir}",
        "run.name=digits",
        "trainer.accelerator=cpu",
        "trainer.log_every_steps=1",
        "max_images=null",
        "datamodule.num_workers=0",
        "datamodule.val_max_samples=8",
        "module.preset=dcgan_tiny",
        "module.network={norm: none, dropout: 0.0, width_factor: null}",
        "module.scores.extractor.training_steps=1",
        "module.pictures={grid: {rows: 1, columns: 2}, interpolation: null, truncation: null, "
        "classes: null, neighbours: null}",
    ]


@pytest.fixture(scope="session")
def compose() -> Callable[..., DictConfig]:
    """Compose a verb's configuration as the command line does: `compose("train", overrides)`."""

    def compose_verb(verb: str, overrides: list[str]) -> DictConfig:
        with hydra.initialize_config_module("conf", version_base=None):
            return hydra.compose(verb, overrides=overrides)

    return compose_verb


@pytest.fixture(scope="session")
def train(compose) -> Callable[..., RunDirectory]:
    """Train in this process; later overrides win. Gives the run, and expects its exit code.

    Its picture, a fifth of a small run's time, is left out unless the run `draws`.
    """

    def train_here(*overrides: str, code: int = 0, draws: bool = False) -> RunDirectory:
        from launch.train import train

        config = compose("train", [*overrides])
        with pytest.MonkeyPatch.context() as patch:
            if not draws:
                patch.setattr("trainers.metrics.plot_losses", lambda *args, **options: None)
            assert train(config) == code
        return directory_of(config)

    return train_here


@pytest.fixture
def command() -> Callable[..., list[str]]:
    """The command line of a verb in a process of its own."""

    def verb_command(verb: str, *overrides: str) -> list[str]:
        return [sys.executable, "-m", f"launch.{verb}", *overrides]

    return verb_command
