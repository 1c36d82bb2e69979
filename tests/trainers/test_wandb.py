"""A scheduler's SIGTERM goes to every process of a job, and ends W&B's client at once."""

import os
import signal
from itertools import chain

import psutil
import wandb

from tests.cluster.wandb_files import history_steps
from trainers.callbacks.wandb import WandbLogger
from trainers.metrics import JsonLines

OPTIONS = {"project": "tests", "entity": None, "group": None, "tags": [], "mode": None}


def test_credentials_of_object_stores_are_not_uploaded(tmp_path):
    corpus = {"path": "s3://bucket/text", "storage_options": {"key": "AKIA", "secret": "hush"}}
    logger = WandbLogger(tmp_path, run_config={"corpus": corpus, "seed": 1}, **OPTIONS)
    assert logger.run_config["corpus"]["path"] == "s3://bucket/text"
    assert "hush" not in str(logger.run_config)


def test_logger_goes_on_with_another_client_when_its_own_is_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()  # of another test's client, which would be used here
    logger = WandbLogger(tmp_path, run_config={}, **OPTIONS)
    lines = JsonLines(tmp_path / "metrics.jsonl", resume_step=0)
    step = 0
    lines.stamp = logger.stamp = lambda: {"step": step, "samples": 8 * step}
    before = {*psutil.Process().children(recursive=True)}
    for step in range(1, 9):
        for each in (lines, logger):
            each.log_metrics({"train/loss": 1 / step})
        if step in (3, 8):  # once in mid-run, and once when nothing is left but to finish
            clients = {*psutil.Process().children(recursive=True)} - before
            for client in clients:
                os.kill(client.pid, signal.SIGTERM)
            psutil.wait_procs(clients)
    logger.finalize("success")
    wandb.teardown()  # waits until all is written
    folders = [*(tmp_path / "wandb").glob("offline-run-*")]
    assert len(folders) == 3
    assert all(f"-{logger.version}" in folder.name for folder in folders)
    assert {*chain(*map(history_steps, folders))} == {*range(1, 9)}
