"""A Slurm cluster on this machine, and hosts without one, for the tests that need them."""

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.elastic_runs import ElasticRun
from tests.cluster.hosts import Hosts
from tests.cluster.slurm_cluster import SlurmCluster

NAMESPACES = ["unshare", "--uts", "--ipc", "--net", "--pid", "--mount", "--fork", "true"]


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    """The cluster, up from the first test that needs it to the end of the session."""
    if subprocess.run(NAMESPACES, capture_output=True).returncode:
        pytest.skip("Slurm is there, but namespaces may not be made here (CAP_SYS_ADMIN)")
    # Not under pytest's own folder, which others may not enter, and munge insists that they may.
    cluster = SlurmCluster(Path(tempfile.mkdtemp(prefix="trainyard-slurm-")))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def slurm(cluster) -> Iterator[SlurmCluster]:
    """The same, with both nodes in order again after the test."""
    yield cluster
    cluster.heal()


@pytest.fixture
def hosts(tmp_path) -> Iterator[Hosts]:
    """Three hosts of this test's own."""
    with Hosts(3, tmp_path / "hosts") as hosts:
        yield hosts


@pytest.fixture
def run(tmp_path, small_settings, hosts) -> ElasticRun:
    """A run that is started on these hosts."""
    return ElasticRun(tmp_path, small_settings, hosts)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failure comes with what jobs and the controller have printed."""
    report = yield
    found = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and found:
        report.sections += list(found.logs().items())
    return report
