"""Documentation that can be checked by a machine: links, commands, names."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page):
    text = page.read_text()
    for package, name in re.findall(r"python -m (launch|benchmarks)\.(\w+)", text):
        assert (ROOT / package / f"{name}.py").exists(), name
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"`make ([\w-]+)", text):
        assert target in targets
    for group, name in re.findall(r"\b(experiment|strategy|logger|debug)=(\w+)", text):
        if name not in ("mine", "null"):
            assert (ROOT / "conf" / group / f"{name}.yaml").exists(), f"{group}={name}"


def test_extras_that_are_named_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    sources = [path for name in ("launch", "datamodules") for path in (ROOT / name).rglob("*.py")]
    for path in [*PAGES, *sources]:
        named = re.findall(r"trainyard\[([a-z0-9,]+)\]", path.read_text())
        assert set(",".join(named).split(",")) - {""} <= project["optional-dependencies"].keys(), (
            path
        )


def test_readme_maps_every_file_of_the_packages():
    text = (ROOT / "README.md").read_text()
    for package in ("modules", "datamodules", "trainers", "launch"):
        for path in (ROOT / package).rglob("*.py"):
            if path.stem not in ("__init__",):
                assert re.search(rf"\b{path.stem}\b", text), path


def test_documents_do_not_speak_of_one_machine():
    for page in PAGES:
        assert not re.search(r"(?<![\w.])/(home|root|work|opt)/", page.read_text()), page


def test_readme_reaches_every_page():
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in text
