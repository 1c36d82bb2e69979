"""Benchmarks of the stream run, on next to nothing."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from safetensors.torch import load_file

from benchmarks import (
    export_memory,
    gan_throughput,
    picture_waits,
    seq2seq_throughput,
    shuffle_quality,
    stream_tokens,
)
from benchmarks.gan_peers import ExampleSide, OurRoundSide, PlainSide
from benchmarks.stream_images import NUM_SHARDS, image_sides, write_images
from benchmarks.stream_tokens import token_sides, write_tokens
from benchmarks.turns import Side, take_turns
from launch import runtime
from launch.export import export_run
from modules.gan_networks import build_networks


def but_stock(sides: dict[str, Side]) -> dict[str, Side]:
    """Leave out webdataset, which leaves files open where it is not read to the end."""
    return {name: side for name, side in sides.items() if "webdataset" not in name}


def test_readers_of_images_give_every_byte_once(tmp_path: Path) -> None:
    num_images = 4 * NUM_SHARDS
    index, digest = write_images(tmp_path, num_images, 1000)
    sides = image_sides(index, tmp_path / "images.bin", 1000, 4)
    for name, turns in take_turns(but_stock(sides), num_images // 4, rounds=2).items():
        assert (turns[-1].epoch_samples, turns[-1].epoch_digest) == (num_images, digest), name


def test_readers_of_tokens_give_as_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_tokens, "CHUNK_TOKENS", 2**12)
    index = write_tokens(tmp_path, 2)
    sides = token_sides(index, tmp_path / "tokens.u16", 64, 8)
    turns = take_turns(but_stock(sides), 20, rounds=1)
    assert {turn.samples for (turn,) in turns.values()} >= {20 * 8}


def test_shuffle_quality_tells_good_orders_from_bad() -> None:
    mixed = np.random.default_rng(0).permutation(100_000)
    assert 0.8 < shuffle_quality.ratio(mixed, 64) < 1.2
    assert shuffle_quality.ratio(np.arange(100_000), 64) > 5
    order = shuffle_quality.ours(100_000, 64, 1024)
    assert np.array_equal(np.sort(order), np.arange(100_000))


def test_both_sides_of_the_throughput_benchmark_are_one_model() -> None:
    config = seq2seq_throughput.configure("fp32", num_steps=2)
    ours = instantiate(config.module, _convert_="all").network
    theirs = seq2seq_throughput.make_t5()
    sizes = [sorted(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    assert sizes[0] == sizes[1]
    assert instantiate(config.datamodule, _convert_="all", _partial_=True)


def test_sides_of_the_gan_benchmark_train_the_same_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainers.metrics.plot_losses", lambda *args, **options: None)
    options = {"preset": "dcgan_tiny", "precision": "fp32", "accelerator": "cpu"}
    taken = gan_throughput.compete(tmp_path, **options, turns=2, rounds=1)
    assert set(taken) == {gan_throughput.OURS, gan_throughput.FAKES_TWICE, *gan_throughput.PEERS}
    assert {turns.shape for turns in taken.values()} == {(2, 2)}
    assert all((turns > 0).all() for turns in taken.values())


def test_lightnings_example_and_its_plain_loop_make_the_same_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime.quiet_libraries()
    noise = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "randn", lambda *size, **options: noise)
    images = torch.linspace(-1, 1, 28).expand(8, 1, 28, 28)  # all alike: any order is the same
    trained = {}
    for side in (ExampleSide, PlainSide, OurRoundSide):
        independent = {"norm": "none", "dropout": 0.0}
        networks = build_networks(
            "dcgan_tiny", independent, resolution=28, channels=1, num_classes=None, seed=1
        )
        made = side(networks, images, batch=4, accelerator="cpu", precision="fp32")
        made.turn(2)
        if side is not ExampleSide:
            made.turn(1)  # the first of the example's turn is not timed
        trained[side] = torch.cat([p.detach().flatten() for n in networks for p in n.parameters()])
    torch.testing.assert_close(trained[PlainSide], trained[ExampleSide], rtol=0, atol=1e-6)
    assert (trained[OurRoundSide] - trained[ExampleSide]).abs().max() > 1e-5  # another round


def test_rounds_are_timed_with_pictures_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainers.metrics.plot_losses", lambda *args, **options: None)
    monkeypatch.setattr(picture_waits, "EVERY_ROUNDS", 1)
    options = {"preset": "dcgan_tiny", "accelerator": "cpu", "stretches": 4, "rounds": 2}
    taken = picture_waits.measure(tmp_path, **options)
    for kind, values in taken.items():
        assert len(values["rounds"]) == len(values["in callback"]) == 4, kind
    drawn = [path.name for path in (tmp_path / "runs").rglob("images-*")]
    steps = sorted(int(name.removeprefix("images-")) // gan_throughput.BATCH for name in drawn)
    assert steps == [2, 3, 6, 7, 8]  # the last is the run's end


def test_checkpoint_of_the_export_benchmark_is_exported_as_it_was_made_up(
    tmp_path: Path, compose: Callable[..., DictConfig]
) -> None:
    run = export_memory.write_run(tmp_path, width=8, num_layers=1, ranks=3)
    export_run(compose("export", [f"run={run.path}"]))
    exported = load_file(run.path / "exports" / "step-00000001" / "model.safetensors")
    assert exported["embedding.weight"].shape == (export_memory.VOCABULARY, 8)
    for name, value in exported.items():
        places = export_memory.stretches(value.numel(), 3)
        made_up = [export_memory.values_of(f"network.{name}", *place) for place in places]
        assert torch.equal(value.flatten(), torch.cat(made_up)), name
