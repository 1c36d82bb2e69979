"""Pairs of texts, and their cleaning: the counterpart of `datamodules.cleaning` for two texts.

The order of the steps is fixed: `lowercase`, `empty`, `max_characters`, `max_length_ratio`,
`exact_duplicates` (the setting `unique`). Each sees what the one before it left.
"""

from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

from datamodules.tokenization import lower_case


class Pair(NamedTuple):
    """A source, and the target that belongs to it."""

    source: str
    target: str

    def encode(self) -> bytes:
        """Both texts in UTF-8, with a byte between them that occurs in none."""
        return b"\xff".join((self.source.encode(), self.target.encode()))


@dataclass(frozen=True)
class PairCleaning:
    """The steps on pairs; a `datamodules.selection.Steps`.

    Attributes:
        lowercase: lower-case both texts.
        max_characters: pairs with a longer text are removed.
        max_length_ratio: so are pairs whose longer text has more than this many times the
            characters of the shorter one.
        exact_duplicates: remove a pair that occurred before, changes included.
    """

    names: ClassVar[tuple[str, ...]] = (
        *("lowercase", "empty", "max_characters", "max_length_ratio"),
        *("exact_duplicates", "near_duplicates"),
    )
    changes: ClassVar[tuple[str, ...]] = ("lowercase",)

    lowercase: bool
    max_characters: int | None
    max_length_ratio: float | None
    exact_duplicates: bool

    @property
    def near_duplicates(self) -> None:
        """Are searched for among texts alone."""
        return

    @property
    def described(self) -> str:
        """The settings, as an error names them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["unique"] = values.pop("exact_duplicates")
        return ", ".join(f"corpus.{name}={value}" for name, value in values.items())

    def has(self, step: str) -> bool:
        """Tell whether a step is on; `empty` always is."""
        return step == "empty" or getattr(self, step) not in (None, False)

    def change(self, text: Pair) -> tuple[Pair, tuple[bool, ...]]:
        """Lower-case a pair.

        Returns:
            The pair, and whether it was changed.
        """
        if not self.lowercase:
            return text, (False,)
        lower = Pair(lower_case(text.source), lower_case(text.target))
        return lower, (lower != text,)

    def reject(self, text: Pair) -> str | None:
        """Name the first step that removes a changed pair, or None."""
        if is_empty(text.source) or is_empty(text.target):
            return "empty"
        shorter, longer = sorted(map(len, text))
        if self.max_characters is not None and longer > self.max_characters:
            return "max_characters"
        if self.max_length_ratio is not None and longer > self.max_length_ratio * shorter:
            return "max_length_ratio"
        return None


def is_empty(text: str) -> bool:
    """Tell whether a text has no visible character."""
    return not text or text.isspace()
