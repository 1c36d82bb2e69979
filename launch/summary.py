"""What a run says at its end."""

import json
from pathlib import Path
from typing import Any

import lightning
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from launch.run_directory import RunDirectory
from trainers.callbacks.step_metrics import StepMetrics
from trainers.metrics import plot_losses, read_metrics


def summarize(run: RunDirectory, trainer: lightning.Trainer) -> dict[str, Any]:
    """Collect a finished run's report and draw its losses; reads `metrics.jsonl` and `samples/`.

    Returns:
        `step`, `samples`, `tokens`, the last `val/*` metrics, `tokens_per_s` (mean over this
        launch's training time; None where it trained nothing), and paths.
    """
    rows = read_metrics(run.path / "metrics.jsonl")
    plot_losses(rows, run.path / "losses.png", title=run.path.name)
    last = {key: value for row in rows for key, value in row.items() if key.startswith("val/")}
    metrics = next(c for c in trainer.callbacks if isinstance(c, StepMetrics))  # type: ignore[attr-defined]
    checkpoint = run.find_checkpoint("last")
    files = sorted((run.path / "samples").glob("*.jsonl"))
    return {
        **{key: rows[-1][key] for key in ("step", "samples", "tokens")},
        **last,
        "tokens_per_s": metrics.tokens_per_s if metrics.total_seconds else None,
        "checkpoint": str(checkpoint),
        "samples_file": str(files[-1]) if files else None,
        "losses_png": str(run.path / "losses.png"),
    }


def print_summary(run: RunDirectory) -> None:
    """Print a finished run's report."""
    summary = run.summary
    table = Table.grid(padding=(0, 2))
    table.add_row("trained", f"{summary['step']:,} steps, {summary['tokens']:,} tokens")
    for key in sorted(key for key in summary if key.startswith("val/")):
        table.add_row(key, f"{summary[key]:.4f}")
    if summary["tokens_per_s"]:
        table.add_row("tokens/s", f"{summary['tokens_per_s']:,.0f}")
    for key in ("checkpoint", "samples_file", "losses_png"):
        if summary[key]:
            table.add_row(key.replace("_", " "), summary[key])
    console = Console()
    if sample := _last_sample(summary["samples_file"]):
        console.print(Panel(Text(sample), title="a sample", expand=False))
    console.print(Panel(table, title=f"run {run.path.name}: done", expand=False))


def _last_sample(path: str | None) -> str | None:
    if path is None:
        return None
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return rows[-1].get("prompt", "") + rows[-1].get("text", "") if rows else None
