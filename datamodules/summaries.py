"""Functions of Python files and the first lines of their docstrings, by the syntax tree."""

import ast
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from datamodules.pair_cleaning import Pair

MIN_SUMMARY_WORDS = 3
"""Shorter first lines, such as "See above.", do not say what a function does."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def read_summaries(path: Path) -> Iterator[Pair]:
    """Read the functions and methods of a Python file that say what they do, in their order.

    The source is the function with its decorators and without its docstring, not indented; the
    target is the docstring's first line. Left out are functions without a docstring, with one that
    shares a line with code, with a first line of fewer than `MIN_SUMMARY_WORDS` words, or with no
    body besides; and files that this interpreter cannot parse.
    """
    with tokenize.open(path) as file:
        text = file.read()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of doubtful escapes in the file
            tree = ast.parse(text)
    except SyntaxError:
        return
    lines = text.split("\n")  # as the syntax tree counts them
    functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
    for function in sorted(functions, key=lambda node: (node.lineno, node.col_offset)):
        summary = (ast.get_docstring(function) or "").partition("\n")[0].strip()
        source = _source_of(function, lines)
        if source is not None and len(summary.split()) >= MIN_SUMMARY_WORDS:
            yield Pair(source, summary)


def _source_of(function: Function, lines: list[str]) -> str | None:
    """Lines of a function with a docstring, without that; None where nothing is left."""
    docstring, body = function.body[0], function.body[1:]
    if not body or all(_is_nothing(statement) for statement in body):
        return None
    start = min(node.lineno for node in (function, *function.decorator_list)) - 1
    first, last, stop = docstring.lineno - 1, docstring.end_lineno, function.end_lineno
    assert last is not None
    shares_its_lines = function.lineno - 1 == first or body[0].lineno == last
    if shares_its_lines or not lines[first][: docstring.col_offset].isspace():
        return None
    while not lines[last].strip():  # the blank lines behind it
        last += 1
    kept = lines[start:first] + lines[last:stop]
    indent = lines[start][: len(lines[start]) - len(lines[start].lstrip())]
    return "\n".join(line.removeprefix(indent) for line in kept)


def _is_nothing(statement: ast.stmt) -> bool:
    is_ellipsis = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return is_ellipsis or isinstance(statement, ast.Pass)
