"""How two checkpoints differ: what was said of them, and every tensor, one stretch at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from trainers.checkpoint import StoredCheckpoint
from trainers.safetensors_file import NAMES
from trainers.stored_tensors import Stored
from trainers.tensor_pieces import OPTIMIZER

STRETCH = 2**20
"""Elements of a tensor that are compared at a time."""
FACTS = ("run", "step", "format", "strategy", "world_size", "data_digest")


@dataclass(frozen=True)
class Difference:
    """Of a tensor that both have: the largest |a - b|, and ||a - b|| / ||a||, in fp64."""

    name: str
    dtypes: str
    absolute: float
    relative: float


@dataclass
class Comparison:
    """Of all tensors of two checkpoints.

    Attributes:
        only: Names that only the first has, and only the second.
        shapes: What has other shapes, a line each.
        differences: Of what differs in values or dtype, the largest relative ones first.
        num_identical: Tensors with the same bits.
    """

    only: tuple[list[str], list[str]]
    shapes: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    num_identical: int = 0


def compare_tensors(
    first: Mapping[str, Stored], second: Mapping[str, Stored], advance: Callable[[int], Any]
) -> Comparison:
    """Compare tensors by name; `advance` is told how many bytes more of both were read."""
    both = [name for name in first if name in second]
    found = Comparison(
        ([name for name in first if name not in second], [n for n in second if n not in first])
    )
    for name in both:
        a, b = first[name], second[name]
        if a.shape != b.shape:
            found.shapes.append(f"{name}: {list(a.shape)} -> {list(b.shape)}")
            advance(a.nbytes + b.nbytes)
        elif (difference := _difference(name, a, b, advance)) is None:
            found.num_identical += 1
        else:
            found.differences.append(difference)
    # What is no number comes first.
    found.differences.sort(key=lambda each: (each.relative == each.relative, -each.relative))
    return found


def _difference(
    name: str, a: Stored, b: Stored, advance: Callable[[int], Any]
) -> Difference | None:
    is_identical, largest = a.dtype == b.dtype, torch.zeros((), dtype=torch.float64)
    squares = torch.zeros(2, dtype=torch.float64)  # of a - b, and of a
    for start in range(0, a.shape.numel(), STRETCH):
        stop = min(start + STRETCH, a.shape.numel())
        x, y = a.run(start, stop), b.run(start, stop)
        advance(x.nbytes + y.nbytes)
        if a.dtype == b.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
            squares[1] += x.double().square().sum()
            continue
        is_identical = False
        x, y = x.double(), y.double()
        largest = torch.maximum(largest, (x - y).abs().max())
        squares += torch.stack([(x - y).square().sum(), x.square().sum()])
    if is_identical:
        return None
    norms = squares.sqrt()
    relative = float(norms[0] / norms[1]) if norms[0] != 0 else 0.0
    dtypes = " -> ".join(dict.fromkeys((NAMES[a.dtype], NAMES[b.dtype])))
    return Difference(name, dtypes, float(largest), relative)


def all_tensors(checkpoint: StoredCheckpoint) -> dict[str, Stored]:
    """Every tensor by its full name; of format 2 the optimizer's, too."""
    tensors = dict(checkpoint.tensors)
    for index, saved in enumerate(checkpoint.optimizer_states):
        for parameter, values in saved["state"].items():
            for key, value in values.items():
                if isinstance(value, Stored):
                    tensors[f"{OPTIMIZER}.{index}/{key}/{parameter}"] = value
    return tensors


def compare_facts(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, str]:
    """What two manifests say otherwise, configurations left out: fact -> `a -> b`."""
    a, b = ({key: manifest.get(key) for key in FACTS} for manifest in (first, second))
    for facts, manifest in ((a, first), (b, second)):
        facts |= {f"version of {name}": v for name, v in manifest["versions"].items()}
    return {key: f"{a.get(key)} -> {b.get(key)}" for key in a | b if a.get(key) != b.get(key)}
