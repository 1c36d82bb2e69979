"""Cleaning of documents: what changes them, and what says that one had better not be there.

The order of the steps is fixed: `normalize`, `scrub_emails`, `min_characters`, `max_characters`,
`max_repeated_lines`, `max_repeated_ngrams`, `exact_duplicates`, `near_duplicates`. Each sees what
the one before it left. The last two compare documents with each other: `datamodules.selection`.
"""

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal

Form = Literal["NFC", "NFD", "NFKC", "NFKD"]
_FORMS = ("NFC", "NFD", "NFKC", "NFKD")

CHANGES = ("normalize", "scrub_emails")
FILTERS = ("min_characters", "max_characters", "max_repeated_lines", "max_repeated_ngrams")
DUPLICATES = ("exact_duplicates", "near_duplicates")
STEPS = (*CHANGES, *FILTERS, *DUPLICATES)

TOP_NGRAM_WORDS = 4
"""Of n-grams up to this length only the most frequent counts, of longer ones all that repeat."""

# A subset of what RFC 5321 permits, with a dot in the domain. Every repetition is possessive and an
# address is only looked for where a run of its characters begins, so each character is passed
# over at most twice: the time is linear in the text, also for a run of a million letters.
_LOCAL, _LABEL = "A-Za-z0-9._%+-", "[A-Za-z0-9-]++"
_EMAIL = re.compile(rf"(?<![{_LOCAL}])[{_LOCAL}]++@{_LABEL}(?:\.{_LABEL})++")


@dataclass(frozen=True)
class NearDuplicates:
    """When two documents count as the same.

    Attributes:
        threshold: Jaccard similarity of their sets of n-grams from which on they do.
        num_permutations: values of a MinHash signature; its estimate of the similarity has a
            standard deviation of at most 0.5 / sqrt(num_permutations).
        ngram: words of an n-gram.
    """

    threshold: float
    num_permutations: int
    ngram: int


@dataclass(frozen=True)
class Cleaning:
    """The steps that are on; None or False is off.

    Attributes:
        normalize: Unicode normalization form.
        scrub_emails: what stands in the place of each e-mail address.
        min_characters: shorter documents are removed.
        max_characters: longer documents are removed.
        max_repeated_lines: bound on `repeated_lines`.
        max_repeated_ngrams: words of an n-gram -> bound on `repeated_ngrams`.
        exact_duplicates: remove a document whose text, changes included, occurred before.
        near_duplicates: remove a document that resembles an earlier one that stays.
    """

    names: ClassVar[tuple[str, ...]] = STEPS
    changes: ClassVar[tuple[str, ...]] = CHANGES

    normalize: Form | None = None
    scrub_emails: str | None = None
    min_characters: int | None = None
    max_characters: int | None = None
    max_repeated_lines: float | None = None
    max_repeated_ngrams: dict[int, float] = field(default_factory=dict)
    exact_duplicates: bool = False
    near_duplicates: NearDuplicates | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The steps that are on, as plain values in order."""
        values = asdict(self)
        return {step: values[step] for step in STEPS if self.has(step)}

    @property
    def described(self) -> str:
        """The settings, as an error names them."""
        return f"corpus.clean={self.settings}"

    def has(self, step: str) -> bool:
        """Tell whether a step is on."""
        return getattr(self, step) not in (None, {}) and getattr(self, step) is not False

    def change(self, text: str) -> tuple[str, tuple[bool, ...]]:
        """Apply `CHANGES`.

        Returns:
            The text, and for each step whether it changed it.
        """
        normalized = unicodedata.normalize(self.normalize, text) if self.normalize else text
        scrubbed = normalized
        if (replacement := self.scrub_emails) is not None:
            scrubbed = _EMAIL.sub(lambda address: replacement, normalized)
        return scrubbed, (normalized != text, scrubbed != normalized)

    def reject(self, text: str) -> str | None:
        """Name the first of `FILTERS` that removes a changed document, or None."""
        if self.min_characters is not None and len(text) < self.min_characters:
            return "min_characters"
        if self.max_characters is not None and len(text) > self.max_characters:
            return "max_characters"
        if self.max_repeated_lines is not None and repeated_lines(text) > self.max_repeated_lines:
            return "max_repeated_lines"
        words = text.split() if self.max_repeated_ngrams else []
        for num_words, bound in self.max_repeated_ngrams.items():
            if repeated_ngrams(words, num_words) > bound:
                return "max_repeated_ngrams"
        return None


def repeated_lines(text: str) -> float:
    """Share of the characters of lines that stand in a line which occurred before.

    Rae et al. 2021 (Gopher, arXiv:2112.11446, table A1), "duplicate line character fraction", where
    0.20 is the bound. The first occurrence counts as no duplicate. Departure: white space around a
    line and empty lines count in neither number.
    """
    seen: set[str] = set()
    total = repeated = 0
    for line in text.splitlines():
        stripped = line.strip()
        total += len(stripped)
        if stripped in seen:
            repeated += len(stripped)
        seen.add(stripped)
    return repeated / total if total else 0.0


def repeated_ngrams(words: list[str], num_words: int) -> float:
    """Share of the characters of words that stand in repeated n-grams.

    Rae et al. 2021 (Gopher, arXiv:2112.11446, table A1). Up to 4 words, "top n-gram character
    fraction": all occurrences of the most frequent n-gram, of those the one with most characters.
    From 5 words on, "duplicate n-gram character fraction": all n-grams that occurred before.
    Departures: white space counts in neither number; no character counts twice, not only from 5
    words on; an n-gram that occurs once is no repetition, so a text of two words passes.
    """
    ngrams = list(zip(*(words[start:] for start in range(num_words)), strict=False))
    if num_words <= TOP_NGRAM_WORDS:
        counts = Counter(ngrams)
        top = max(counts, key=lambda n: (counts[n], sum(map(len, n))), default=())
        places = [i for i, n in enumerate(ngrams) if n == top] if counts[top] > 1 else []
    else:
        seen: set[tuple[str, ...]] = set()
        places = [i for i, n in enumerate(ngrams) if n in seen or seen.add(n)]
    repeated, covered = 0, 0
    for place in places:
        start = max(place, covered)
        covered = place + num_words
        repeated += sum(map(len, words[start:covered]))
    total = sum(map(len, words))
    return repeated / total if total else 0.0


def parse_cleaning(settings: Mapping[str, Any] | None) -> Cleaning | None:
    """Check `corpus.clean` and make it a `Cleaning`; None where no step is on.

    Raises:
        ValueError: there is no such key, or a value is impossible; the message names both.
    """
    _check_names("corpus.clean", settings or {}, STEPS)
    off = (None, False)  # compared by identity: 0 is a bound
    given = {k: v for k, v in (settings or {}).items() if not any(v is value for value in off)}
    if not given:
        return None
    checks = {
        "normalize": (lambda value: value in _FORMS, f"choose one of {', '.join(_FORMS)}"),
        "scrub_emails": (lambda value: isinstance(value, str) and value, "give a text as <email>"),
        "min_characters": (_is_count, "give a number of characters above 0"),
        "max_characters": (_is_count, "give a number of characters above 0"),
        "max_repeated_lines": (_is_share, "give a share from 0 to 1"),
        "exact_duplicates": (lambda value: value is True, "give true or false"),
    }
    for key, (is_possible, remedy) in checks.items():
        if key in given and not is_possible(given[key]):
            raise _impossible(key, given[key], remedy)
    if given.get("min_characters", 0) > given.get("max_characters", float("inf")):
        raise ValueError(
            f"corpus.clean.min_characters={given['min_characters']}, max_characters="
            f"{given['max_characters']} -> no document is both -> lower the first or raise the "
            "second"
        )
    if "max_repeated_ngrams" in given:
        given["max_repeated_ngrams"] = _parse_ngrams(given["max_repeated_ngrams"])
    if "near_duplicates" in given:
        given["near_duplicates"] = _parse_near(given["near_duplicates"])
    return Cleaning(**given)


def _parse_ngrams(value: Any) -> dict[int, float]:
    remedy = "give words of an n-gram and shares from 0 to 1, as {5: 0.15, 10: 0.1}"
    if not isinstance(value, Mapping):
        raise _impossible("max_repeated_ngrams", value, remedy)
    # Keys are texts where the settings went through JSON.
    bounds = {int(key): bound for key, bound in value.items() if str(key).isdecimal()}
    is_possible = 0 < len(bounds) == len(value)
    if not is_possible or not all(n > 0 and _is_share(s) for n, s in bounds.items()):
        raise _impossible("max_repeated_ngrams", dict(value), remedy)
    return dict(sorted(bounds.items()))


def _parse_near(value: Any) -> NearDuplicates:
    names = [part.name for part in fields(NearDuplicates)]
    if not isinstance(value, Mapping):
        raise _impossible("near_duplicates", value, f"give {', '.join(names)}")
    _check_names("corpus.clean.near_duplicates", value, names)
    if missing := [name for name in names if value.get(name) is None]:
        raise _impossible("near_duplicates", dict(value), f"give {', '.join(missing)} too")
    checks = {
        "threshold": (
            lambda share: _is_share(share) and 0 < share < 1,
            "give a similarity between 0 and 1; exact_duplicates finds those of 1",
        ),
        "num_permutations": (
            lambda count: _is_count(count) and count >= 16,
            "give at least 16; 128 is usual",
        ),
        "ngram": (_is_count, "give a number of words above 0"),
    }
    for key, (is_possible, remedy) in checks.items():
        if not is_possible(value[key]):
            raise _impossible(f"near_duplicates.{key}", value[key], remedy)
    return NearDuplicates(**value)


def _check_names(place: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
            raise ValueError(f"{place}.{key}={given[key]} -> there is no such key -> {remedy}")


def _impossible(key: str, value: Any, remedy: str) -> ValueError:
    return ValueError(f"corpus.clean.{key}={value} -> no such setting is possible -> {remedy}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
