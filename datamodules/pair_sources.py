r"""Where pairs come from: two parallel text files, records, or functions with docstrings.

A line of a text file ends with `\n` and nothing else; a `\r` before that belongs to the end, and
so does a byte order mark to the beginning of the file.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datamodules.lines import suffix_of
from datamodules.pair_cleaning import Pair, is_empty
from datamodules.records import PARQUET, RECORDS, read_records
from datamodules.sources import STDLIB, Piece, SourceFile, list_files, plan_units
from datamodules.summaries import read_summaries

SUMMARIES = "builtin:stdlib_summaries"

_READ_BYTES = 2**24
_MARK_LINES = 256
"""Files are cut where a multiple of so many lines begins: a fine enough grid, and 16 bytes of
memory for each of its points."""


@dataclass(frozen=True)
class ParallelPiece(Piece):
    """Lines of two files; `path`, `start` and `stop` are those of the sources.

    Attributes:
        target_path: the other file.
        target_start: first byte in it.
        target_stop: end of the part in it.
        first_line: number of the first line, from 1 on.
    """

    target_path: Path
    target_start: int
    target_stop: int
    first_line: int


def list_pairs(split: str, paths: Mapping[str, str | None]) -> list[SourceFile]:
    """List the files of a split; of `val` and `test` none where they have no files of their own.

    Args:
        split: name of the split.
        paths: `path`, of records or `builtin:stdlib_summaries`, or `source` and `target`.

    Returns:
        Source and target, or records, under names that say which; or the standard library.

    Raises:
        ValueError: keys are missing or exclude each other, or a file does not exist.
    """
    for key in paths:
        if key not in ("path", "source", "target"):
            raise ValueError(
                f"corpus.{split}.{key}={paths[key]} -> there is no such key -> use source and "
                "target, or path"
            )
    given = {key: str(path) for key, path in paths.items() if path is not None}
    if not given and split != "train":
        return []
    if given.keys() not in ({"path"}, {"source", "target"}):
        raise ValueError(
            f"corpus.{split}={given} -> a split is two parallel text files, or one file of records "
            "-> give source and target, or path alone"
        )
    if given.get("path") == SUMMARIES:
        return list_files(STDLIB, [".py"])
    return [_file(split, key, given[key]) for key in sorted(given)]


def plan_pairs(split: str | None, files: list[SourceFile], unit_bytes: int) -> list[list[Piece]]:
    """Cut the files of a split into units of about `unit_bytes`, each the work of one process.

    Args:
        split: where the pairs go; None where each is assigned by its source.
        files: of `list_pairs`.
        unit_bytes: size of a unit, both texts counted.

    Raises:
        ValueError: two parallel files have unequal numbers of lines, or there are no pairs.
    """
    if files[0].name.endswith(".source"):
        source, target = (file.path for file in files)
        units: list[list[Piece]] = [
            [piece] for piece in _cut_parallel(split, source, target, unit_bytes)
        ]
    else:
        plan = plan_units(files, unit_bytes, None)
        units = [[replace(piece, split=split) for piece in unit] for unit in plan]
    if not units:
        raise ValueError(
            f"corpus.{split or 'train'}: {files[0].path} -> holds no pairs -> give another file"
        )
    return units


def read_pairs(piece: Piece, fields: Mapping[str, str]) -> Iterator[Pair]:
    """Read the pairs of a piece, empty ones too.

    Args:
        piece: of `plan_pairs`.
        fields: as for `datamodules.records.read_records`: that of the source, that of the target.

    Raises:
        ValueError: a text is not UTF-8, or a record lacks a field; the message names the place.
    """
    if isinstance(piece, ParallelPiece):
        sources = _read_lines(piece.path, piece.start, piece.stop)
        targets = _read_lines(piece.target_path, piece.target_start, piece.target_stop)
        return map(Pair, sources, targets)
    if suffix_of(piece.path) in RECORDS:
        records = read_records(piece.path, piece.start, piece.stop, fields)
        return (Pair(*texts) for texts in records)
    return read_summaries(piece.path)


def place_of(piece: Piece, number: int, pair: Pair) -> str:
    """Name the place of an empty text: its file, and the line or record in it.

    Args:
        piece: that the pair is in.
        number: of the pair in the piece.
        pair: one with an empty text.
    """
    if isinstance(piece, ParallelPiece):
        path = piece.path if is_empty(pair.source) else piece.target_path
        return f"line {piece.first_line + number} of {path}"
    unit = "row group" if suffix_of(piece.path) == PARQUET else "byte"
    return f"record {number + 1} from {unit} {piece.start} on of {piece.path}"


def _file(split: str, key: str, path: str) -> SourceFile:
    if not Path(path).is_file():
        raise ValueError(f"corpus.{split}.{key}={path} -> no such file -> correct the path")
    if (suffix_of(Path(path)) in RECORDS) != (key == "path"):
        raise ValueError(
            f"corpus.{split}.{key}={path} -> path is for records, which end in "
            f"{', '.join(RECORDS)}, and source and target for text -> give it as the other, or "
            "name the file otherwise"
        )
    return SourceFile(f"{split}.{key}", Path(path).resolve())


def _cut_parallel(
    split: str | None, source: Path, target: Path, unit_bytes: int
) -> Iterator[ParallelPiece]:
    (starts, lines), (target_starts, target_lines) = _scan_lines(source), _scan_lines(target)
    if lines != target_lines:
        raise ValueError(
            f"corpus.{split or 'train'}.source={source}, target={target} -> they have {lines:,} "
            f"and {target_lines:,} lines, and line i of one belongs to line i of the other -> "
            "align the files"
        )
    sizes = starts + target_starts
    first = 0
    while first < len(sizes) - 1:
        # The last mark within the size, but at least one further.
        last = int(np.searchsorted(sizes, sizes[first] + unit_bytes, side="right")) - 1
        last = max(last, first + 1)
        start, stop, target_start, target_stop = (
            int(marks[mark]) for marks in (starts, target_starts) for mark in (first, last)
        )
        yield ParallelPiece(
            path=source,
            start=start,
            stop=stop,
            num_bytes=stop - start + target_stop - target_start,
            split=split,
            target_path=target,
            target_start=target_start,
            target_stop=target_stop,
            first_line=first * _MARK_LINES + 1,
        )
        first = last


def _scan_lines(path: Path) -> tuple[NDArray[np.int64], int]:
    """Find where every `_MARK_LINES`-th line begins, and where the file ends; count the lines."""
    marks, num_ends, size = [np.zeros(1, np.int64)], 0, 0
    last = b"\n"
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
            marks.append(size + 1 + ends[-(num_ends + 1) % _MARK_LINES :: _MARK_LINES])
            num_ends, size, last = num_ends + len(ends), size + len(block), block[-1:]
    num_lines = num_ends + (last != b"\n")
    starts = np.concatenate(marks)
    # A mark at the end is that of a line that does not exist.
    starts = np.append(starts[starts < size], size)
    return starts, num_lines


def _read_lines(path: Path, start: int, stop: int) -> list[str]:
    with path.open("rb") as file:
        file.seek(start)
        content = file.read(stop - start)
    try:
        text = content.decode()
    except UnicodeDecodeError as err:
        raise ValueError(
            f"corpus: {path} -> byte {start + err.start} is not UTF-8 text -> convert the file"
        ) from err
    if start == 0:
        text = text.removeprefix("\ufeff")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
