"""The program of the ranks of `test_gan_sync.py`: batch norm over ranks, alone and in runs."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from launch.run_directory import RunDirectory
from launch.train import fit
from modules.gan_norms import BatchNorm, sync_statistics

SIZES, CLASSES = {"features": (8, 3), "images": (8, 3, 5, 5)}, (None, 4)
LABELS = torch.tensor([3, 0, 3, 1, 2, 2, 0, 1])


def made_up(*size: int) -> torch.Tensor:
    """Numbers in fp64 that are anything but alike in the two halves of a batch."""
    values = torch.randn(*size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return values * torch.linspace(1, 3, size[0]).view(-1, *(1 for _ in size[1:])) + values.mean()


def layer_of(num_classes: int | None) -> BatchNorm:
    """A batch norm of three channels."""
    layer = BatchNorm(
        3, num_classes=num_classes, momentum=0.1, epsilon=1e-3, is_normalising=True
    ).double()
    with torch.no_grad():
        layer.weight.copy_(made_up(*layer.weight.shape))
        layer.bias.copy_(made_up(*layer.bias.shape) / 2)
    return layer


def differentiate(layer: BatchNorm, x: torch.Tensor, labels: Any) -> dict[str, torch.Tensor]:
    """Outputs, gradients, and the gradients of a penalty on a gradient, of a share of a batch."""
    x = x.clone().requires_grad_()
    out = layer(x, labels)
    inputs = (x, layer.weight, layer.bias)
    gradients = torch.autograd.grad(out.pow(3).sum(), inputs, create_graph=True)
    second = torch.autograd.grad(gradients[0].square().sum(), inputs[:2])
    found = {"out": out, "x": gradients[0], "weight": gradients[1], "bias": gradients[2]}
    found |= {"second x": second[0], "second weight": second[1]}
    found |= {"mean": layer.running_mean, "variance": layer.running_var}
    return {name: value.detach() for name, value in found.items()}


def normalise(folder: Path, device: str) -> None:
    """Leave what the layer gives in `<rank>.pt`."""
    rank, found = int(os.environ["RANK"]), {}
    if num_devices := torch.cuda.device_count() if device == "cuda" else 0:
        torch.cuda.set_device(rank % num_devices)
    dist.init_process_group("nccl" if num_devices > 1 else "gloo")  # which can share a device
    mine = slice(4 * rank, 4 * rank + 4)
    for name, size in SIZES.items():
        for num_classes in CLASSES:
            for is_synced in (True, False):
                sync_statistics(layer := layer_of(num_classes).to(device), is_synced)
                labels = None if num_classes is None else LABELS[mine].to(device)
                key, x = (name, num_classes, is_synced), made_up(*size)[mine].to(device)
                found[key] = differentiate(layer, x, labels)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def train(folder: Path) -> None:
    """Train the runs `together` and `apart`."""
    with mock.patch("trainers.metrics.plot_losses"), contextlib.redirect_stdout(None):
        for name in ("together", "apart"):
            run = RunDirectory(folder / "runs" / name)
            fit(run, run.config)


if __name__ == "__main__":
    normalise(Path(sys.argv[1]), sys.argv[2])
    if sys.argv[2] == "cpu":
        train(Path(sys.argv[1]))
