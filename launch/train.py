"""Train: compose, check, build, fit. The same command again continues, or says it is done."""

from hydra.utils import instantiate
from omegaconf import DictConfig

from launch import cluster, deafness, last_line, rank_logs, ranks, runtime, slurm_jobs, submission
from launch.acceptance import accepted
from launch.completion import refuse_impossible
from launch.initial_weights import load_initial_weights
from launch.meeting import meet
from launch.run_directory import RunDirectory
from launch.run_home import directory_of, home_of
from launch.summary import print_summary, summarize
from launch.sweep import sweeps
from trainers.rules import is_submission


def train(config: DictConfig) -> int:
    """Train the run that the configuration names, or continue it."""
    runtime.refuse_unknown_keys(config, "train")
    if is_submission(config):
        return submission.submit(config)
    cluster.adopt(config)
    refuse_impossible(config)
    fewest_nodes, _ = cluster.node_range(config)
    if ranks.are_of_nodes(config):
        return ranks.start_on_node(directory_of(config), config)
    run, num_ranks = directory_of(config), cluster.count_ranks(config)
    if cluster.is_rank():
        deafness.end_if_deaf(run, config)
    with (
        slurm_jobs.requeued(run, config),
        meet(config, num_ranks) as meeting,
        accepted(run, config, meeting) as is_done,
    ):
        if is_done:
            return runtime.DONE
        if num_ranks > 1 and not cluster.is_rank():
            return ranks.start(run, num_ranks, config.cluster.max_restarts)
        rank_logs.redirect(run)
        return cluster.code_for_starter(fit(run, config), fewest_nodes)


def fit(run: RunDirectory, config: DictConfig) -> int:
    """Train on this rank until the run is done or asked to stop; give the exit code."""
    runtime.quiet_libraries()
    import torch

    from trainers.batch_plan import give_whole_steps
    from trainers.build import build_trainer
    from trainers.callbacks.preemption import PreemptedError
    from trainers.compat import check

    home, checkpoint = home_of(run, config), run.find_checkpoint("last")
    num_ranks = cluster.count_ranks(config)
    torch.manual_seed(config.seed)  # for modules that draw their initial values as torch does
    module = instantiate(config.module, _convert_="all")
    runtime.say_once(*cluster.network_notes(num_ranks), *check(config, num_ranks, module))
    datamodule = instantiate(config.datamodule, _convert_="all")
    if config.init_from and checkpoint is None:
        load_initial_weights(module, config)
    trainer = build_trainer(
        runtime.plain(config),
        run.path,
        world_size=num_ranks,
        **run.continuation(config),
        grad_accum=give_whole_steps(module, datamodule, config.plan.grad_accum),
        strategy=instantiate(config.strategy, _convert_="all")["make"],
        loggers=runtime.build_loggers(config, run.path),
        callbacks=list(instantiate(config.trainer.callbacks, _convert_="all").values()),
        profiler=instantiate(config.trainer.profiler, _convert_="all"),
        report=run.write_failure,
        last_words=lambda reason: last_line.say(run, "failed", reason),
        ending=runtime.hear_no_stops,
        launched_at=runtime.launched_at(),
        on_commit=home.on_commit,
    )
    with home.uploading(), run.status_of(trainer) as end:
        try:
            trainer.fit(module, datamodule, ckpt_path=checkpoint, weights_only=True)
        except PreemptedError as reason:
            then = f"{reason}; the same command continues at step {trainer.global_step}"
            end("preempted", then, asks_requeue=reason.asks_requeue)
            return runtime.LEFT_BEHIND if reason.is_left_behind else runtime.PREEMPTED
        if trainer.is_global_zero:
            run.write_summary(summarize(run, trainer))
            print_summary(run)
        end("done", f"trained {trainer.global_step} steps")
    return runtime.DONE


main = runtime.verb("train", last_line.say_end, around=sweeps)(train)

if __name__ == "__main__":
    main()
