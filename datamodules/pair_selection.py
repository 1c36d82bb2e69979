"""Which pairs of a corpus stay, split by split."""

from collections.abc import Mapping
from typing import Any

from datamodules.pair_cleaning import Pair
from datamodules.pair_sources import place_of
from datamodules.selection import Unit, find_removed, select_documents


def select_pairs(
    units: Mapping[str, list[Unit[Pair]]],
    *,
    drop_empty: bool,
    num_processes: int | None,
    title: str,
) -> dict[str, dict[str, dict[str, int]]]:
    """Decide which pairs stay, with the cleaning of each split's units.

    Returns:
        `changed` and `removed` as `datamodules.selection.select_documents`, over all splits. Bytes
        are those of both texts and one between them.

    Raises:
        ValueError: none of a split stays, or a text is empty and such pairs are not to be dropped.
    """
    total: dict[str, Any] = {"changed": {}, "removed": {}}
    for split, group in units.items():
        cleaning = group[0].cleaning
        assert cleaning is not None
        counts = select_documents(group, cleaning, num_processes, f"{title}, {split}")
        num_empty = counts["removed"]["empty"]["documents"]
        if num_empty and not drop_empty:
            raise ValueError(
                f"corpus.{split}: {place_of(*find_removed(group, 'empty'))} is empty, the first of "
                f"{num_empty:,} pairs with an empty text -> there is nothing to learn from it -> "
                "correct the files, or leave such pairs out: corpus.empty=drop"
            )
        for verb, steps in counts.items():
            for step, found in steps.items():
                sums = total[verb].setdefault(step, dict.fromkeys(found, 0))
                sums |= {key: sums[key] + value for key, value in found.items()}
    return total
