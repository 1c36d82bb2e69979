"""What is known of a prepared corpus, as it lies beside its data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

TOKENIZER_FILE, FACTS_FILE = "tokenizer.json", "dataset.json"
PAIRS = "pairs"
"""`kind` of a corpus of pairs."""
TARGET_TOKENIZER_FILE, TEXTS_FILE = "target_tokenizer.json", "texts.jsonl"


@dataclass(frozen=True)
class PreparedData:
    """Prepared data and what a run needs to know of it.

    Attributes:
        path: folder with `tokenizer.json`, `dataset.json` and a data set per split.
        facts: `path`, `digest`, `vocab_size`, `end_token` (number, or None for a corpus of one
            document), `sentinels` (numbers of `<extra_id_0>`, ...; data of earlier versions lacks
            them), and by split `bytes_per_token`, `documents`, `tokens`, `bytes`, `shards`. Of
            a cleaned corpus also `changed` and `removed`: step -> `documents` and `bytes`. Of
            pairs `kind` is `pairs`, the vocabulary is that of the sources, `bytes_per_token` that
            of the targets, and there are `target_vocab_size`, `target_end_token`, `start_token`,
            `is_joint`, `texts` (digests of the `texts.jsonl` of `val` and `test`), and by split
            `pairs`, `source_tokens`, `target_tokens`, `longest_source`, `longest_target`.
    """

    path: Path
    facts: dict[str, Any]

    def print_summary(self) -> None:
        """Print what each split holds, the sizes of vocabularies, and where the data lies."""
        is_pairs = self.facts.get("kind") == PAIRS
        counts = ("documents", "tokens")
        if is_pairs:
            counts = ("pairs", "source_tokens", "target_tokens")
        headers = [name.replace("_", " ") for name in counts]
        table = Table("split", *headers, "bytes a token", "shards")
        for split, num_shards in self.facts["shards"].items():
            table.add_row(
                split,
                *(f"{self.facts[name][split]:,}" for name in counts),
                f"{self.facts['bytes_per_token'][split]:.2f}",
                str(num_shards),
            )
        console = Console()
        console.print(table)
        if "removed" in self.facts:
            console.print(self._cleaning_table())
        vocabulary = f"{self.facts['vocab_size']:,} tokens"
        if is_pairs and self.facts["is_joint"]:
            vocabulary += " of sources and targets"
        elif is_pairs:
            vocabulary += f" of sources, {self.facts['target_vocab_size']:,} of targets"
        console.print(f"vocabulary: {vocabulary}")
        console.print(f"path: {self.path}", soft_wrap=True, highlight=False)

    def _cleaning_table(self) -> Table:
        noun = "pairs" if self.facts.get("kind") == PAIRS else "documents"
        table = Table("cleaning", "", noun, "bytes")
        for verb in ("changed", "removed"):
            for step, counts in self.facts[verb].items():
                table.add_row(step, verb, f"{counts['documents']:,}", f"{counts['bytes']:,}")
        return table
