"""Runs over several hosts."""

import pytest

from tests.cluster.elastic_runs import ElasticRun
from tests.cluster.hosts import Hosts


@pytest.fixture
def hosts(tmp_path):
    """Three hosts of this test's own."""
    with Hosts(3, tmp_path / "hosts") as hosts:
        yield hosts


@pytest.fixture
def run(tmp_path, small_settings, hosts):
    """A run that is started on these hosts."""
    return ElasticRun(tmp_path, small_settings, hosts)
