"""Who may import whom, read from the source."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"modules", "datamodules", "trainers", "launch", "conf"}
HEAVY = {"torch", "lightning", "deepspeed", "wandb", "transformers", "matplotlib"}
FORBIDDEN = {
    "modules": (OURS - {"modules", "datamodules"}) | {"hydra", "wandb", "webdataset", "deepspeed"},
    "datamodules": (OURS - {"datamodules"}) | {"hydra", "wandb", "deepspeed"},
    "trainers": (OURS - {"trainers"}) | {"hydra"},
    "launch": {"modules", "datamodules"},
}


def imports(source: str) -> list[tuple[str, bool]]:
    """Modules that a source imports, and whether at its top level."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [(name, node in tree.body) for name in names]
    return found


def breaches(package: str, path: str, source: str) -> list[str]:
    found = []
    for name, is_top in imports(source):
        top = name.partition(".")[0]
        if top in FORBIDDEN[package]:
            found.append(f"{path} imports {name}")
        if package == "modules" and top == "datamodules" and name != "datamodules.batch":
            found.append(f"{path} imports {name}")
        if package == "trainers" and top == "deepspeed" and is_top:
            found.append(f"{path} imports {name} at its top")
        if package == "trainers" and top == "wandb" and "callbacks" not in path:
            found.append(f"{path} imports {name}")
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_package_imports_only_what_it_may(package):
    found = []
    for path in (ROOT / package).rglob("*.py"):
        found += breaches(package, path.relative_to(ROOT).as_posix(), path.read_text())
    assert not found


def test_import_rules_catch_a_breach():
    assert breaches("modules", "modules/x.py", "def f():\n    from trainers.build import y")
    assert breaches("modules", "modules/x.py", "from datamodules.loader import y")
    assert breaches("trainers", "trainers/x.py", "import deepspeed")
    assert not breaches("trainers", "trainers/x.py", "def f():\n    import deepspeed")


def test_files_stay_readable():
    long = {
        path.relative_to(ROOT).as_posix(): lines
        for package in [*FORBIDDEN, "benchmarks", "tests"]
        for path in (ROOT / package).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 300
    }
    assert not long


def test_train_reads_in_one_sitting():
    assert len((ROOT / "launch/train.py").read_text().splitlines()) < 100


def test_starting_process_imports_nothing_heavy_before_composing():
    code = "import launch.train, sys; print(sorted({m.partition('.')[0] for m in sys.modules}))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loaded = set(re.findall(r"'(\w+)'", out.stdout))
    assert "hydra" in loaded
    assert not loaded & HEAVY


def test_help_of_every_verb_imports_nothing_heavy():
    verbs = [p.stem for p in (ROOT / "launch").glob("*.py") if "runtime.verb(" in p.read_text()]
    assert {"train", "prepare", "evaluate", "generate", "export", "checkpoints"} <= set(verbs)
    loaded = run_help(verbs)
    assert "hydra" in loaded
    assert not loaded & HEAVY


def run_help(verbs):
    """Packages that are loaded once each verb, in one process, has told what it can do."""
    code = """
import importlib, sys
for verb in sys.argv[1:]:
    sys.argv = [verb, "--help"]
    try:
        importlib.import_module(f"launch.{verb}").main()
    except SystemExit as end:
        assert not end.code, verb
print("LOADED", *{name.partition(".")[0] for name in sys.modules})
"""
    command = [sys.executable, "-c", code, *verbs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED ")[2].split())
