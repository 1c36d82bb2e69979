"""What a run says at its end."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from launch.run_directory import RunDirectory

PATHS = {
    "checkpoint": "checkpoint",
    "samples": "samples_file",
    "pictures": "pictures",
    "grid of the last": "last_grid",
    "grid of the best": "best_grid",
    "loss curve": "losses_png",
}


def summarize(run: RunDirectory, trainer: Any) -> dict[str, Any]:
    """Collect a finished run's report and draw its losses; reads `metrics.jsonl` and `samples/`.

    Returns:
        `step`, `samples`, `tokens`, the last `val/*` metrics, `tokens_per_s` (mean over this
        launch's training time; None where it trained nothing), `signatures` of scores, and paths;
        of a module that draws `pictures` those of the last and of the best checkpoint's grid, where
        there are any. In place of `tokens` it is `images`, or `samples` where they have no fixed
        number of tokens.
    """
    from trainers.callbacks.step_metrics import StepMetrics
    from trainers.metrics import plot_losses, read_metrics

    rows = read_metrics(run.path / "metrics.jsonl")
    monitor = run.config.checkpoints.monitor
    plot_losses(rows, run.path / "losses.png", title=run.path.name, monitor=monitor)
    last = {key: value for row in rows for key, value in row.items() if key.startswith("val/")}
    metrics = next(c for c in trainer.callbacks if isinstance(c, StepMetrics))
    generated = getattr(trainer.lightning_module, "generated", None)
    checkpoint = run.find_checkpoint("last")
    unit = _unit(rows[-1])
    speed = metrics.samples_per_s * metrics.tokens_per_sample
    samples = run.path / "samples" / f"{checkpoint.name}.jsonl" if checkpoint else None
    return {
        **{key: rows[-1][key] for key in ("step", "samples", unit)},
        **last,
        f"{unit}_per_s": speed if metrics.total_seconds else None,
        "checkpoint": str(checkpoint),
        "samples_file": str(samples) if samples and samples.exists() else None,
        "signatures": generated.signatures if generated else {},
        "losses_png": str(run.path / "losses.png"),
        **(_pictures(run) if hasattr(trainer.lightning_module, "pictures") else {}),
    }


def _pictures(run: RunDirectory) -> dict[str, str]:
    from trainers.callbacks.pictures import folder_name

    paths = {"pictures": run.path / "samples"}
    for which in ("last", "best"):
        if (run.checkpoints / which).exists() and (checkpoint := run.find_checkpoint(which)):
            step = int(checkpoint.name.removeprefix("step-"))
            folder = paths["pictures"] / folder_name(step * run.config.plan.batch_samples)
            paths[f"{which}_grid"] = folder / "grid.png"
    return {name: str(path) for name, path in paths.items() if path.exists()}


def print_summary(run: RunDirectory) -> None:
    """Print a finished run's report; paths stand on lines of their own, whole, to be copied."""
    summary, console = run.summary, Console()
    if sample := _last_sample(summary["samples_file"]):
        console.print(Panel(Text(sample), title="a sample", expand=False))
    lines = {"run": f"{run.path.name}: done"}
    unit = _unit(summary)
    lines["trained"] = f"{summary['step']:,} steps, {summary[unit]:,} {unit}"
    lines |= {key: f"{summary[key]:.4f}" for key in sorted(summary) if key.startswith("val/")}
    lines |= {f"{key} is": value for key, value in summary.get("signatures", {}).items()}
    if speed := summary[f"{unit}_per_s"]:
        lines[f"{unit}/s"] = f"{speed:,.0f}"
    lines |= {title: path for title, key in PATHS.items() if (path := summary.get(key))}
    for title, value in lines.items():
        console.print(f"[bold]{title:24}[/bold]", end="")
        console.print(value, markup=False, highlight=False, soft_wrap=True)


def _unit(row: Mapping[str, Any]) -> str:
    """What a run's progress is counted in."""
    return next(unit for unit in ("tokens", "images", "samples") if unit in row)


def _last_sample(path: str | None) -> str | None:
    if path is None or not Path(path).exists():  # of a run that was fetched from elsewhere
        return None
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    if not rows:
        return None
    if "text" in rows[-1]:
        return rows[-1]["prompt"] + rows[-1]["text"]
    return "\n".join(f"{name}: {text}" for name, text in rows[-1].items())
