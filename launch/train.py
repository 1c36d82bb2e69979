"""Train: compose, check, build, fit. The same command again continues, or says it is done."""

import os

from hydra.utils import instantiate
from omegaconf import DictConfig

from launch import ranks, runtime
from launch.completion import complete
from launch.initial_weights import load_initial_weights
from launch.run_directory import RunDirectory
from launch.run_home import directory_of, home_of
from launch.summary import print_summary, summarize
from launch.sweep import sweeps


def train(config: DictConfig) -> int:
    """Train the run that the configuration names, or continue it."""
    runtime.refuse_unknown_keys(config, "train")
    run, num_ranks = directory_of(config), runtime.world_size(config)
    home = home_of(run, config)
    complete(config, num_ranks)
    if os.environ.get("RANK", "0") != "0":  # of torchrun; SameStart compares it with rank 0
        home.pull(str(config.checkpoint), trains=True)
        with home.completed_at_end():
            return runtime.DONE if run.is_done(config) else fit(run, config)
    with run.lock(), run.noting_failed_start():
        home.pull(str(config.checkpoint), trains=True)
        run.compare(config)
        run.go_back_to(str(config.checkpoint), config.resume.verify)
        if run.is_done(config):
            home.push()
            print_summary(run)
            return runtime.DONE
        run.verify_checkpoint("last", config.resume.verify)
        run.continuation(config)  # refuses what cannot be carried over
        run.accept(config)
        home.push_small_files()
        with home.completed_at_end(), run.noting_failed_start():
            if num_ranks > 1 and not runtime.is_rank():
                return ranks.start(run, num_ranks)
            return fit(run, config)


def fit(run: RunDirectory, config: DictConfig) -> int:
    """Train on this rank until the run is done or asked to stop; give the exit code."""
    runtime.quiet_libraries()
    import torch

    from trainers.batch_plan import give_whole_steps
    from trainers.build import build_trainer
    from trainers.callbacks.preemption import PreemptedError
    from trainers.compat import check

    home, checkpoint = home_of(run, config), run.find_checkpoint("last")
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
        on_commit=home.on_commit,
    )
    with home.uploading(), run.status_of(trainer) as end:
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


main = runtime.verb("train", around=sweeps)(train)

if __name__ == "__main__":
    main()
