"""What is known of a prepared corpus, as it lies beside its data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

TOKENIZER_FILE, FACTS_FILE = "tokenizer.json", "dataset.json"


@dataclass(frozen=True)
class PreparedData:
    """Prepared data and what a run needs to know of it.

    Attributes:
        path: folder with `tokenizer.json`, `dataset.json` and a data set per split.
        facts: `path`, `digest`, `vocab_size`, `end_token` (number, or None for a corpus of one
            document), and by split `bytes_per_token`, `documents`, `tokens`, `bytes`, `shards`. Of
            a cleaned corpus also `changed` and `removed`: step -> `documents` and `bytes`.
    """

    path: Path
    facts: dict[str, Any]

    def print_summary(self) -> None:
        """Print what each split holds, the size of the vocabulary, and where the data lies."""
        table = Table("split", "documents", "tokens", "bytes a token", "shards")
        for split, num_shards in self.facts["shards"].items():
            table.add_row(
                split,
                f"{self.facts['documents'][split]:,}",
                f"{self.facts['tokens'][split]:,}",
                f"{self.facts['bytes_per_token'][split]:.2f}",
                str(num_shards),
            )
        console = Console()
        console.print(table)
        if "removed" in self.facts:
            console.print(self._cleaning_table())
        console.print(f"vocabulary: {self.facts['vocab_size']:,} tokens")
        console.print(f"path: {self.path}", soft_wrap=True, highlight=False)

    def _cleaning_table(self) -> Table:
        table = Table("cleaning", "", "documents", "bytes")
        for verb in ("changed", "removed"):
            for step, counts in self.facts[verb].items():
                table.add_row(step, verb, f"{counts['documents']:,}", f"{counts['bytes']:,}")
        return table
