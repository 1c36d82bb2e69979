"""Documents that resemble each other: MinHash signatures, compared where a band of them agrees.

Signatures and the division into bands are datasketch's. Its index takes 3.6 kB and 0.45 ms for each
document; here the bands are columns of integers on which documents are sorted.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.cleaning import NearDuplicates

_SCHEME = "affine32"  # of datasketch 2: named, since its default has changed before
_NGRAMS_AT_ONCE = 2**12  # whose values under all permutations fit a processor's cache
# Weights of falsely and of not compared documents. What a band proposes is compared, so it matters
# more to miss none.
_BAND_WEIGHTS = (0.1, 0.9)
_KEPT_ROWS = 2**16
SIGNATURE_DTYPE = np.dtype("<u4")


def make_signer(settings: NearDuplicates) -> Callable[[str], NDArray[np.uint32]]:
    """Make the function from a text to its signature, uint32 [permutations].

    MinHash (Broder 1997, "On the resemblance and containment of documents") of the set of n-grams
    of words, which white space separates; a text of fewer words is one n-gram.

    Raises:
        ValueError: datasketch is not installed.
    """
    minhash = _datasketch().MinHash
    permutations = minhash(settings.num_permutations, scheme=_SCHEME).permutations

    def sign(text: str) -> NDArray[np.uint32]:
        words = text.split()
        num_words = min(settings.ngram, len(words))
        ngrams = {
            " ".join(words[start : start + num_words]).encode()
            for start in range(len(words) - num_words + 1)
        }
        signature = minhash(settings.num_permutations, permutations=permutations, scheme=_SCHEME)
        distinct = list(ngrams)
        for start in range(0, len(distinct), _NGRAMS_AT_ONCE):
            signature.update_batch(distinct[start : start + _NGRAMS_AT_ONCE])
        return signature.hashvalues.astype(SIGNATURE_DTYPE)

    return sign


def find_near_duplicates(
    files: list[Path], skipped: NDArray[np.bool_], settings: NearDuplicates
) -> NDArray[np.bool_]:
    """Find the documents that resemble an earlier one which stays.

    Args:
        files: signatures, uint32 [documents, permutations], of the units in order.
        skipped: bool [all documents], those that are not compared.
        settings: from which similarity on documents count as the same.

    Returns:
        Whether the document is to go, bool [all documents].
    """
    signatures = _Signatures(files, settings.num_permutations)
    compared = np.flatnonzero(~skipped)
    buckets = _shared_buckets(signatures.band_keys(*_bands(settings))[compared])
    found = np.zeros(len(skipped), bool)
    members: dict[int, list[int]] = {}
    for row in np.flatnonzero((buckets >= 0).any(axis=1)):
        number, own = int(compared[row]), [int(b) for b in buckets[row] if b >= 0]
        earlier = sorted({other for bucket in own for other in members.get(bucket, [])})
        signature = signatures.row(number)
        found[number] = any(
            np.mean(signature == signatures.row(other)) >= settings.threshold for other in earlier
        )
        if not found[number]:
            for bucket in own:
                members.setdefault(bucket, []).append(number)
    return found


class _Signatures:
    """Signatures on disk, of which only the rows that are compared are read."""

    def __init__(self, files: list[Path], num_permutations: int) -> None:
        self._files, self._width = files, num_permutations
        row_bytes = num_permutations * SIGNATURE_DTYPE.itemsize
        counts = [file.stat().st_size // row_bytes for file in files]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self.row = lru_cache(_KEPT_ROWS)(self._row)

    def band_keys(self, num_bands: int, num_rows: int) -> NDArray[np.uint64]:
        """Hash the values of each band to a number, uint64 [documents, bands]."""
        keys = np.zeros((self._starts[-1], num_bands), np.uint64)
        for file, start in zip(self._files, self._starts, strict=False):
            values = np.fromfile(file, SIGNATURE_DTYPE).reshape(-1, self._width)
            bands = values[:, : num_bands * num_rows].reshape(-1, num_bands, num_rows)
            own = keys[start : start + len(values)]
            for column in range(num_rows):
                # Multiplication by an odd number, modulo 2^64: the golden ratio's of Knuth.
                own *= np.uint64(0x9E3779B97F4A7C15)
                own += bands[:, :, column]
        return keys

    def _row(self, number: int) -> NDArray[np.uint32]:
        unit = int(np.searchsorted(self._starts, number, side="right")) - 1
        offset = (number - int(self._starts[unit])) * self._width * SIGNATURE_DTYPE.itemsize
        return np.fromfile(self._files[unit], SIGNATURE_DTYPE, self._width, offset=offset)


def _bands(settings: NearDuplicates) -> tuple[int, int]:
    """Choose number and length of the bands as datasketch does for the threshold."""
    index = _datasketch().MinHashLSH(
        settings.threshold, settings.num_permutations, weights=_BAND_WEIGHTS
    )
    return index.b, index.r


def _shared_buckets(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Number the values that several documents have in a band; -1 where no other has it."""
    buckets = np.full(keys.shape, -1, np.int64)
    first = 0
    for band in range(keys.shape[1]):
        values, places, counts = np.unique(keys[:, band], return_inverse=True, return_counts=True)
        is_shared = counts[places] > 1
        buckets[is_shared, band] = places[is_shared] + first
        first += len(values)
    return buckets


def _datasketch() -> Any:
    try:
        import datasketch  # slow to import, and rarely needed
    except ImportError as err:
        raise ValueError(
            "corpus.clean.near_duplicates -> signatures need the package datasketch, which is "
            "missing -> pip install trainyard[data], or set it to null"
        ) from err
    return datasketch
