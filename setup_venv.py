"""Make the virtual environment, without ever pulling a second torch over an installed one.

`python3 setup_venv.py .venv`. Needs nothing but Python 3.11 or later with `venv`.
"""

import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 11)


def main(directory: str) -> None:
    """Create `directory` and install the project with its development tools into it."""
    if sys.version_info < OLDEST_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        sys.exit(f"python {found} -> Trainyard needs 3.11 or later -> make PYTHON=python3.11 ...")
    if subprocess.run([sys.executable, "-m", "venv", directory]).returncode:
        sys.exit("python3 -m venv failed -> on Debian and Ubuntu: apt-get install python3-venv")
    torch = installed_torch()
    if torch is not None:
        show_packages_of_this_python(directory)
    print(f"using the torch {torch} of this Python" if torch else "installing torch", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        constraints = Path(scratch, "constraints.txt")
        constraints.write_text(constrain(Path("constraints.txt").read_text(), torch))
        pip = [str(Path(directory, "bin", "python")), "-m", "pip", "install", "--quiet"]
        pip += ["-c", str(constraints)]
        installed = subprocess.run([*pip, "-e", ".[dev]"])
        if not installed.returncode:
            installed = subprocess.run([*pip, *schemas_of_skypilot(directory)])
    if installed.returncode:
        sys.exit("pip could not install the project -> its message is above -> run make again")


def installed_torch() -> str | None:
    """The version of this interpreter's torch, if it is recent enough to be kept."""
    try:
        found = distribution("torch").version
    except PackageNotFoundError:
        return None
    release = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    return found if release >= OLDEST_TORCH else None


def show_packages_of_this_python(directory: str) -> None:
    """Put the packages beside this interpreter's torch on the environment's path, after its own.

    `venv --system-site-packages` would show those of the base installation, which are others where
    this interpreter is itself one of a virtual environment.
    """
    packages = distribution("torch").locate_file("")
    (own,) = Path(directory).glob("lib/python*/site-packages")
    (own / "packages_of_the_interpreter.pth").write_text(f"{packages}\n")


def schemas_of_skypilot(directory: str) -> list[str]:
    """Arguments of pip for SkyPilot, by whose schema a test judges our task files.

    It goes beside the packages and comes without those that it asks for, some 60: of click and
    others it wants versions that ours do not go with, and nothing here runs it.
    """
    return ["--no-deps", "--upgrade", "--target", str(Path(directory, "skypilot")), "skypilot"]


def constrain(text: str, torch: str | None) -> str:
    """The pinned versions, with an installed torch in the place of the pinned one."""
    if torch is None:
        return text
    pins = [line for line in text.splitlines() if not line.startswith("torch==")]
    return "\n".join([*pins, f"torch=={torch}"]) + "\n"


if __name__ == "__main__":
    main(sys.argv[1])
