"""Where a corpus comes from: files, cut into units of work that yield documents."""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datamodules.index import digest_file, write_atomically
from datamodules.lines import JSONL, suffix_of
from datamodules.records import PARQUET, RECORDS, open_parquet, read_records

STDLIB = "builtin:stdlib"

_STDLIB_EXCLUDED = {
    # Tests repeat themselves and each other; `encodings` holds near-identical tables, which would
    # leak from training into validation.
    *("test", "tests", "idle_test", "turtledemo", "encodings"),
    *("site-packages", "dist-packages", "__pycache__"),
}
_LINE_SEARCH_BYTES = 2**16


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus.

    Attributes:
        name: relative to the corpus, with forward slashes.
        path: where it lies.
    """

    name: str
    path: Path


@dataclass(frozen=True)
class Piece:
    """A part of a source file that is read by itself.

    Attributes:
        path: of the file.
        start: first byte, or first row group of a Parquet file.
        stop: end of the part, in the same unit.
        num_bytes: its size.
        split: where its text goes; None where every document is assigned by its content.
    """

    path: Path
    start: int
    stop: int
    num_bytes: int
    split: str | None


def list_files(path: str, suffixes: list[str]) -> list[SourceFile]:
    """List the files of a corpus, sorted by name.

    Args:
        path: a file, a folder, or `builtin:stdlib`.
        suffixes: endings of the files that count in a folder; hidden folders do not.

    Raises:
        ValueError: there is nothing at `path`, or nothing in it.
    """
    if path == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = list(_walk(root, suffixes, _STDLIB_EXCLUDED))
    elif (root := Path(path)).is_file():
        files, root = [root], root.parent
    elif root.is_dir():
        files = list(_walk(root, suffixes, set()))
    else:
        raise ValueError(
            f"corpus.path={path} -> no such file or folder -> give a text file, a folder, a file "
            f"ending in {', '.join(RECORDS)}, or {STDLIB}"
        )
    for file in files:
        if not file.exists():
            raise ValueError(
                f"corpus.path={path} -> {file} is a link to nothing -> restore what it points to, "
                "or remove it"
            )
    files = [file for file in files if file.stat().st_size]
    if not files:
        raise ValueError(
            f"corpus.path={path} -> holds no text: no non-empty file ending in "
            f"{', '.join(suffixes)} -> check the path and corpus.suffixes"
        )
    return sorted(
        (SourceFile(file.relative_to(root).as_posix(), file.resolve()) for file in files),
        key=lambda file: file.name,
    )


def digest_sources(files: list[SourceFile], cache: Path) -> str:
    """Hash the names and contents of files.

    Content digests are kept with size and modification time, as git does, so that hashing is paid
    once and starting a run stays cheap.

    Args:
        files: in order.
        cache: JSON file of digests, made where it is missing.
    """
    known = json.loads(cache.read_bytes()) if cache.exists() else {}
    total, changed = hashlib.blake2b(digest_size=16), False
    for file in files:
        status = file.path.stat()
        identity = [status.st_size, status.st_mtime_ns]
        entry = known.get(str(file.path))
        if entry is None or entry[:2] != identity:
            entry = known[str(file.path)] = [*identity, digest_file(file.path)]
            changed = True
        total.update(json.dumps([file.name, entry[2]]).encode())
    if changed:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, json.dumps(known).encode())
    return total.hexdigest()


def plan_units(
    files: list[SourceFile], unit_bytes: int, fractions: dict[str, float] | None
) -> list[list[Piece]]:
    """Cut files into units of about `unit_bytes`, each the work of one process.

    Args:
        files: in order.
        unit_bytes: size of a unit; a single document may exceed it.
        fractions: share of each split, in order, for one document that is cut contiguously; None
            where there are many documents.
    """
    if fractions is not None:
        return [[piece] for piece in _cut_document(files[0].path, unit_bytes, fractions)]
    units: list[list[Piece]] = []
    filled = unit_bytes
    for piece in (piece for file in files for piece in _cut_file(file.path, unit_bytes)):
        if filled + piece.num_bytes > unit_bytes:
            units.append([])
            filled = 0
        units[-1].append(piece)
        filled += piece.num_bytes
    return units


def read_documents(piece: Piece, text_key: str) -> Iterator[str]:
    """Read the documents of a piece that are not empty.

    Raises:
        ValueError: the text is not UTF-8, a record has no text under `text_key`, or a compressed
            file is damaged; the message names the file and the place in it.
    """
    if suffix_of(piece.path) in RECORDS:
        records = read_records(piece.path, piece.start, piece.stop, {"text_key": text_key})
        documents = (text for (text,) in records)
    else:
        documents = _read_text(piece)
    return (document for document in documents if document)


def _walk(root: Path, suffixes: list[str], excluded: set[str]) -> Iterator[Path]:
    """Find files below a folder, outside of hidden and excluded folders."""
    for folder, folders, names in os.walk(root):
        # Pruned in place, which keeps the walk out of large folders such as site-packages.
        folders[:] = [n for n in folders if n not in excluded and not n.startswith(".")]
        yield from (Path(folder, name) for name in names if suffix_of(Path(name)) in suffixes)


def _cut_file(path: Path, unit_bytes: int) -> Iterator[Piece]:
    size = path.stat().st_size
    if (suffix := suffix_of(path)) == PARQUET:
        metadata = open_parquet(path).metadata
        for group in range(metadata.num_row_groups):
            num_bytes = metadata.row_group(group).total_byte_size
            yield Piece(path, group, group + 1, num_bytes, None)
    elif suffix == JSONL:
        for start in range(0, size, unit_bytes):
            stop = min(start + unit_bytes, size)
            yield Piece(path, start, stop, stop - start, None)
    else:
        yield Piece(path, 0, size, size, None)


def _cut_document(path: Path, unit_bytes: int, fractions: dict[str, float]) -> Iterator[Piece]:
    size = path.stat().st_size
    start, share = 0, 0.0
    with path.open("rb") as file:
        for split, fraction in fractions.items():
            share += fraction
            # Rounding keeps 0.9 of a file from becoming 0.8999... of it.
            end = _character_start(file, min(size, int(round(share * size, 6))))
            while start < end:
                stop = end if end - start <= unit_bytes else _line_start(file, start + unit_bytes)
                stop = min(stop, end)
                yield Piece(path, start, stop, stop - start, split)
                start = stop


def _character_start(file, offset: int) -> int:
    """Move an offset back to the first byte of a UTF-8 character."""
    file.seek(max(0, offset - 3))
    before, after = file.read(offset - file.tell()), file.read(1)
    while after and after[0] & 0xC0 == 0x80 and before:
        before, after = before[:-1], before[-1:]
        offset -= 1
    return offset


def _line_start(file, offset: int) -> int:
    """Move an offset on to the start of a line with visible text, if one is near."""
    file.seek(offset)
    text = file.read(_LINE_SEARCH_BYTES)
    found = text.find(b"\n")
    while 0 <= found < len(text) - 1:
        if not text[found + 1 : found + 2].isspace():
            return offset + found + 1
        found = text.find(b"\n", found + 1)
    return _character_start(file, offset)


def _read_text(piece: Piece) -> Iterator[str]:
    with piece.path.open("rb") as file:
        file.seek(piece.start)
        content = file.read(piece.stop - piece.start)
    try:
        yield content.decode()
    except UnicodeDecodeError as err:
        raise ValueError(
            f"corpus.path: {piece.path} -> byte {piece.start + err.start} is not UTF-8 text -> "
            "convert the file, or leave its suffix out of corpus.suffixes"
        ) from err
