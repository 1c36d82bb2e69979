"""Train: compose, check, build, fit. The same command again continues, or says it is done."""

import os
from dataclasses import asdict
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from launch import ranks, runtime
from launch.initial_weights import load_initial_weights
from launch.run_directory import RunDirectory
from launch.summary import print_summary, summarize


def train(config: DictConfig) -> int:
    """Train the run that the configuration names, or continue it."""
    runtime.refuse_unknown_keys(config, "train")
    run = RunDirectory(Path(config.runs_dir, str(config.run.name)))
    num_ranks = runtime.world_size(config)
    complete(config, num_ranks)
    if os.environ.get("RANK", "0") != "0":  # of torchrun; SameStart compares it with rank 0
        return runtime.DONE if run.is_done(config) else fit(run, config)
    with run.lock(), run.noting_failed_start():
        run.compare(config)
        run.go_back_to(str(config.checkpoint), config.resume.verify)
        if run.is_done(config):
            print_summary(run)
            return runtime.DONE
        run.verify_checkpoint("last", config.resume.verify)
        run.continuation(config)  # refuses what cannot be carried over
        run.accept(config)
        if num_ranks > 1 and not runtime.is_rank():
            return ranks.start(run, num_ranks)
        return fit(run, config)


def complete(config: DictConfig, num_ranks: int) -> None:
    """Check it, prepare its data, fill in `plan` and `data`; on no device, on all ranks at once."""
    from trainers.batch_plan import plan_run
    from trainers.compat import check
    from trainers.limits import resolve_precision

    check(config, num_ranks)
    config.precision = resolve_precision(config)  # written down: another machine may choose another
    config.plan = asdict(plan_run(config, world_size=num_ranks))
    if has_corpus := "_target_" in config.corpus:
        config.data = instantiate(config.corpus).prepare(config.data_dir).facts
    datamodule = instantiate(config.datamodule, _convert_="all")  # refuses settings that cannot be
    if has_corpus:
        datamodule.setup("fit")  # and data that does not suit them


def fit(run: RunDirectory, config: DictConfig) -> int:
    """Train on this rank until the run is done or asked to stop; give the exit code."""
    runtime.quiet_libraries()
    import torch

    from trainers.batch_plan import give_whole_steps
    from trainers.build import build_trainer
    from trainers.callbacks.preemption import PreemptedError
    from trainers.compat import check

    checkpoint = run.find_checkpoint("last")
    torch.manual_seed(config.seed)  # for modules that draw their initial values as torch does
    module = instantiate(config.module, _convert_="all")
    runtime.say_once(*check(config, runtime.world_size(config), module))
    datamodule = instantiate(config.datamodule, _convert_="all")
    if config.init_from and checkpoint is None:
        load_initial_weights(module, config)
    trainer = build_trainer(
        runtime.plain(config),
        run.path,
        world_size=runtime.world_size(config),
        **run.continuation(config),
        grad_accum=give_whole_steps(module, datamodule, config.plan.grad_accum),
        strategy=instantiate(config.strategy, _convert_="all")["make"],
        loggers=runtime.build_loggers(config, run.path),
        callbacks=list(instantiate(config.trainer.callbacks, _convert_="all").values()),
        profiler=instantiate(config.trainer.profiler, _convert_="all"),
        report=run.write_failure,
    )
    with run.status_of(trainer) as end:
        try:
            trainer.fit(module, datamodule, ckpt_path=checkpoint, weights_only=True)
        except PreemptedError as reason:
            end("preempted", f"{reason}; the same command continues at step {trainer.global_step}")
            return runtime.PREEMPTED
        if trainer.is_global_zero:
            run.write_summary(summarize(run, trainer))
            print_summary(run)
        end("done", f"trained {trainer.global_step} steps")
    return runtime.DONE


main = runtime.verb("train")(train)

if __name__ == "__main__":
    main()
