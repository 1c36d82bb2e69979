import random
import sys
from pathlib import Path

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH

from datamodules.cleaning import NearDuplicates
from datamodules.near_duplicates import find_near_duplicates, make_signer

SETTINGS = NearDuplicates(threshold=0.7, num_permutations=128, ngram=3)


def ngrams(text: str) -> set[str]:
    words = text.split()
    return {" ".join(words[i : i + 3]) for i in range(len(words) - 2)} or {" ".join(words)}


def jaccard(one: str, other: str) -> float:
    first, second = ngrams(one), ngrams(other)
    return len(first & second) / len(first | second)


def make_texts(num_changed: list[int]) -> list[str]:
    """Texts of 200 words in families: copies of a text with some words changed."""
    rng = random.Random(0)
    texts = []
    for _ in range(12):
        words = [f"w{rng.randrange(10_000)}" for _ in range(200)]
        for count in num_changed:
            copy = list(words)
            for place in rng.sample(range(200), count):
                copy[place] = f"x{rng.randrange(10_000)}"
            texts.append(" ".join(copy))
    rng.shuffle(texts)
    return [*texts, "two words", "", "two  words\n"]


def find(texts: list[str], folder: Path, num_files: int, skipped: set[int]) -> list[bool]:
    sign = make_signer(SETTINGS)
    files = []
    for part in np.array_split(np.arange(len(texts)), num_files):
        files.append(folder / f"{num_files}-{len(files)}")
        files[-1].write_bytes(b"".join(sign(texts[number]).tobytes() for number in part))
    mask = np.array([number in skipped for number in range(len(texts))])
    return find_near_duplicates(files, mask, SETTINGS).tolist()


def test_near_duplicates_are_those_of_exact_similarity(tmp_path: Path) -> None:
    texts = make_texts([0, 2, 4, 40, 50])
    similar = [[jaccard(one, other) for other in texts] for one in texts]
    # None is so close to the threshold that the estimate could fall on its other side.
    assert not [s for row in similar for s in row if abs(s - SETTINGS.threshold) < 0.12]
    expected: list[bool] = []
    for row in similar:
        stays = [j for j, is_removed in enumerate(expected) if not is_removed]
        expected.append(any(row[j] >= SETTINGS.threshold for j in stays))
    assert 20 < sum(expected) < len(texts) - 20
    assert find(texts, tmp_path, 1, set()) == expected
    assert find(texts, tmp_path, 5, set()) == expected


def test_near_duplicates_are_those_of_datasketch(tmp_path: Path) -> None:
    texts = make_texts([0, 3, 6, 9, 12, 15])  # similarities on both sides of the threshold
    index = MinHashLSH(SETTINGS.threshold, SETTINGS.num_permutations, weights=(0.1, 0.9))
    kept: dict[int, MinHash] = {}
    expected = []
    for number, text in enumerate(texts):
        signature = MinHash(SETTINGS.num_permutations, scheme="affine32")
        signature.update_batch([ngram.encode() for ngram in ngrams(text)])
        near = [kept[other].jaccard(signature) for other in index.query(signature)]
        expected.append(max(near, default=0) >= SETTINGS.threshold)
        if not expected[-1]:
            kept[number] = signature
            index.insert(number, signature)
    assert 20 < sum(expected) < len(texts) - 20
    assert find(texts, tmp_path, 3, set()) == expected


def test_skipped_documents_neither_go_nor_stand_for_others(tmp_path: Path) -> None:
    texts = ["a b c d e f", "a b c d e f", "a b c d e f"]
    assert find(texts, tmp_path, 1, set()) == [False, True, True]
    assert find(texts, tmp_path, 2, {0}) == [False, False, True]


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ValueError, match=r"datasketch, which is missing -> pip install"):
        make_signer(SETTINGS)
