"""Which documents of a corpus stay: a pass over the text in parallel, then one decision.

What a document is, only its unit and its cleaning know: a text, or a pair of texts.

Of each unit arrays stay behind (verdicts of the filters, sizes, hashes, signatures), so a killed
pass is finished by the next. The decision reads them in the order of the units, so it is the same
for any number of processes. From then on a unit reads as what was decided for it.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from datamodules.cleaning import NearDuplicates
from datamodules.index import write_atomically
from datamodules.near_duplicates import find_near_duplicates, make_signer
from datamodules.processes import run_tasks
from datamodules.sources import Piece

_TOTALS_FILE = "cleaning.json"
_STAYS = 0


class Encodable(Protocol):
    """A document: equal ones have equal bytes."""

    def encode(self) -> bytes:
        """Give the bytes of the text."""
        ...


Document = TypeVar("Document", bound=Encodable)


class Steps(Protocol[Document]):
    """What changes and removes documents: of texts `datamodules.cleaning.Cleaning`.

    Attributes:
        names: of all steps, in order.
        changes: the first of them, which change documents; the others remove some.
    """

    names: ClassVar[tuple[str, ...]]
    changes: ClassVar[tuple[str, ...]]

    @property
    def exact_duplicates(self) -> bool:
        """Whether of equal documents only the first stays."""
        ...

    @property
    def near_duplicates(self) -> NearDuplicates | None:
        """When documents count as similar, of which the first stays; of texts alone."""
        ...

    @property
    def described(self) -> str:
        """The settings, as an error names them."""
        ...

    def has(self, step: str) -> bool:
        """Tell whether a step is on."""
        ...

    def change(self, text: Document) -> tuple[Document, tuple[bool, ...]]:
        """Change a document, and tell for each of `changes` whether it did."""
        ...

    def reject(self, text: Document) -> str | None:
        """Name the step that removes a changed document by itself, or None."""
        ...


@dataclass(frozen=True)
class Unit(Generic[Document]):
    """Some pieces of text that one process works on.

    Attributes:
        number: place of the unit.
        pieces: the text.
        read_piece: gives the documents of a piece; can be pickled.
        cleaning: what changes and removes documents; None leaves them as they are.
        folder: where what is known of the unit is kept.
    """

    number: int
    pieces: list[Piece]
    read_piece: Callable[[Piece], Iterator[Document]]
    cleaning: Steps[Document] | None
    folder: Path

    @property
    def num_bytes(self) -> int:
        """Size of the source text."""
        return sum(piece.num_bytes for piece in self.pieces)

    def path(self, suffix: str) -> Path:
        """Name a file about this unit."""
        return self.folder / f"{self.number:06d}.{suffix}"

    def read(self) -> Iterator[tuple[Piece, Document]]:
        """Read the documents as they are in the sources, with the piece of each."""
        for piece in self.pieces:
            for document in self.read_piece(piece):
                yield piece, document

    def documents(self) -> Iterator[tuple[Piece, Document]]:
        """Read the documents that stay, cleaned, with the piece of each."""
        if self.cleaning is None:
            yield from self.read()
            return
        for (piece, document), verdict in zip(self.read(), self.verdicts(), strict=True):
            if verdict == _STAYS:
                yield piece, self.cleaning.change(document)[0]

    def verdicts(self) -> NDArray[np.uint8]:
        """Read what was decided: uint8 [documents], 0 or the number of the step, from 1 on."""
        return np.fromfile(self.path("verdicts.u8"), np.uint8)


def select_documents(
    units: list[Unit[Document]], cleaning: Steps[Document], num_processes: int | None, title: str
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
    folder.mkdir(parents=True, exist_ok=True)
    run_tasks(_scan, units, num_processes, title, done=lambda unit: unit.path("npz").exists())
    totals = folder / _TOTALS_FILE
    if not totals.exists():
        # Last, since its presence says that the verdicts are complete.
        write_atomically(totals, json.dumps(_decide(units, cleaning)).encode())
    return json.loads(totals.read_bytes())


def find_removed(units: list[Unit[Document]], step: str) -> tuple[Piece, int, Document]:
    """Find the first document that a step has removed.

    Returns:
        Its piece, its number in that, and the document as it was read.
    """
    for unit in units:
        assert unit.cleaning is not None
        places = np.flatnonzero(unit.verdicts() == _code(unit.cleaning, step))
        if not len(places):
            continue
        last, number = None, 0
        for place, (piece, document) in enumerate(unit.read()):
            last, number = piece, number + 1 if piece is last else 0
            if place == places[0]:
                return piece, number, document
    raise AssertionError(step)


def _scan(unit: Unit[Document]) -> None:
    """Apply the filters to a unit, and keep what the comparison of documents needs."""
    cleaning = unit.cleaning
    assert cleaning is not None
    near = cleaning.near_duplicates
    sign = make_signer(near) if near else None
    verdicts, sizes, digests, signatures = [], [], [], []
    changed = np.zeros((len(cleaning.changes), 2), np.int64)
    for _, document in unit.read():
        text, is_changed = cleaning.change(document)
        changed[list(is_changed)] += (1, len(document.encode()))
        step, content = cleaning.reject(text), text.encode()
        verdicts.append(_code(cleaning, step) if step else _STAYS)
        sizes.append(len(content))
        if step is None and cleaning.exact_duplicates:
            digests.append(hashlib.blake2b(content, digest_size=16).digest())
        if step is None and sign is not None:
            assert isinstance(text, str)
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


def _decide(units: list[Unit[Document]], cleaning: Steps[Document]) -> dict[str, Any]:
    """Compare all documents and write the verdicts on those of each unit; returns the totals."""
    scans = [_load(unit.path("npz")) for unit in units]
    verdicts = np.concatenate([scan["verdicts"] for scan in scans])
    left = np.flatnonzero(verdicts == _STAYS)
    is_repeated = np.zeros(len(left), bool)
    if cleaning.exact_duplicates:
        is_repeated = _find_repeated(np.concatenate([scan["digests"] for scan in scans]))
        verdicts[left[is_repeated]] = _code(cleaning, "exact_duplicates")
    if cleaning.near_duplicates:
        files = [unit.path("signatures.u32") for unit in units]
        is_near = find_near_duplicates(files, is_repeated, cleaning.near_duplicates)
        verdicts[left[is_near]] = _code(cleaning, "near_duplicates")
    if (verdicts != _STAYS).all():
        raise ValueError(
            f"{cleaning.described} -> removed all {len(verdicts)} documents -> loosen its bounds"
        )
    cuts = np.cumsum([0, *(len(scan["verdicts"]) for scan in scans)])
    for unit, (start, stop) in zip(units, pairwise(cuts), strict=True):
        write_atomically(unit.path("verdicts.u8"), verdicts[start:stop].tobytes())
    sizes = np.concatenate([scan["sizes"] for scan in scans])
    changed = np.sum([scan["changed"] for scan in scans], axis=0)
    changes = cleaning.changes
    steps = [step for step in cleaning.names if cleaning.has(step)]
    is_removed = {s: verdicts == _code(cleaning, s) for s in steps if s not in changes}
    return {
        "changed": {s: _count(*changed[changes.index(s)]) for s in steps if s in changes},
        "removed": {s: _count(mask.sum(), sizes[mask].sum()) for s, mask in is_removed.items()},
    }


def _code(cleaning: Steps[Document], step: str) -> int:
    return cleaning.names.index(step) + 1


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
