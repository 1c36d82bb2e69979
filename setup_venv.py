"""Make the virtual environment, without ever pulling a second torch over an installed one.

`python3 setup_venv.py .venv`. Needs nothing but Python 3.11 or later with `venv`.
"""

import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 11)


def main(directory: str) -> None:
    """Create `directory` and install the project with its development tools into it."""
    if sys.version_info < OLDEST_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        sys.exit(f"python {found} -> Trainyard needs 3.11 or later -> make PYTHON=python3.11 ...")
    torch = installed_torch()
    visible = ["--system-site-packages"] if torch else []
    made = subprocess.run([sys.executable, "-m", "venv", *visible, directory])
    if made.returncode:
        sys.exit("python3 -m venv failed -> on Debian and Ubuntu: apt-get install python3-venv")
    print(f"using the torch {torch} of this Python" if torch else "installing torch", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        constraints = Path(scratch, "constraints.txt")
        constraints.write_text(constrain(Path("constraints.txt").read_text(), torch))
        pip = [str(Path(directory, "bin", "python")), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "-c", str(constraints), "-e", ".[dev]"], check=True)


def installed_torch() -> str | None:
    """The version of this interpreter's torch, if it is recent enough to be kept."""
    try:
        found = version("torch")
    except PackageNotFoundError:
        return None
    release = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    return found if release >= OLDEST_TORCH else None


def constrain(text: str, torch: str | None) -> str:
    """The pinned versions, with an installed torch in the place of the pinned one."""
    if torch is None:
        return text
    pins = [line for line in text.splitlines() if not line.startswith("torch==")]
    return "\n".join([*pins, f"torch=={torch}"]) + "\n"


if __name__ == "__main__":
    main(sys.argv[1])
