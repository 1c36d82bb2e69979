"""A run whose shards, checkpoints and run directory are all in one S3 server on loopback."""

import shutil
from pathlib import Path

import fsspec
import pytest

from launch.run_directory import RunDirectory
from tests.datamodules.object_store import BUCKET, CREDENTIALS, ObjectStore
from tests.launch.failing_store import contents, num_checkpoints
from tests.launch.test_stored_runs import DONE, assert_same_runs

RUNS = f"s3://{BUCKET}/runs"
RUN = f"{RUNS}/small"


@pytest.fixture
def server(monkeypatch):
    """Found by every process as a user would have it found: by AWS' environment variables."""
    store = ObjectStore()
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", CREDENTIALS["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CREDENTIALS["secret"])
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    # What this process has listed before, others may have changed.
    monkeypatch.setitem(fsspec.config.conf, "s3", store.options | {"use_listings_cache": False})
    yield store
    store.close()


def upload(store, data):
    """Copy a prepared corpus as it is; gives its url."""
    for file in filter(Path.is_file, data.rglob("*")):
        store.put(f"{data.name}/{file.relative_to(data).as_posix()}", file.read_bytes())
    return f"s3://{BUCKET}/{data.name}"


def whole_checkpoints():
    """Those in the store whose manifest is there."""
    return {name.split("/")[1] for name in contents(RUN) if name.endswith("/manifest.json")}


def last_checkpoint():
    """The one that a resume would find; nothing before there is one."""
    return contents(RUN).get("checkpoints/last", b"").decode().strip()


def kill_during_upload(store, begin, name):
    """Kill a run while the server has half of a file, later than its first whole checkpoint."""
    before = whole_checkpoints()
    store.stalls = lambda key: (
        key.endswith(name) and last_checkpoint() != "" and whole_checkpoints() > before
    )
    process = begin()
    while not store.stalled.wait(1):
        assert process.poll() is None, process.communicate()[0]
    process.kill()
    printed = process.communicate()[0]
    store.stalls = lambda key: False
    store.stalled.clear()
    return printed


def reads_of_shards(store):
    return {key: count for key, count in store.reads.items() if key.endswith(".tar")}


@pytest.mark.slow
def test_run_killed_during_uploads_ends_with_the_same_weights(
    small_run, train, start, server, tmp_path
):
    whole = train(*small_run)
    corpus = upload(server, Path(str(whole.config.data.path)))
    local, data = tmp_path / "local", tmp_path / "node"
    stored = [
        *small_run,
        *("corpus=prepared", f"corpus.path={corpus}", f"data_dir={data}", "datamodule.window_mb=1"),
        *(f"runs_dir={RUNS}", f"local_runs_dir={local}"),
        # Of a run that begins, the first checkpoint is in the store before there is a second.
        "+trainer.callbacks.journal={_target_: tests.cluster.journal.Journal, "
        f"folder: {tmp_path / 'journal'}, linger_s: 1}}",
    ]
    printed = kill_during_upload(server, lambda: start(*stored), "/weights.safetensors")
    assert "begins" in printed
    before = last_checkpoint()
    assert before == "step-00000005"
    assert before in whole_checkpoints()
    once = reads_of_shards(server)
    assert {Path(key).parent.name for key in once} == {"train", "val"}
    assert set(once.values()) == {1}
    shutil.rmtree(local)  # the machine is gone, with all that it had
    shutil.rmtree(data)

    printed = kill_during_upload(server, lambda: start(*stored), "/checkpoints/last")
    assert f"continues from {before}" in printed
    assert last_checkpoint() == before < max(whole_checkpoints())
    assert set(reads_of_shards(server).values()) == {2}
    shutil.rmtree(local)  # the run is gone, and the node's copy of the shards is not

    process = start(*stored)
    printed = process.communicate()[0]
    assert process.returncode == 0, printed
    assert f"continues from {before}" in printed
    assert set(reads_of_shards(server).values()) == {2}
    assert_same_runs(whole, RunDirectory(local / "small"))
    assert num_checkpoints(RUN) == DONE
