"""Evaluate: score a checkpoint of a run on its validation or test data."""

import json
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from launch import runtime
from launch.run_directory import RunDirectory, find_run


def evaluate_run(config: DictConfig) -> None:
    """Score a checkpoint, print the metrics, and keep them in `evaluations/` of the run.

    Beside them, of a module that generates, a table of what it made (`.jsonl`), and in them how
    scores were computed.
    """
    run = find_run(config.run, config.runs_dir)
    if config.split not in ("val", "test"):
        raise ValueError(f"split={config.split} -> unknown -> use val or test")
    name, module = load_module(run, config.checkpoint, config.accelerator)
    metrics = evaluate(run.config, module, config.split, config.accelerator)
    directory = run.path / "evaluations"
    directory.mkdir(exist_ok=True)
    path = directory / f"{config.split}-{name}.json"
    signatures = getattr(module, "signatures", {})
    report = {"checkpoint": name, **metrics} | ({"signatures": signatures} if signatures else {})
    path.write_text(json.dumps(report, indent=1) + "\n")
    for key, value in metrics.items():
        print(f"{key:24} {value:.4f}")
    for key, signature in signatures.items():
        print(f"{key:24} {signature}")
    print(f"checkpoint {name} of run {run.path.name}; written to {path}")
    if rows := getattr(module, "rows", []):
        table = path.with_suffix(".jsonl")
        table.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{len(rows)} rows of source, target and prediction in {table}")


def load_module(run: RunDirectory, which: str, accelerator: str) -> tuple[str, Any]:
    """Build a run's module with the weights of a verified checkpoint, for one device.

    Returns:
        The checkpoint's name and the LightningModule, on the CPU in evaluation mode.

    Raises:
        ValueError: There is no such checkpoint, it is damaged, or the device cannot run it.
    """
    runtime.quiet_libraries()
    from trainers.checkpoint import load_weights
    from trainers.compat import check

    check(runtime.plain(on_one_device(run.config, accelerator)), world_size=1)
    run.verify_checkpoint(str(which))
    checkpoint = run.find_checkpoint(str(which))
    if checkpoint is None:
        raise ValueError(f"run={run.path.name} -> it has saved nothing yet -> train it first")
    module = instantiate(run.config.module, _convert_="all")
    module.load_state_dict(load_weights(checkpoint), assign=True)
    return checkpoint.name, module.eval()


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
