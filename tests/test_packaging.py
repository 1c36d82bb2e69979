"""From an installed wheel, in a folder of the user's, with the user's own module and experiment."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def listings():
    """The files that docs/adding.md tells its reader to write, by name."""
    text = (ROOT / "docs/adding.md").read_text()
    return dict(re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)```", text, re.MULTILINE | re.DOTALL))


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
    others = ("conf/train.yaml", "conf/experiment/gpt_quickstart.yaml", "launch/slurm/train.sbatch")
    for name in ("modules/gpt.py", *others):
        assert (installed / name).is_file()
    assert not (installed / "tests").exists()


def test_sweep_runs_from_an_installed_wheel(installed, tmp_path):
    done = run_there(["-m", "launch.train", "-m", "no.such=1,2"], tmp_path, installed)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "0 of 2 jobs done, 2 failed" in done.stdout
    assert (tmp_path / "runs/sweeps/default/sweep.json").exists()


def test_users_own_module_trains_from_an_installed_wheel(installed, listings, tmp_path, text_file):
    assert len(listings) == 3
    for name, text in listings.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    command = ["-m", "launch.train", "--config-dir", "my_conf", "experiment=mine"]
    command += [f"corpus.path={text_file}", "trainer.accelerator=cpu"]
    done = run_there(command, tmp_path, installed)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "runs/mine/summary.json").read_text())
    assert summary["step"] == 20
    first = json.loads((tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines()[0])
    assert summary["val/loss"] < first["train/loss"]
    again = run_there(command, tmp_path, installed)
    assert again.returncode == 0
    assert "mine: done" in again.stdout


def test_foreign_package_of_our_name_is_named(installed, tmp_path):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "__init__.py").write_text("")
    done = run_there(["-m", "launch.train"], tmp_path, installed)
    assert done.returncode == 1
    assert f"found at {tmp_path / 'modules'}, which is not Trainyard's" in done.stderr


def test_environment_keeps_an_installed_torch(tmp_path):
    import setup_venv

    found = setup_venv.installed_torch()
    assert found == torch.__version__
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "v"], check=True)
    setup_venv.show_packages_of_this_python(str(tmp_path / "v"))
    code = "from importlib.metadata import distribution as d; print(d('torch').locate_file(''))"
    seen = subprocess.run([tmp_path / "v/bin/python", "-c", code], capture_output=True, text=True)
    assert Path(seen.stdout.strip()) == Path(torch.__file__).parent.parent
    pinned = setup_venv.constrain("numpy==2.0\ntorch==2.99.0\ntorchmetrics==1.0\n", found)
    assert pinned == f"numpy==2.0\ntorchmetrics==1.0\ntorch=={found}\n"
    assert setup_venv.constrain("torch==2.99.0\n", None) == "torch==2.99.0\n"
