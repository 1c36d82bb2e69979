"""A picture of a sweep: an axis for each key, the objective's last, and a line for each job."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.sweep_record import Job, Sweep, short_names

LOW = 1 / 3
"""An axis is logarithmic if the median of its values were lower than this on a linear one."""

MAX_TICKS = 6


@dataclass(frozen=True)
class Axis:
    """Where values are on an axis that goes from 0 to 1."""

    name: str
    heights: dict[str, float]
    ticks: dict[str, float]

    @classmethod
    def of(cls, name: str, values: Sequence[str]) -> "Axis":
        """An axis of numbers, logarithmic where most are small; else one of categories."""
        try:
            numbers = {value: float(value) for value in values}
        except ValueError:
            return cls._of_categories(name, values)
        if not all(map(math.isfinite, numbers.values())):
            return cls._of_categories(name, values)
        low, high = min(numbers.values()), max(numbers.values())
        middle = statistics.median(numbers.values())
        if low > 0 and middle < low + LOW * (high - low):
            name += "\n(log)"
            numbers = {value: math.log10(number) for value, number in numbers.items()}
            low, high = math.log10(low), math.log10(high)
        span = high - low
        heights = {
            value: (number - low) / span if span else 0.5 for value, number in numbers.items()
        }
        return cls(name, heights, _choose_ticks(heights))

    @classmethod
    def _of_categories(cls, name: str, values: Sequence[str]) -> "Axis":
        names = list(dict.fromkeys(values))
        step = 1 / max(1, len(names) - 1)
        heights = {
            each: place * step if len(names) > 1 else 0.5 for place, each in enumerate(names)
        }
        return cls(name, heights, heights)


def draw(sweep: Sweep, path: Path) -> None:
    """Draw the jobs that have an objective as a PNG file, the best ones on top and darkest."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    jobs = [job for job in sweep.jobs.values() if job.objective is not None]
    axes = axes_of(sweep, jobs)
    figure = Figure(figsize=(max(5.0, 1.9 * len(axes)), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    plot = figure.add_subplot()
    colours = mpl.colormaps["viridis"]
    best_last = sorted(jobs, key=lambda job: _badness(sweep, job, jobs), reverse=True)
    for job in best_last:
        heights = [axis.heights[value] for axis, value in zip(axes, _row(job, sweep), strict=True)]
        colour = colours(0.9 * _badness(sweep, job, jobs))
        plot.plot(range(len(axes)), heights, color=colour, linewidth=1.8, marker="o", markersize=4)
    for place, axis in enumerate(axes):
        plot.axvline(place, color="0.6", linewidth=0.8, zorder=0)
        for text, height in axis.ticks.items():
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1}
            plot.annotate(
                _label(text), (place, height), (5, 0), textcoords="offset points", va="center",
                fontsize=8, bbox=box,
            )  # fmt: skip
    plot.set_xticks(range(len(axes)), [axis.name for axis in axes])
    plot.set_xlim(-0.15, len(axes) - 0.55)
    plot.set_ylim(-0.06, 1.06)
    plot.yaxis.set_visible(False)
    plot.spines[:].set_visible(False)
    best = "lowest" if sweep.direction == "minimize" else "highest"
    plot.set_title(f"{sweep.name}: {len(jobs)} jobs, darkest where {sweep.objective} is {best}")
    figure.savefig(path, dpi=130)


def axes_of(sweep: Sweep, jobs: Sequence[Job]) -> list[Axis]:
    """One for each key that jobs have values of, and one for the objective."""
    names = short_names(sweep.keys)
    columns = zip(*(_row(job, sweep) for job in jobs), strict=True)
    titles = [*names.values(), sweep.objective]
    return [Axis.of(title, values) for title, values in zip(titles, columns, strict=True)]


def _row(job: Job, sweep: Sweep) -> list[str]:
    return [*(job.values.get(key, "(not set)") for key in sweep.keys), repr(job.objective)]


def _badness(sweep: Sweep, job: Job, jobs: Sequence[Job]) -> float:
    """From 0, the best, to 1, the worst, by place, so that one bad job leaves the others colour."""
    objectives = sorted({each.objective or 0.0 for each in jobs})
    place = objectives.index(job.objective or 0.0) / max(1, len(objectives) - 1)
    return place if sweep.direction == "minimize" else 1 - place


def _choose_ticks(heights: dict[str, float]) -> dict[str, float]:
    """Values to write at an axis: all, or of many those that are evenly apart."""
    ticks: dict[str, float] = {}
    for text, height in sorted(heights.items(), key=lambda item: item[1]):
        if all(abs(height - other) >= 1 / (2 * MAX_TICKS) for other in ticks.values()):
            ticks[text] = height
    return ticks


def _label(text: str) -> str:
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text
