"""Experiments as figures: each run as a dot, the mean over seeds with its interval."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from headscope.training.head_counts import ExperimentReport, SeedMean
from headscope.views.figures.file import save_figure

_DOT, _MEAN = "#9ecae1", "#08519c"


def draw_report(report: ExperimentReport, path: Path, *, force: bool = False) -> Path:
    """For each task the held-out loss, and how different the heads are, by the number of heads.

    Args:
        report: The experiment's answer.
        path: Where to write it: .png, .svg or .pdf.
        force: Whether a file of another kind may be overwritten.

    Raises:
        HeadscopeError: The file cannot be written.
    """
    tasks = list(dict.fromkeys(row.task for row in report.rows))
    figure = Figure(figsize=(8, 0.7 + 2.7 * len(tasks)), dpi=150, layout="constrained")
    figure.suptitle("One head or many: equal parameters, equal steps", fontsize=12, fontweight="bold")
    grid: Any = figure.subplots(len(tasks), 2, squeeze=False)
    for task, (losses, distances) in zip(tasks, grid, strict=True):
        rows = [row for row in report.rows if row.task == task]
        heads = [row.heads for row in rows]
        for axes, kind, label in (
            (losses, "loss", "held-out loss (nats)"),
            (distances, "distance", "distance between heads (0 to 1)"),
        ):
            for run in (run for run in report.outcomes if run.task == task):
                axes.plot(heads.index(run.heads), getattr(run, kind), "o", color=_DOT, markersize=4)
            _draw_means(axes, [getattr(row, kind) for row in rows])
            axes.set_xticks(range(len(heads)), [str(count) for count in heads])
            axes.set_xlim(-0.5, len(heads) - 0.5)
            axes.set_xlabel("heads", fontsize=9)
            axes.set_ylabel(label, fontsize=9)
            axes.set_title(task, fontsize=10)
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
        distances.set_ylim(0, 1)
    figure.supxlabel("Dots: seeds. Bars: 95 % interval of the mean.", fontsize=8, color="#333333")
    return save_figure(figure, path, force=force)


def _draw_means(axes: Any, means: list[SeedMean]) -> None:
    known = [(x, mean) for x, mean in enumerate(means) if not math.isnan(mean.mean)]
    axes.errorbar(
        [x for x, _ in known],
        [mean.mean for _, mean in known],
        yerr=[0.0 if math.isnan(mean.half_width) else mean.half_width for _, mean in known],
        fmt="_",
        color=_MEAN,
        markersize=14,
        capsize=4,
    )
