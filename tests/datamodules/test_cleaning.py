import unicodedata
from typing import Any

import pytest

from datamodules.cleaning import Cleaning, parse_cleaning, repeated_lines, repeated_ngrams


def clean(text: str, **settings: Any) -> str:
    return Cleaning(**settings).change(text)[0]


def test_normalization_is_that_of_the_form() -> None:
    text = "e\u0301 ﬁ Å"  # a combining accent, a ligature, the sign of Ångström
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert clean(text, normalize=form) == unicodedata.normalize(form, text)
    assert Cleaning(normalize="NFC").change("plain") == ("plain", (False, False))
    assert Cleaning(normalize="NFC").change(text)[1] == (True, False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to jo.doe+x@mail.example.org.", "write to <@>."),
        ("<a_b@x.co>,c-d@y-z.io;", "<<@>>,<@>;"),
        ("mailto:a@b.c?subject=1", "mailto:<@>?subject=1"),
        ("日本a@b.de日本", "日本<@>日本"),
        ("a@b.c@d.e", "<@>@d.e"),
        ("user@host and @name and x@ y and a@.b", "user@host and @name and x@ y and a@.b"),
        ("def f(x): return a @ b.T", "def f(x): return a @ b.T"),
    ],
)
def test_addresses_are_scrubbed_and_nothing_else(text: str, expected: str) -> None:
    scrubbed, (_, is_changed) = Cleaning(scrub_emails="<@>").change(text)
    assert scrubbed == expected
    assert is_changed == (text != expected)


@pytest.mark.timeout(60)  # quadratic time in a megabyte would take days
@pytest.mark.parametrize("unit", ["a", "a@", "a.", "@", "a@a.", "%"])
def test_scrubbing_ends_on_texts_that_nearly_match(unit: str) -> None:
    for text in (unit * 2**20, "x@" + unit * 2**20, unit * 2**20 + "@"):
        clean(text, scrub_emails="")


def test_replacement_is_plain_text() -> None:
    assert clean("a@b.c", scrub_emails=r"\1\g<0>") == r"\1\g<0>"


def test_repeated_lines_count_the_characters_of_later_occurrences() -> None:
    assert repeated_lines("aaaa\nbb\n  aaaa \n\n\ncc\nbb") == 6 / 14
    assert repeated_lines("") == repeated_lines("\n\n") == repeated_lines("one\ntwo") == 0


def test_repeated_ngrams_count_each_character_once() -> None:
    words = ["a", "bb", "a", "bb", "a", "bb", "ccc"]
    # Top 2-gram: (a, bb) and (bb, a) occur 3 and 2 times; the first covers 9 of 12 characters.
    assert repeated_ngrams(words, 2) == 9 / 12
    assert repeated_ngrams(words, 1) == 6 / 12  # of two equally frequent words the longer
    # From 5 words on what occurred before counts, here the words 5 to 11 of twelve.
    assert repeated_ngrams(["x", "y"] * 6, 5) == 10 / 12
    assert repeated_ngrams([*"abcde", *"abcdf"], 5) == 0
    assert repeated_ngrams([*"abcde", *"abcde"], 5) == 5 / 10
    assert repeated_ngrams(["two", "words"], 2) == repeated_ngrams([], 3) == 0


def test_first_failing_filter_is_named_and_bounds_are_inclusive() -> None:
    rules = Cleaning(min_characters=3, max_characters=9, max_repeated_lines=0.5)
    assert rules.reject("ab") == "min_characters"
    assert rules.reject("abcdefghij") == "max_characters"
    assert rules.reject("a\na\na") == "max_repeated_lines"
    assert rules.reject("abc") == rules.reject("abcdefghi") == rules.reject("a\na") is None
    ngrams = Cleaning(max_repeated_ngrams={2: 1.0, 5: 0.4})
    assert ngrams.reject("a b c d e a b c d e") == "max_repeated_ngrams"
    assert ngrams.reject("a b c d e f") is None


def test_nothing_on_is_no_cleaning() -> None:
    assert parse_cleaning(None) is None
    assert parse_cleaning({"normalize": None, "exact_duplicates": False}) is None
    strict = parse_cleaning({"max_repeated_lines": 0})  # a bound, not off
    assert strict is not None
    assert strict.settings == {"max_repeated_lines": 0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalise": "NFC"}, r"clean.normalise=NFC -> .* did you mean normalize\?"),
        ({"bloom": 1}, r"clean.bloom=1 -> .* use one of normalize, scrub_emails, "),
        ({"normalize": "nfc"}, r"clean.normalize=nfc -> .* choose one of NFC, NFD"),
        ({"scrub_emails": True}, r"clean.scrub_emails=True -> .* give a text"),
        ({"scrub_emails": ""}, r"clean.scrub_emails= -> .* give a text"),
        ({"min_characters": 0}, r"clean.min_characters=0 -> .* above 0"),
        ({"min_characters": 9, "max_characters": 8}, r"min_characters=9, max_characters=8 -> no"),
        ({"max_repeated_lines": 20}, r"clean.max_repeated_lines=20 -> .* from 0 to 1"),
        ({"max_repeated_ngrams": 0.2}, r"max_repeated_ngrams=0.2 -> .* give words of an n-gram"),
        ({"max_repeated_ngrams": {}}, r"max_repeated_ngrams={} -> "),
        ({"max_repeated_ngrams": {0: 0.1}}, r"max_repeated_ngrams={0: 0.1} -> "),
        ({"max_repeated_ngrams": {"two": 0.1}}, r"max_repeated_ngrams={'two': 0.1} -> "),
        ({"exact_duplicates": "yes"}, r"exact_duplicates=yes -> .* give true or false"),
        ({"near_duplicates": True}, r"near_duplicates=True -> .* give threshold, num_perm"),
        ({"near_duplicates": {"threshold": 0.8}}, r"give num_permutations, ngram too"),
        ({"near_duplicates": {"thresholds": 0.8}}, r"near_duplicates.thresholds.*mean threshold\?"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_cleaning(settings)


@pytest.mark.parametrize(
    ("key", "value"), [("threshold", 1.0), ("num_permutations", 8), ("ngram", 0)]
)
def test_impossible_near_duplicates_are_refused(key: str, value: float) -> None:
    settings = {"threshold": 0.8, "num_permutations": 128, "ngram": 5}
    assert parse_cleaning({"near_duplicates": settings})
    with pytest.raises(ValueError, match=rf"near_duplicates.{key}={value} -> "):
        parse_cleaning({"near_duplicates": {**settings, key: value}})
