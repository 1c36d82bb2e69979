"""What all tests share: marks that skip themselves, and CI's rule that nothing else does."""

import os
import shutil

import pytest

# Two ranks or workers beside the tests' own process would fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")

NAMED_MARKS = {"gpu", "slurm", "slow"}
_other_skips: list[str] = []


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
    if item.get_closest_marker("slurm") and shutil.which("slurmctld") is None:
        pytest.skip("no Slurm installation")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        names = {mark.name for mark in item.iter_markers()}
        item.user_properties.append(("named", bool(names & NAMED_MARKS)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not dict(report.user_properties).get("named"):
        _other_skips.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _other_skips and os.environ.get("CI"):
        print(f"\nskipped without one of the marks {sorted(NAMED_MARKS)}: {_other_skips}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
