"""The program of the ranks of `test_decoding.py`: targets that end after as many tokens as told."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from modules.decoding import decode

STOP = 1
LENGTHS = ([2, 4], [9, 3])
"""Of the targets of each rank, without the stop token."""


class Countdown:
    """Makes targets of the lengths that the sources say, counts its calls; and is its own cache."""

    def __init__(self, target_length: int):
        self.target_length = target_length
        self.num_calls = self.length = 0

    def new_cache(self, batch: int, device: torch.device) -> Any:
        """Make an empty cache."""
        return self

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows."""
        self.left = self.left[rows]

    def __call__(self, source: Any, source_mask: Any, inputs: torch.Tensor, *, cache: Any) -> Any:
        """Logits [R, 1, V] that prefer the stop token where a target is complete."""
        if source is not None:
            self.left = source[:, 0]
        self.num_calls += 1
        self.length += 1
        logits = torch.tensor([0.0, -20.0, 0.5, 1.0]).repeat(len(self.left), 1, 1)
        logits[self.left < self.length, 0, STOP] = 20.0
        return logits


def count_calls(lengths: list[int], num_beams: int, max_new_tokens: int) -> int:
    """Decode targets of these lengths; return how often the network was called."""
    source = torch.tensor(lengths).unsqueeze(1)
    network = Countdown(target_length=20)
    targets = decode(
        network, source, torch.ones_like(source, dtype=torch.bool), start_token=0, stop_token=STOP,
        max_new_tokens=max_new_tokens, num_beams=num_beams, length_penalty=0.0, temperature=0.0,
        top_k=0, top_p=1.0, seed=0,
    )  # fmt: skip
    assert [len(target) for target in targets] == [min(n, max_new_tokens) for n in lengths]
    return network.num_calls


def main(out: Path) -> None:
    """Count calls with and without the ranks' vote."""
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    counts = {
        "greedy": count_calls(LENGTHS[rank], 1, 20),
        "bound": count_calls(LENGTHS[rank], 1, 6),
        "beams": count_calls(LENGTHS[rank], 2, 20),
    }
    dist.destroy_process_group()
    counts["alone"] = count_calls(LENGTHS[rank], 1, 20)
    (out / f"{rank}.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
