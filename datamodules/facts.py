"""What is known of a prepared corpus, as it lies beside its data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

TOKENIZER_FILE, FACTS_FILE = "tokenizer.json", "dataset.json"
TEXT, PAIRS, IMAGES = "text", "pairs", "images"
"""`kind` of a corpus; one of text says none."""
TARGET_TOKENIZER_FILE, TEXTS_FILE = "target_tokenizer.json", "texts.jsonl"


@dataclass(frozen=True)
class PreparedData:
    """Prepared data and what a run needs to know of it.

    Attributes:
        path: folder with `dataset.json`, a data set per split, and of texts `tokenizer.json`.
        facts: `path`, `digest`, `vocab_size`, `end_token` (number, or None for a corpus of one
            document), `sentinels` (numbers of `<extra_id_0>`, ...; data of earlier versions lacks
            them), and by split `bytes_per_token`, `documents`, `tokens`, `bytes`, `shards`. Of
            a cleaned corpus also `changed` and `removed`: step -> `documents` and `bytes`. Of
            pairs `kind` is `pairs`, the vocabulary is that of the sources, `bytes_per_token` that
            of the targets, and there are `target_vocab_size`, `target_end_token`, `start_token`,
            `is_joint`, `texts` (digests of the `texts.jsonl` of `val` and `test`), and by split
            `pairs`, `source_tokens`, `target_tokens`, `longest_source`, `longest_target`. Of images
            `kind` is `images`, and there are `path`, `digest`, `num_classes` and `classes` (names;
            None both, where there are no labels), `channels`, `resolution` (`min_height`,
            `max_height`, `min_width`, `max_width`), `bad_images` (dropped ones), and by split
            `images`, `class_counts` (a list, or None) and `shards`.
    """

    path: Path
    facts: dict[str, Any]

    def print_summary(self) -> None:
        """Print what each split holds, the sizes of vocabularies, and where the data lies."""
        if self.kind == IMAGES:
            self._print_images()
        else:
            self._print_texts()
        Console().print(f"path: {self.path}", soft_wrap=True, highlight=False)

    @property
    def kind(self) -> str:
        """What the data is: `text`, `pairs` or `images`."""
        return self.facts.get("kind", TEXT)

    def _print_images(self) -> None:
        table = Table("split", "images", "shards")
        for split, num_shards in self.facts["shards"].items():
            table.add_row(split, f"{self.facts['images'][split]:,}", str(num_shards))
        console, size = Console(), self.facts["resolution"]
        console.print(table)
        sides = [(size[f"min_{side}"], size[f"max_{side}"]) for side in ("height", "width")]
        shown = [f"{low}" if low == high else f"{low} to {high}" for low, high in sides]
        console.print(f"images: {' x '.join(shown)} pixels, channels: {self.facts['channels']}")
        if counts := self.facts["class_counts"]["train"]:
            numbers = f"{min(counts):,} to {max(counts):,} images each in train"
            console.print(f"classes: {len(counts):,}, {numbers}")
        if num_bad := self.facts["bad_images"]:
            console.print(f"dropped: {num_bad:,} that cannot be read")

    def _print_texts(self) -> None:
        is_pairs = self.kind == PAIRS
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

    def _cleaning_table(self) -> Table:
        noun = "pairs" if self.kind == PAIRS else "documents"
        table = Table("cleaning", "", noun, "bytes")
        for verb in ("changed", "removed"):
            for step, counts in self.facts[verb].items():
                table.add_row(step, verb, f"{counts['documents']:,}", f"{counts['bytes']:,}")
        return table
