"""The other side of `benchmarks.startup`: a plain training script with Lightning.

    python benchmarks/startup_plain.py TOKENS NOTE VOCABULARY LAYERS HEADS WIDTH LENGTH BATCH
    torchrun --nproc-per-node=2 benchmarks/startup_plain.py ... the same

Its settings are arguments, its tokens an array on the disk, its network one of torch's layers. It
imports what the training of Trainyard stands on: Lightning, torch, numpy and tokenizers.
"""

import os
import sys

import lightning.pytorch as pl
import numpy as np
import tokenizers  # noqa: F401 - it would decode samples
import torch
from first_step import NoteFirstStep
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """Rows of a tokenized text, and what follows each of their tokens."""

    def __init__(self, tokens: np.ndarray, length: int):
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        """Rows of the text."""
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        """One of them [T], and its targets [T]."""
        begin = row * self.length
        crop = torch.from_numpy(self.tokens[begin : begin + self.length + 1])
        return crop[:-1], crop[1:]


class Decoder(pl.LightningModule):
    """A decoder of torch's own layers."""

    def __init__(self, vocabulary: int, layers: int, heads: int, width: int, length: int):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        self.mask = nn.Transformer.generate_square_subsequent_mask(length)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy in nats."""
        inputs, targets = batch
        hidden = self.tokens(inputs) + self.places.weight[: inputs.shape[1]]
        hidden = self.layers(hidden, mask=self.mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    """Train as one rank until the first step is taken."""
    tokens, note, *numbers = sys.argv[1:]
    vocabulary, layers, heads, width, length, batch = map(int, numbers)
    num_ranks = int(os.environ.get("WORLD_SIZE", 1))
    pl.seed_everything(1, verbose=False)
    rows = Crops(np.load(tokens, mmap_mode="r+"), length)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=num_ranks,
        strategy="ddp" if num_ranks > 1 else "auto",
        max_steps=100,
        logger=False,
        enable_checkpointing=False,
        callbacks=[NoteFirstStep(note)],
    )
    loader = DataLoader(rows, batch // num_ranks, shuffle=True)
    trainer.fit(Decoder(vocabulary, layers, heads, width, length), loader)


if __name__ == "__main__":
    main()
