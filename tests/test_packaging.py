"""From an installed wheel, in a folder of the user's, with the user's own module and experiment."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

MODULE = '''
import torch
from lightning import LightningModule


class Bigram(LightningModule):
    """Predicts the next token from the last one alone."""

    def __init__(self, *, vocab_size: int, optimizer: dict):
        super().__init__()
        self.table = torch.nn.Embedding(vocab_size, vocab_size)
        self.lr = optimizer["lr"]

    def loss(self, batch):
        logits = self.table(batch["inputs"]).flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, batch["targets"].flatten())

    def training_step(self, batch, batch_idx):
        return {"loss": self.loss(batch)}

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)
'''

MODULE_YAML = """
_target_: mine.Bigram
vocab_size: ${data.vocab_size}
optimizer:
  lr: 1.0
  gradient_clip: null
"""

EXPERIMENT_YAML = """
# @package _global_
defaults:
  - override /module: bigram
  - override /corpus: text
run:
  name: mine
corpus:
  tokenizer: char
datamodule:
  sequence_length: 16
batch_samples: 8
max_steps: 20
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel's content, in a folder to put on the path."""
    wheels, site = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = wheels.glob("trainyard-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def run_there(command, folder, site):
    environment = dict(os.environ, PYTHONPATH=str(site))
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_wheel_holds_the_packages_and_their_configuration(installed):
    for name in ("modules/gpt.py", "conf/train.yaml", "conf/experiment/gpt_quickstart.yaml"):
        assert (installed / name).is_file()
    assert not (installed / "tests").exists()


def test_users_own_module_trains_from_an_installed_wheel(installed, tmp_path, text_file):
    (tmp_path / "mine.py").write_text(MODULE)
    for group, name, text in (
        ("module", "bigram", MODULE_YAML),
        ("experiment", "mine", EXPERIMENT_YAML),
    ):
        (tmp_path / "my_conf" / group).mkdir(parents=True)
        (tmp_path / "my_conf" / group / f"{name}.yaml").write_text(text)
    command = ["-m", "launch.train", "--config-dir", "my_conf", "experiment=mine"]
    command += [f"corpus.path={text_file}", "trainer.accelerator=cpu"]
    done = run_there(command, tmp_path, installed)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "runs/mine/summary.json").read_text())
    assert summary["step"] == 20
    assert summary["val/loss"] < 3.6
    again = run_there(command, tmp_path, installed)
    assert again.returncode == 0
    assert "mine: done" in again.stdout


def test_foreign_package_of_our_name_is_named(installed, tmp_path):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "__init__.py").write_text("")
    done = run_there(["-m", "launch.train"], tmp_path, installed)
    assert done.returncode == 1
    assert f"found at {tmp_path / 'modules'}, which is not Trainyard's" in done.stderr
