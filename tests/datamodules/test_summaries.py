import ast
from pathlib import Path

import pytest

from datamodules.pair_cleaning import Pair
from datamodules.pair_sources import list_files
from datamodules.summaries import MIN_SUMMARY_WORDS, read_summaries

MODULE = '''
class Box:
    @property
    def size(self):
        """Number of the things inside.

        More about it.
        """

        # Counted anew each time.
        text = """
    not indented
"""
        return len(self.things) + len(text)

    async def put(self, thing):
        r"""
        Put a \\d thing inside.
        """  # a comment
        def inner(x):
            \'\'\'Give one of the things.\'\'\'
            return x
        return inner(thing)

    def short(self): "Too short."; return 1
    def brief(self):
        """Too short."""
        return 1
    def same_line(self): "Says what it does."; return 1
    def abstract(self):
        """Says what it would do."""
        ...
    def bare(self):
        """Says what it would do."""
    def silent(self):
        return 0
'''


def test_functions_lose_their_docstring_and_indentation(tmp_path: Path) -> None:
    (tmp_path / "box.py").write_text(MODULE)
    size, put, inner = read_summaries(tmp_path / "box.py")
    assert size == Pair(
        "@property\ndef size(self):\n    # Counted anew each time.\n"
        '    text = """\nnot indented\n"""\n    return len(self.things) + len(text)',
        "Number of the things inside.",
    )
    assert put.target == r"Put a \d thing inside."
    assert put.source.startswith("async def put(self, thing):\n    def inner(x):\n")
    assert inner == Pair("def inner(x):\n    return x", "Give one of the things.")


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@pytest.mark.parametrize("name", ["heapq.py", "argparse.py", "json/decoder.py", "textwrap.py"])
def test_pairs_are_those_of_the_interpreter(name: str) -> None:
    (path,) = (file.path for file in list_files("builtin:stdlib", [".py"]) if file.name == name)
    found = list(read_summaries(path))
    assert found
    documented = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and (docstring := ast.get_docstring(node)):
            node.body = node.body[1:]
            if node.body:
                documented.setdefault(ast.unparse(node), docstring)
    for source, summary in found:
        # The same program but for the docstring, as the interpreter reads it.
        (function,) = ast.parse(source).body
        docstring = documented[ast.unparse(function)]
        assert docstring.startswith(summary)
        assert ast.get_docstring(function) is None  # type: ignore[arg-type]
        assert "\n" not in summary
        assert len(summary.split()) >= MIN_SUMMARY_WORDS


def test_file_that_is_not_python_has_no_pairs(tmp_path: Path) -> None:
    (tmp_path / "template.py").write_text("def {name}():\n")
    assert list(read_summaries(tmp_path / "template.py")) == []
