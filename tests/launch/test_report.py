"""Tables, files and pictures of runs side by side."""

import csv
import subprocess

import matplotlib.image
import pytest
from omegaconf import OmegaConf

from launch.parallel_coordinates import Axis, axes_of
from launch.report import report
from launch.run_directory import RunDirectory
from launch.sweep_record import Job, Sweep

LR, NAME = "module.optimizer.lr", "module.optimizer.name"


@pytest.fixture
def sweep(tmp_path):
    """A recorded sweep: two jobs done, one failed, one not yet begun."""
    sweep = Sweep(tmp_path / "sweeps" / "s", objective="val/loss", swept=[LR, NAME])
    sweep.folder.mkdir(parents=True)
    facts = [
        ("s-a", "0.001", "muon", {"state": "done", "objective": 2.5, "steps": 20, "seconds": 61.0}),
        ("s-b", "0.01", "muon", {"state": "failed", "reason": "made to fail"}),
        ("s-c", "0.1", "adamw", {"state": "done", "objective": 1.5, "steps": 20}),
        ("s-d", "1.0", "adamw", {}),
    ]
    for run, lr, name, known in facts:
        directory = RunDirectory(tmp_path / run)
        directory.path.mkdir()
        values = {"experiment": "x", LR: lr, NAME: name}
        sweep.jobs[run] = Job(run, values, [], directory=str(directory.path), **known)
        if known.get("state") == "done":
            summary = {"step": 20, "val/loss": known["objective"], "val/x": -known["objective"]}
            directory.write_summary(summary)
    sweep.write()
    return sweep


@pytest.fixture
def report_of(tmp_path, capfd):
    """Report, with settings; gives what is printed."""

    def run(**settings):
        defaults = dict.fromkeys(("sweep", "run", "objective", "direction"))
        folders = {"runs_dir": str(tmp_path), "local_runs_dir": str(tmp_path)}
        report(OmegaConf.create(defaults | folders | settings))
        return capfd.readouterr().out

    return run


def rows_in(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_report_lists_all_jobs_best_first(sweep, report_of):
    output = report_of(sweep="s")
    positions = [output.index(run) for run in ("s-c", "s-a", "s-b", "s-d")]
    assert positions == sorted(positions)
    assert "optimizer.name" in output
    assert "experiment" not in output  # the same for all
    rows = rows_in(sweep.folder / "report.csv")
    assert [row["run"] for row in rows] == ["s-c", "s-a", "s-b", "s-d"]
    assert rows[0] == {
        LR: "0.1", NAME: "adamw", "state": "done", "objective": "1.5", "steps": "20",
        "seconds": "0.0", "run": "s-c", "reason": "",
    }  # fmt: skip
    assert [row["state"] for row in rows[2:]] == ["failed", "waiting"]
    assert rows[2]["reason"] == "made to fail"
    assert str(sweep.folder / "report.csv") in output
    assert str(sweep.folder / "report.png") in output


def test_report_compares_by_another_value_in_another_direction(sweep, report_of):
    report_of(sweep="s", objective="val/x", direction="maximize")
    rows = rows_in(sweep.folder / "report.csv")
    assert [(row["run"], row["objective"]) for row in rows[:2]] == [
        ("s-c", "-1.5"),
        ("s-a", "-2.5"),
    ]
    report_of(sweep="s", objective="val/x")
    assert rows_in(sweep.folder / "report.csv")[0]["run"] == "s-a"


def test_picture_has_an_axis_a_key_and_a_line_a_job(sweep, report_of):
    report_of(sweep="s")
    pixels = matplotlib.image.imread(sweep.folder / "report.png")
    # Best and worst of the two jobs: the ends of the colours that are used.
    for colour in ((0x44, 0x01, 0x54), (0xBD, 0xDF, 0x26)):
        near = abs(pixels[..., :3] * 255 - colour).max(axis=-1) < 12
        assert near.sum() > 200
    done = [job for job in sweep.jobs.values() if job.state == "done"]
    names = [axis.name for axis in axes_of(sweep, done)]
    assert names == ["lr", "optimizer.name", "val/loss"]


def test_axis_is_logarithmic_where_values_are_spread_so():
    axis = Axis.of("lr", ["1e-4", "0.001", "1e-2"])
    assert axis.name == "lr\n(log)"
    assert axis.heights == pytest.approx({"1e-4": 0, "0.001": 0.5, "1e-2": 1})
    even = Axis.of("dropout", ["0.1", "0.2", "0.3"])
    assert even.name == "dropout"
    assert even.heights == pytest.approx({"0.1": 0, "0.2": 0.5, "0.3": 1})


def test_axis_of_words_has_a_tick_for_each_and_one_of_numbers_few():
    assert Axis.of("name", ["muon", "adamw", "muon", "sgd"]).ticks == {
        "muon": 0,
        "adamw": 0.5,
        "sgd": 1,
    }
    assert Axis.of("width", ["64"]).heights == {"64": 0.5}
    many = Axis.of("x", [str(number) for number in range(100)])
    assert len(many.heights) == 100
    assert 5 < len(many.ticks) < 15


def test_runs_are_compared_by_what_they_differ_in(tmp_path, report_of, compose):
    for run, lr in (("a", 0.1), ("b", 0.2)):
        config = compose("train", ["experiment=gpt_char_cpu", f"run.name={run}", f"{LR}={lr}"])
        directory = RunDirectory(tmp_path / run)
        directory.path.mkdir()
        directory.accept(config)
        directory.write_status("done", step=5)
        directory.write_summary({"step": 5, "val/loss": lr})
    report_of(run=["b", "a"])
    rows = rows_in(tmp_path / "reports" / "b+a" / "report.csv")
    assert [(row["run"], row[LR], row["objective"]) for row in rows] == [
        ("a", "0.1", "0.1"),
        ("b", "0.2", "0.2"),
    ]
    assert set(rows[0]) == {LR, "state", "objective", "steps", "seconds", "run", "reason"}


def test_job_that_was_running_when_its_sweep_was_killed_is_interrupted(sweep, report_of):
    sweep.jobs["s-d"].state = "running"
    sweep.write()
    report_of(sweep="s")
    assert rows_in(sweep.folder / "report.csv")[3]["state"] == "interrupted"
    sweep.hold()
    report_of(sweep="s")
    sweep.release()
    assert rows_in(sweep.folder / "report.csv")[3]["state"] == "running"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sweep": "t"}, r"sweep=t -> no such sweep in .*sweeps/ -> there are: s"),
        ({"sweep": "s", "objective": "val/y"}, r"-> no finished run of s .* step, val/loss, val/x"),
        ({}, r"sweep=None run=None -> one of them says which runs"),
        ({"sweep": "s", "run": ["s-a"]}, r"-> one of them says which runs"),
        ({"run": ["s-z"]}, r"run=s-z -> no such run"),
    ],
)
def test_report_of_what_is_not_there_says_what_is(sweep, report_of, settings, message):
    with pytest.raises(ValueError, match=message):
        report_of(**settings)


def test_sweep_may_be_called_as_a_kind_of_sweep_is(sweep, command, tmp_path):
    sweep.folder.rename(sweep.folder.with_name("grid"))
    done = subprocess.run(
        command("report", "sweep=grid", f"runs_dir={tmp_path}"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sweeps" / "grid" / "report.png").exists()
