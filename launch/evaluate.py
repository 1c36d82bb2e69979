"""Evaluate: score a checkpoint of a run on its validation or test data."""

import json
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from launch import runtime
from launch.run_directory import RunDirectory
from launch.run_home import find_run

SEARCH = ("num_beams", "length_penalty")


def evaluate_run(config: DictConfig) -> None:
    """Score a checkpoint, print the metrics, and keep them in `evaluations/` of the run.

    Of a module that generates, how its scores were computed is in them, and a table of the texts
    that it made (`.jsonl`) beside them.
    """
    run = find_run(config.run, config, str(config.checkpoint))
    if config.split not in ("val", "test"):
        raise ValueError(f"split={config.split} -> unknown -> use val or test")
    name, module = load_module(run, config.checkpoint, config.accelerator)
    search = {key: config[key] for key in SEARCH if config[key] is not None}
    if search:
        set_search(module, search)
    metrics = evaluate(run.config, module, config.split, config.accelerator)
    directory = run.path / "evaluations"
    directory.mkdir(exist_ok=True)
    words = [config.split, name, *(f"{key}={value}" for key, value in search.items())]
    path = directory / f"{'-'.join(words)}.json"
    report: dict[str, Any] = {"checkpoint": name, **search, **metrics}
    generated = getattr(module, "generated", None)
    if generated:
        report["signatures"] = generated.signatures
    path.write_text(json.dumps(report, indent=1) + "\n")
    for key, value in metrics.items():
        print(f"{key:24} {value:.4f}")
    print(f"checkpoint {name} of run {run.path.name}; written to {path}")
    if generated:
        print_generated(generated, path.with_suffix(".jsonl"))


def set_search(module: Any, search: dict[str, Any]) -> None:
    """Let a module search for its answers otherwise than its run does.

    Raises:
        ValueError: It generates none in an evaluation.
    """
    if not hasattr(module, "generation"):
        given = " ".join(f"{key}={value}" for key, value in search.items())
        raise ValueError(
            f"{given} -> {type(module).__name__} generates no answers to score -> leave it out"
        )
    module.generation |= search


def print_generated(generated: Any, path: Path) -> None:
    """Say how what was generated was scored; of texts, write all to `path`."""
    for key, signature in generated.signatures.items():
        print(f"{key:24} {signature}")
    if not generated.rows:
        return
    rows = (json.dumps(row, ensure_ascii=False) + "\n" for row in generated.rows)
    path.write_text("".join(rows))
    print(f"{len(generated.rows)} rows of source, target and prediction in {path}")


def load_module(run: RunDirectory, which: str, accelerator: str) -> tuple[str, Any]:
    """Build a run's module with the weights of a verified checkpoint, for one device.

    Returns:
        The checkpoint's name and the LightningModule, on the CPU in evaluation mode.

    Raises:
        ValueError: There is no such checkpoint, it is damaged, or the device cannot run it.
    """
    runtime.quiet_libraries()
    from trainers.compat import check

    check(runtime.plain(on_one_device(run.config, accelerator)), world_size=1)
    checkpoint, module = load_checkpoint(run, which)
    return checkpoint.name, module.eval()


def load_checkpoint(run: RunDirectory, which: str) -> tuple[Path, Any]:
    """Build a run's module with the weights of a verified checkpoint, on the CPU.

    Returns:
        The checkpoint's directory and the LightningModule.

    Raises:
        ValueError: There is no such checkpoint, or it is damaged.
    """
    from trainers.checkpoint import load_weights

    checkpoint = find_verified(run, which)
    module = instantiate(run.config.module, _convert_="all")
    module.load_state_dict(load_weights(checkpoint), assign=True)
    return checkpoint, module


def find_verified(run: RunDirectory, which: str) -> Path:
    """Find a checkpoint of a run, and compare its bytes with what was saved.

    Raises:
        ValueError: There is no such checkpoint, or it is damaged.
    """
    run.verify_checkpoint(which)
    checkpoint = run.find_checkpoint(which)
    if checkpoint is None:
        raise ValueError(f"run={run.path.name} -> it has saved nothing yet -> train it first")
    return checkpoint


def on_one_device(config: DictConfig, accelerator: str) -> DictConfig:
    """A run's configuration as it is for scoring or generating."""
    config = config.copy()
    config.strategy = {"name": "single"}
    config.trainer.accelerator, config.trainer.devices = accelerator, 1
    config.cluster.nodes = 1
    return config


def evaluate(config: DictConfig, module: Any, split: str, accelerator: str) -> dict[str, float]:
    """Run `validation_step` or `test_step` over a split on one device; give what they log."""
    import lightning

    from trainers.build import resolve_accelerator
    from trainers.strategies.precision import Autocast

    refuse_other_data(config)
    accelerator = resolve_accelerator(accelerator)
    trainer = lightning.Trainer(
        accelerator=accelerator,
        devices=1,
        plugins=[Autocast(config.precision, accelerator)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=True,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    datamodule = instantiate(config.datamodule, _convert_="all")
    score = trainer.validate if split == "val" else trainer.test
    return dict(score(module, datamodule=datamodule, verbose=False)[0])


def refuse_other_data(config: DictConfig) -> None:
    """Compare the corpus, prepared anew where its data is gone, with what the run was trained on.

    Raises:
        ValueError: It has changed.
    """
    if "_target_" not in config.corpus:
        return
    digest = instantiate(config.corpus).prepare(config.data_dir).facts["digest"]
    if digest != config.data.digest:
        raise ValueError(
            f"run={config.run.name} -> its corpus has changed (data {digest}, trained on "
            f"{config.data.digest}) -> restore {config.corpus.get('path') or 'its files'}, "
            f"or run this from the folder it was trained in"
        )


main = runtime.verb("evaluate")(evaluate_run)

if __name__ == "__main__":
    main()
