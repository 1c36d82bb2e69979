"""Where metrics go: `metrics.jsonl` in the run directory, and its picture.

Every row is stamped with the run's position, so that the x-axis means the same before and after a
resume: `step` (optimizer steps), `samples`, `tokens`, `epoch` (passes over the data).
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers.logger import Logger

from trainers.durable_files import write_atomically

Stamp = Callable[[], dict[str, float]]


class StampedLogger(Logger):
    """A Lightning logger whose rows carry the run's position instead of Lightning's own step.

    Lightning numbers validation rows one step low, and counts each optimizer's steps apart where
    there are several. `stamp` is set by `trainers.build`, and gives step, samples, tokens, epoch.
    """

    stamp: Stamp

    @property
    def version(self) -> str:
        """Runs have a name, not versions."""
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run directory holds the configuration."""

    def log_table(self, key: str, rows: list[dict[str, str]]) -> None:
        """Log rows of text; nothing where a logger has no tables."""

    def log_pictures(self, pictures: Mapping[str, Path], num_images: int) -> None:
        """Log PNG files by name, drawn after `num_images` images; nothing where it shows none."""


class JsonLines(StampedLogger):
    """Rows of metrics as JSON lines, one object a row, appended and flushed."""

    def __init__(self, path: str | Path, *, resume_step: int):
        """Open `path`; rows after `resume_step` come from work that will be done again."""
        super().__init__()
        self.path = Path(path)
        self.resume_step = resume_step
        self._forget_rows_after_resume_step()

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    @property
    def save_dir(self) -> str:
        """The run directory, where a profiler writes if it is not told otherwise."""
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row."""
        row = self.stamp() | {key: value for key, value in metrics.items() if key != "epoch"}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    @rank_zero_only
    def _forget_rows_after_resume_step(self) -> None:
        kept = [row for row in read_metrics(self.path) if row["step"] <= self.resume_step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        if not self.path.exists() or self.path.read_text() != text:
            write_atomically(self.path, text)


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Rows of a `metrics.jsonl`; a last line cut short by a crash is left out."""
    rows = []
    if Path(path).exists():
        for line in Path(path).read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def plot_losses(
    rows: Iterable[Mapping[str, float]], path: str | Path, title: str, *, monitor: str
) -> None:
    """Draw losses, and `monitor` where it is no loss, over tokens, images or samples as PNG."""
    from matplotlib.figure import Figure

    rows = list(rows)
    axis = next(u for u in ("tokens", "images", "samples") if all(u in row for row in rows))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    keys = sorted({key for row in rows for key in row if key.endswith("loss")})
    for key in keys:
        _draw(axes, rows, axis, key, "o-" if key.startswith("val/") else "-")
    axes.set(xlabel=axis, ylabel="loss (nats)" if axis == "tokens" else "loss", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    if monitor not in keys:
        other = axes.twinx()
        _draw(other, rows, axis, monitor, "o-k")
        other.set(ylabel=monitor)
        other.legend(loc="upper right")
    figure.savefig(path, dpi=120)


def _draw(axes: Any, rows: list[Mapping[str, float]], axis: str, key: str, style: str) -> None:
    points = [(row[axis], row[key]) for row in rows if key in row]
    if points:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, style, label=f"{key} (last {y[-1]:.3f})", markersize=4, linewidth=1.2)
