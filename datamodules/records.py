"""Records of JSONL and Parquet files: the texts under named fields."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datamodules.lines import COMPRESSED, JSONL, read_lines, suffix_of

PARQUET = ".parquet"
RECORDS = (JSONL, *COMPRESSED, PARQUET)
"""Endings of the files that hold many documents."""


def read_records(
    path: Path, start: int, stop: int, fields: Mapping[str, str]
) -> Iterator[tuple[str, ...]]:
    """Read the texts of records; a field that is null is an empty text.

    Args:
        path: of a file with one of `RECORDS` as its ending.
        start: first byte, or first row group of a Parquet file.
        stop: end of the part, in the same unit.
        fields: key of the setting -> field that it names, as `{"text_key": "text"}`.

    Returns:
        The texts of a record, in the order of `fields`.

    Raises:
        ValueError: a record has no text under a field, or the file is damaged; the message names
            the file and the place in it.
    """
    if suffix_of(path) == PARQUET:
        return _read_parquet(path, start, stop, fields)
    return _read_jsonl(path, start, stop, fields)


def _read_jsonl(
    path: Path, start: int, stop: int, fields: Mapping[str, str]
) -> Iterator[tuple[str, ...]]:
    for offset, line in read_lines(path, start, stop):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except ValueError as err:
            raise ValueError(
                f"corpus.path: {path} -> the line at byte {offset} is not JSON ({err}) -> "
                "correct the line"
            ) from err
        place = f"{path}, line at byte {offset}"
        yield tuple(_text_of(record, key, field, place) for key, field in fields.items())


def open_parquet(path: Path) -> Any:
    """Open a Parquet file.

    Raises:
        ValueError: it is none, or cut short.
    """
    from pyarrow import ArrowInvalid, parquet  # slow to import, and rarely needed

    try:
        return parquet.ParquetFile(path)
    except ArrowInvalid as err:
        raise ValueError(
            f"corpus.path: {path} -> is no Parquet file ({err}) -> it is damaged or cut short: "
            "fetch it again"
        ) from err


def _read_parquet(
    path: Path, start: int, stop: int, fields: Mapping[str, str]
) -> Iterator[tuple[str, ...]]:
    file = open_parquet(path)
    for key, field in fields.items():
        if field not in file.schema_arrow.names:
            raise _no_text(key, field, str(path), file.schema_arrow.names)
    for group in range(start, stop):
        place = f"{path}, row group {group}"
        for record in file.read_row_group(group, columns=list(fields.values())).to_pylist():
            yield tuple(_text_of(record, key, field, place) for key, field in fields.items())


def _text_of(record: object, key: str, field: str, place: str) -> str:
    if not isinstance(record, dict) or field not in record:
        raise _no_text(key, field, place, list(record) if isinstance(record, dict) else [])
    text = record[field]
    if not isinstance(text, str | None):
        raise ValueError(
            f"corpus.{key}={field} -> holds {type(text).__name__}, not text, in {place} -> "
            "name the field with the text"
        )
    try:
        (text or "").encode()
    except UnicodeEncodeError as err:
        raise ValueError(
            f"corpus.{key}={field} -> character {err.start} is half of a surrogate pair, "
            f"which UTF-8 cannot hold, in {place} -> correct the record"
        ) from err
    return text or ""


def _no_text(key: str, field: str, place: str, available: list[str]) -> ValueError:
    return ValueError(
        f"corpus.{key}={field} -> there is no such field in {place} -> choose one of "
        f"{', '.join(available) or 'the fields of a JSON object'}"
    )
