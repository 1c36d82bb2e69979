"""Which documents of a corpus stay: a pass over the text in parallel, then one decision.

Of each unit arrays stay behind (verdicts of the filters, sizes, hashes, signatures), so a killed
pass is finished by the next. The decision reads them in the order of the units, so it is the same
for any number of processes. From then on a unit reads as what was decided for it.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.cleaning import CHANGES, STEPS, Cleaning
from datamodules.index import write_atomically
from datamodules.near_duplicates import find_near_duplicates, make_signer
from datamodules.processes import run_tasks
from datamodules.sources import Piece, read_documents

_TOTALS_FILE = "cleaning.json"
_STAYS = 0
_CODES = {step: number for number, step in enumerate(STEPS, start=1)}


@dataclass(frozen=True)
class Unit:
    """Some pieces of text that one process works on.

    Attributes:
        number: place of the unit.
        pieces: the text.
        text_key: field of a record that holds the text.
        cleaning: what changes and removes documents; None leaves them as they are.
        folder: where what is known of the unit is kept.
    """

    number: int
    pieces: list[Piece]
    text_key: str
    cleaning: Cleaning | None
    folder: Path

    @property
    def num_bytes(self) -> int:
        """Size of the source text."""
        return sum(piece.num_bytes for piece in self.pieces)

    def path(self, suffix: str) -> Path:
        """Name a file about this unit."""
        return self.folder / f"{self.number:06d}.{suffix}"

    def read(self) -> Iterator[tuple[Piece, str]]:
        """Read the documents as they are in the sources, with the piece of each."""
        for piece in self.pieces:
            for document in read_documents(piece, self.text_key):
                yield piece, document

    def documents(self) -> Iterator[tuple[Piece, str]]:
        """Read the documents that stay, cleaned, with the piece of each."""
        if self.cleaning is None:
            yield from self.read()
            return
        verdicts = np.fromfile(self.path("verdicts.u8"), np.uint8)
        for (piece, document), verdict in zip(self.read(), verdicts, strict=True):
            if verdict == _STAYS:
                yield piece, self.cleaning.change(document)[0]


def select_documents(
    units: list[Unit], cleaning: Cleaning, num_processes: int | None, title: str
) -> dict[str, dict[str, dict[str, int]]]:
    """Decide which documents of the units stay.

    The first of equal or similar documents stays, in the order of the units.

    Returns:
        `changed` and `removed`: step -> `documents` and `bytes`, for the steps that are on. Bytes
        of changed documents are those of the source, of removed ones those after the changes.

    Raises:
        ValueError: none stays.
    """
    folder = units[0].folder
    folder.mkdir(exist_ok=True)
    run_tasks(_scan, units, num_processes, title, done=lambda unit: unit.path("npz").exists())
    totals = folder / _TOTALS_FILE
    if not totals.exists():
        # Last, since its presence says that the verdicts are complete.
        write_atomically(totals, json.dumps(_decide(units, cleaning)).encode())
    return json.loads(totals.read_bytes())


def _scan(unit: Unit) -> None:
    """Apply the filters to a unit, and keep what the comparison of documents needs."""
    cleaning = unit.cleaning
    assert cleaning is not None
    near = cleaning.near_duplicates
    sign = make_signer(near) if near else None
    verdicts, sizes, digests, signatures = [], [], [], []
    changed = np.zeros((len(CHANGES), 2), np.int64)
    for _, document in unit.read():
        text, is_changed = cleaning.change(document)
        changed[list(is_changed)] += (1, len(document.encode()))
        step, content = cleaning.reject(text), text.encode()
        verdicts.append(_CODES[step] if step else _STAYS)
        sizes.append(len(content))
        if step is None and cleaning.exact_duplicates:
            digests.append(hashlib.blake2b(content, digest_size=16).digest())
        if step is None and sign is not None:
            signatures.append(sign(text))
    if sign is not None:
        write_atomically(unit.path("signatures.u32"), b"".join(s.tobytes() for s in signatures))
    arrays = {
        "verdicts": np.array(verdicts, np.uint8),
        "sizes": np.array(sizes, np.uint64),
        "digests": np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2),
        "changed": changed,
    }
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_atomically(unit.path("npz"), content.getvalue())


def _decide(units: list[Unit], cleaning: Cleaning) -> dict[str, Any]:
    """Compare all documents and write the verdicts on those of each unit; returns the totals."""
    scans = [_load(unit.path("npz")) for unit in units]
    verdicts = np.concatenate([scan["verdicts"] for scan in scans])
    left = np.flatnonzero(verdicts == _STAYS)
    is_repeated = np.zeros(len(left), bool)
    if cleaning.exact_duplicates:
        is_repeated = _find_repeated(np.concatenate([scan["digests"] for scan in scans]))
        verdicts[left[is_repeated]] = _CODES["exact_duplicates"]
    if cleaning.near_duplicates:
        files = [unit.path("signatures.u32") for unit in units]
        is_near = find_near_duplicates(files, is_repeated, cleaning.near_duplicates)
        verdicts[left[is_near]] = _CODES["near_duplicates"]
    if (verdicts != _STAYS).all():
        raise ValueError(
            f"corpus.clean={cleaning.settings} -> removed all {len(verdicts)} documents -> loosen "
            "its bounds"
        )
    cuts = np.cumsum([0, *(len(scan["verdicts"]) for scan in scans)])
    for unit, (start, stop) in zip(units, pairwise(cuts), strict=True):
        write_atomically(unit.path("verdicts.u8"), verdicts[start:stop].tobytes())
    sizes = np.concatenate([scan["sizes"] for scan in scans])
    changed = np.sum([scan["changed"] for scan in scans], axis=0)
    steps = [step for step in STEPS if cleaning.has(step)]
    return {
        "changed": {s: _count(*changed[CHANGES.index(s)]) for s in steps if s in CHANGES},
        "removed": {
            s: _count(np.sum(verdicts == _CODES[s]), sizes[verdicts == _CODES[s]].sum())
            for s in steps
            if s not in CHANGES
        },
    }


def _find_repeated(digests: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Tell which rows, uint64 [documents, 2], occurred before."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal rows stay in their order
    is_equal = (digests[order][1:] == digests[order][:-1]).all(axis=1)
    is_repeated = np.zeros(len(digests), bool)
    is_repeated[order[1:][is_equal]] = True
    return is_repeated


def _load(path: Path) -> dict[str, NDArray]:
    with np.load(path) as arrays:
        return dict(arrays)


def _count(documents: np.integer, num_bytes: np.integer) -> dict[str, int]:
    return {"documents": int(documents), "bytes": int(num_bytes)}
