"""The start script for bare machines, with stand-ins for what it installs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = "launch/cloud/start_instance.sh"
PYTHON = f"""#!{sys.executable}
# A Python of another version, with Python.h, which makes environments of stand-ins.
import os, sys, sysconfig
name = os.path.basename(sys.argv[0])
if sys.argv[1] == "-c":
    sys.version_info = VERSION
    sysconfig.get_path = lambda name: "include"
    exec(sys.argv[2])
elif sys.argv[1:3] == ["-m", "venv"]:
    print(name, *sys.argv[1:], file=open("log", "a"))
    os.makedirs(f"{{sys.argv[3]}}/bin", exist_ok=True)
    for each in ["python", "pip", "uv"]:
        if not os.path.exists(f"{{sys.argv[3]}}/bin/{{each}}"):
            os.symlink(os.path.abspath("bin/logged"), f"{{sys.argv[3]}}/bin/{{each}}")
"""
LOGGED = """#!/bin/bash
echo "${0##*/} $*" >>log
if [[ "$*" == "python find"* ]]; then echo .venv/python/cpython/bin/python3.12; fi
"""
NVIDIA_SMI = """#!/bin/bash
if [[ $1 == *driver_version* ]]; then echo "$HAS_DRIVER"; else echo GPU; fi
"""


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def bare_machine(tmp_path):
    """A clone on a machine with a GPU and all packages but a Python."""
    for tool in ["apt-get", "dpkg", "mountpoint"]:
        write(tmp_path / "bin" / tool, "#!/bin/bash\n")
    for tool in ["bash", "cat", "dirname", "echo", "grep", "sha256sum", "sort", "uniq", "xargs"]:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    write(tmp_path / "bin/logged", LOGGED)
    write(tmp_path / "bin/nvidia-smi", NVIDIA_SMI)
    write(tmp_path / "include/Python.h", "")
    for path in [SCRIPT, "pyproject.toml", "constraints.txt"]:
        write(tmp_path / path, (ROOT / path).read_text())
    return tmp_path


def install(machine, pythons, driver="580.65.06"):
    """Run the start script up to the training: how it ended, and what stand-ins were asked for."""
    for name, version in pythons.items():
        write(machine / name, PYTHON.replace("VERSION", str(version)))
    done = subprocess.run(
        ["bash", SCRIPT, "--only-install"],
        cwd=machine,
        env={"PATH": str(machine / "bin"), "HOME": str(machine), "HAS_DRIVER": driver},
        capture_output=True,
        text=True,
    )
    log = machine / "log"
    asked = log.read_text().replace(str(machine), "~").splitlines() if log.exists() else []
    return done, asked


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--gpu"], "error: --gpu -> no such option -> --cpu"),
        (["--cpu"], "error: nothing to train -> give overrides"),
    ],
)
def test_start_script_says_what_it_cannot_do(words, error):
    script = ["bash", ROOT / SCRIPT, *words]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(error)


@pytest.mark.parametrize(
    ("pythons", "expected"),
    [
        ({"python3": (3, 12)}, "python3"),
        ({"python3": (3, 10), "python3.11": (3, 11)}, "python3.11"),
        ({"python3.11": (3, 11), "python3": (3, 12), "python3.12": (3, 12)}, "python3.12"),
    ],
)
def test_environment_is_of_the_newest_python_of_the_system(bare_machine, pythons, expected):
    done, asked = install(bare_machine, {f"bin/{name}": v for name, v in pythons.items()})
    assert done.returncode == 0, done.stderr
    assert asked[0] == f"{expected} -m venv ~/.venv"
    assert asked[1].startswith("python -m pip install")
    assert len(asked) == 2


def test_python_is_fetched_where_the_system_has_an_older_one(bare_machine):
    pythons = {"bin/python3": (3, 10), ".venv/python/cpython/bin/python3.12": (3, 12)}
    done, asked = install(bare_machine, pythons)
    assert done.returncode == 0, done.stderr
    *fetched, made, _ = asked
    assert fetched[0] == "python3 -m venv ~/.venv/uv"
    assert re.search(r"^pip install .* uv==[\d.]+$", fetched[1])
    assert re.search(r"^uv python install --no-bin 3\.12\.\d+$", fetched[2])
    assert made == "python3.12 -m venv ~/.venv"


def test_python_without_what_operators_need_is_not_taken(bare_machine):
    (bare_machine / "include/Python.h").unlink()
    pythons = {"bin/python3": (3, 12), ".venv/python/cpython/bin/python3.12": (3, 12)}
    _, asked = install(bare_machine, pythons)
    assert asked[0] == "python3 -m venv ~/.venv/uv"


def test_driver_that_is_too_old_for_torch_is_refused(bare_machine):
    done, asked = install(bare_machine, {"bin/python3": (3, 12)}, driver="570.133.20")
    assert done.returncode == 1
    assert done.stderr.startswith("error: NVIDIA's driver is 570.133.20 -> torch's CUDA 13.0 needs")
    assert asked == []


def test_older_driver_is_left_to_who_has_chosen_a_torch_for_it(bare_machine):
    constraints = bare_machine / "constraints.txt"
    text, count = re.subn(r"(?m)^(torch==.*)$", r"\1+cu126", constraints.read_text())
    constraints.write_text(text)
    done, _ = install(bare_machine, {"bin/python3": (3, 12)}, driver="570.133.20")
    assert (count, done.returncode) == (1, 0), done.stderr


def unit_of(clone):
    """The systemd unit that the start script writes in a clone."""
    text = (ROOT / SCRIPT).read_text()
    functions = text.removesuffix('main "$@"\n')
    assert functions != text
    write(clone / SCRIPT, functions)
    command = ["bash", "-c", f"source {SCRIPT} && write_unit"]
    return subprocess.run(
        command,
        cwd=clone,
        env=os.environ | {"LC_ALL": "C"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def test_unit_is_given_up_where_it_is_killed_at_each_start(tmp_path):
    head, service = unit_of(tmp_path).split("[Service]")
    assert "\nStartLimitIntervalSec=3600\nStartLimitBurst=5\n" in head
    assert "\nRestart=on-abnormal\n" in service


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_unit_of_a_clone_with_spaces_is_one_to_systemd(tmp_path):
    clone = tmp_path / "my clone of 50%d"
    clone.mkdir()
    unit = unit_of(clone)
    assert f"\nWorkingDirectory={tmp_path}/my clone of 50%%d\n" in unit
    (tmp_path / "trainyard.service").write_text(unit)
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / "trainyard.service"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, "trainyard.service" in done.stderr) == (0, False), done.stderr
