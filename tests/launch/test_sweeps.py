"""Sweeps: which jobs there are, what is run of them, what is said, by stand-ins for training."""

import math
import sys

import pytest
from hydra.core.global_hydra import GlobalHydra

from launch import runtime
from launch import sweep as sweep_module
from launch.report import in_order
from launch.run_directory import RunDirectory
from launch.sweep_processes import note_done
from launch.sweep_record import Sweep, name_of_run

LR = "module.optimizer.lr"


def rate(config):
    return float(config.module.optimizer.lr)


class DryRun:
    """What runs jobs in place of processes; knows which it has run."""

    def __init__(self, objective, fails, waits):
        self.objective, self.fails, self.waits = objective, fails, waits
        self.started, self.configs, self.output = [], {}, None

    def __call__(self, sweep, jobs, flags, at_once):
        self.flags, self.at_once = flags, at_once
        for job, config in jobs:
            self.started.append(job.run)
            self.configs[job.run] = config
            if job.values.get(LR) in self.fails:
                sweep.note(job, "failed", reason="made to fail")
                continue
            if job.values.get(LR) in self.waits:
                continue
            run = RunDirectory(sweep.folder.parent.parent / job.run)
            run.path.mkdir(parents=True, exist_ok=True)
            run.accept(config)
            run.write_summary({"step": 7, "val/loss": self.objective(config)})
            run.write_status("done")
            note_done(sweep, job, 1.0)


@pytest.fixture
def sweep_at(tmp_path, monkeypatch, capfd):
    """Run `launch.train -m` here in an empty folder; gives its exit code and what it has run."""
    monkeypatch.chdir(tmp_path)

    def sweep(*overrides, experiment="gpt_char_cpu", objective=rate, fails=(), waits=()):
        from launch.train import main

        dry = DryRun(objective, fails, waits)
        with monkeypatch.context() as patch:
            patch.setattr(sweep_module, "run_here", dry)
            patch.setattr(sys, "argv", ["train", "-m", *overrides, f"experiment={experiment}"])
            patch.setenv("HYDRA_FULL_ERROR", "1")
            with pytest.raises(SystemExit) as ended:
                main()
        GlobalHydra.instance().clear()
        dry.output = capfd.readouterr()
        return ended.value.code, dry

    return sweep


def named(key, value):
    return name_of_run("s", {"experiment": "gpt_char_cpu", key: value})


def recorded(tmp_path, name="s"):
    return Sweep.read(tmp_path / "runs" / "sweeps" / name)


def test_sweep_runs_every_combination_and_records_it(sweep_at, tmp_path):
    code, dry = sweep_at("sweep.name=s", f"{LR}=1e-3,3e-4", "module.network.width=64,128", "seed=3")
    jobs = recorded(tmp_path).jobs
    assert code == 0
    assert len(jobs) == 4
    assert list(jobs) == dry.started
    values = {(job.values[LR], job.values["module.network.width"]) for job in jobs.values()}
    assert values == {(lr, width) for lr in ("0.001", "0.0003") for width in ("64", "128")}
    for run, config in dry.configs.items():
        assert run == config.run.name == name_of_run("s", jobs[run].values)
        assert (config.sweep.name, config.seed) == ("s", 3)
        assert jobs[run].objective == config.module.optimizer.lr
    # Nothing but the runs and the sweep's folder: no multirun/ of Hydra's.
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_sweep_is_called_as_its_runs_are(sweep_at, tmp_path):
    sweep_at("run.name=mine", f"{LR}=1e-3")
    assert [run[:5] for run in recorded(tmp_path, "mine").jobs] == ["mine-"]


def test_jobs_that_fail_or_do_not_compose_are_listed_and_others_run(sweep_at, tmp_path):
    code, dry = sweep_at("sweep.name=s", f"{LR}=1,2,3", "strategy=single,nope", fails=("2",))
    jobs = recorded(tmp_path).jobs.values()
    assert code == 1
    assert [job.state for job in jobs].count("done") == 2
    assert {job.reason for job in jobs if job.values["strategy"] == "nope"} == {
        "strategy=nope -> there is none of that name -> use one of ddp, fsdp, single, zero1, "
        "zero2, zero3, zero3_offload"
    }
    assert "2 of 6 jobs done, 4 failed" in dry.output.out
    assert "lr=2 strategy=single: made to fail" in dry.output.out


def test_key_that_does_not_exist_fails_its_jobs(sweep_at, tmp_path):
    code, dry = sweep_at("sweep.name=s", "module.optimiser.lr=1,2")
    assert (code, dry.started) == (1, [])
    for job in recorded(tmp_path).jobs.values():
        assert job.reason.startswith("module.optimiser.lr -> no such key -> did you mean module.op")


def test_repeated_sweep_runs_what_is_missing(sweep_at, tmp_path):
    sweep_at("sweep.name=s", f"{LR}=1,2,3", fails=("2",))
    missing = named(LR, "2")
    code, dry = sweep_at("sweep.name=s", "sweep.jobs=2", f"{LR}=3,2,1,4")
    assert code == 0
    assert dry.started == [missing, named(LR, "4")]
    assert {job.objective for job in recorded(tmp_path).jobs.values()} == {1, 2, 3, 4}
    assert dry.at_once == 2


def test_objective_of_a_finished_run_is_read_again(sweep_at, tmp_path):
    sweep_at("sweep.name=s", f"{LR}=1")
    (name,) = recorded(tmp_path).jobs
    RunDirectory(tmp_path / "runs" / name).write_summary({"step": 7, "val/loss": 9.0, "x": 5})
    code, dry = sweep_at("sweep.name=s", "sweep.objective=x", f"{LR}=1")
    assert (code, dry.started) == (0, [])
    assert recorded(tmp_path).jobs[name].objective == 5


@pytest.mark.parametrize("change", ["max_steps=9", "resume.extend=true", "checkpoint=best"])
def test_changed_length_is_for_the_run_to_judge(sweep_at, change):
    sweep_at("sweep.name=s", f"{LR}=1")
    assert sweep_at("sweep.name=s", f"{LR}=1", "micro_batch=2")[1].started == []  # free to change
    assert sweep_at("sweep.name=s", f"{LR}=1", change)[1].started == [named(LR, "1")]


def test_swept_value_or_one_given_to_all_names_the_same_job(sweep_at, tmp_path):
    sweep_at("sweep.name=s", f"{LR}=1", "strategy=single")
    _, dry = sweep_at("sweep.name=s", "seed=3,2", f"{LR}=1")
    assert len(dry.started) == 2
    _, dry = sweep_at("sweep.name=s", f"{LR}=2,1", "seed=2")
    assert dry.started == [name_of_run("s", {"experiment": "gpt_char_cpu", LR: "2", "seed": "2"})]
    sweep = recorded(tmp_path)
    assert sweep.keys == ["seed", LR]
    assert [sweep.describe(job) for job in sweep.jobs.values()] == [
        "lr=1", "seed=3 lr=1", "seed=2 lr=1", "seed=2 lr=2",
    ]  # fmt: skip


def test_runs_may_be_named_by_the_sweep(sweep_at, tmp_path):
    sweep_at("sweep.name=s", "run.name=a,b", f"{LR}=1")
    assert list(recorded(tmp_path).jobs) == ["a", "b"]
    code, dry = sweep_at("sweep.name=t", "run.name=a,b", f"{LR}=1,2")
    assert code == 1
    assert "run.name=a -> jobs of other values have that name too" in dry.output.err


def test_runs_are_grouped_in_wandb(sweep_at):
    _, dry = sweep_at("sweep.name=s", f"{LR}=1", "logger=none,wandb")
    groups = [config.logger.get("group") for config in dry.configs.values()]
    assert groups == [None, "s"]
    _, dry = sweep_at("sweep.name=t", f"{LR}=1", "logger=wandb", "logger.group=mine")
    assert [config.logger.group for config in dry.configs.values()] == ["mine"]


def test_users_own_configuration_is_that_of_the_jobs(sweep_at, tmp_path):
    (tmp_path / "my" / "experiment").mkdir(parents=True)
    text = "# @package _global_\nseed: 77\n"
    (tmp_path / "my" / "experiment" / "mine.yaml").write_text(text)
    _, dry = sweep_at("--config-dir", "my", f"{LR}=1", experiment="mine")
    assert [config.seed for config in dry.configs.values()] == [77]
    assert dry.flags == [f"--config-dir={tmp_path / 'my'}"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sweep.jobs=0", "sweep.jobs=0 -> no number of jobs at once -> give 1 or more"),
        (
            "cluster=slurm cluster.dry_run=true",
            "cluster.dry_run=true -> a sweep has no script of its own -> leave -m out and give one "
            "value of each key",
        ),
        ("sweep.direction=up", "sweep.direction=up -> unknown -> use minimize or maximize"),
        ("sweep=none", "sweep=none -> there is none of that name -> use one of grid, optuna"),
    ],
)
def test_settings_that_cannot_be_are_refused(sweep_at, tmp_path, override, message):
    code, dry = sweep_at(*override.split(), f"{LR}=1")
    assert (code, dry.started, list(tmp_path.iterdir())) == (1, [], [])
    assert dry.output.err == f"error: {message}\n"


def test_sweep_some_of_whose_jobs_wait_is_not_done(sweep_at):
    assert sweep_at("sweep.name=s", f"{LR}=1,2", waits=("2",))[0] == runtime.PREEMPTED
    assert sweep_at("sweep.name=s", f"{LR}=1,2,3", waits=("2",), fails=("3",))[0] == runtime.FAILED
    assert sweep_at("sweep.name=s", f"{LR}=1,2")[0] == runtime.DONE


def test_sweep_in_an_allocation_runs_its_jobs_there(sweep_at, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    code, dry = sweep_at("cluster=slurm", "sweep.name=s", f"{LR}=1,2")
    assert (code, len(dry.started)) == (0, 2)


def test_sweep_is_not_run_by_each_rank(sweep_at, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, dry = sweep_at(f"{LR}=1")
    assert code == 1
    assert dry.output.err.startswith("error: -m -> each of the ranks")


def test_one_process_at_a_time_runs_a_sweep(sweep_at, tmp_path):
    sweep_at("sweep.name=s", f"{LR}=1")
    other = recorded(tmp_path)
    other.hold()
    code, dry = sweep_at("sweep.name=s", f"{LR}=1")
    other.release()
    assert code == 1
    assert "sweep.name=s -> another process is running it" in dry.output.err
    assert sweep_at("sweep.name=s", f"{LR}=1")[0] == 0


SEARCH = (
    "sweep=optuna", "sweep.name=s", "hydra.sweeper.n_trials=20",
    f"{LR}=tag(log,interval(1e-6,1))", "module.network.width=choice(64,128)",
)  # fmt: skip


def toy(config):
    """Lowest at a rate of 1e-2 and a width of 128."""
    distance = math.log10(config.module.optimizer.lr) + 2
    return distance**2 + (config.module.network.width == 64)


def test_optuna_finds_the_better_half(sweep_at, tmp_path):
    code, dry = sweep_at(*SEARCH, objective=toy)
    assert (code, len(dry.started)) == (0, 20)
    found = [dry.configs[run] for run in dry.started]

    def share_of_better(configs):
        better = [math.log10(config.module.optimizer.lr) > -3 for config in configs]
        return sum(better) / len(better)

    # The first ten are drawn at random; half of the space is better than the other.
    assert share_of_better(found[10:]) > max(0.75, share_of_better(found[:10]))
    best = in_order(recorded(tmp_path))[0]
    assert abs(math.log10(float(best.values[LR])) + 2) < 0.5
    assert best.values["module.network.width"] == "128"
    assert (tmp_path / "runs/sweeps/s/optimization_results.yaml").exists()


def test_repeated_search_asks_for_the_same_jobs_and_runs_none(sweep_at, tmp_path):
    sweep_at(*SEARCH, "hydra.sweeper.n_trials=4", objective=toy)
    before = list(recorded(tmp_path).jobs)
    code, dry = sweep_at(*SEARCH, "hydra.sweeper.n_trials=5", objective=toy)
    assert code == 0
    assert list(recorded(tmp_path).jobs) == [*before, *dry.started]
    assert len(dry.started) == 1


def test_search_goes_on_after_jobs_that_fail(sweep_at, tmp_path):
    space = ("sweep=optuna", "sweep.name=s", "hydra.sweeper.n_trials=6", f"{LR}=choice(1,2)")
    code, _ = sweep_at(*space, fails=("1",))
    states = {job.values[LR]: job.state for job in recorded(tmp_path).jobs.values()}
    assert (code, states) == (1, {"1": "failed", "2": "done"})
    code, dry = sweep_at(*space, "sweep.name=t", fails=("1", "2"))
    assert code == 1
    assert "0 of 2 jobs done, 2 failed" in dry.output.out


def test_search_may_maximize(sweep_at):
    _, dry = sweep_at(
        *SEARCH,
        "sweep.direction=maximize",
        "hydra.sweeper.n_trials=16",
        objective=lambda each: -toy(each),
    )
    rates = [math.log10(dry.configs[run].module.optimizer.lr) for run in dry.started[10:]]
    assert sum(rate > -3 for rate in rates) > 0.75 * len(rates)
