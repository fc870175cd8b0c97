"""Figures of an atlas: all heads by a measure, roles by layer, worth against role."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from headscope.errors import AtlasError
from headscope.heads.atlas.atlas import HeadAtlas
from headscope.heads.relations.counts import with_arrow
from headscope.views.figures.file import figure_kind, save_figure

_GREY, _BLUE, _ORANGE = "#d0d0d0", "#08519c", "#d95f02"


def draw(atlas: HeadAtlas, path: Path, *, by: str = "roles", force: bool = False) -> Path:
    """Draw an atlas.

    Args:
        atlas: The atlas.
        path: Where to: .png, .svg or .pdf.
        by: "roles" counts them layer by layer; "worth" sets what heads are worth against their roles; a column's
            name draws every head's value, layers by heads.
        force: Whether a file of another kind may be overwritten.

    Raises:
        AtlasError: There is no such column, or worth was not measured.
        HeadscopeError: The file cannot be written.
    """
    figure_kind(path)
    figure = _roles(atlas) if by == "roles" else _worth(atlas) if by == "worth" else _heads(atlas, by)
    return save_figure(figure, path, force=force)


def _heads(atlas: HeadAtlas, column: str) -> Figure:
    """Every head's value as a colour."""
    values = atlas.value(column)
    layers, heads = values.shape
    figure = Figure(figsize=(max(4.0, 0.42 * heads + 2), max(3.0, 0.26 * layers + 1.4)), dpi=150, layout="constrained")
    axes: Any = figure.subplots()
    shown = axes.imshow(values.numpy(), cmap="viridis", aspect="auto")
    about = atlas.info["columns"].get(column, {})
    axes.set_title(f"{atlas.name}: {column}", fontsize=11, fontweight="bold")
    figure.colorbar(shown, ax=axes, label=str(about.get("unit", "")))
    axes.set_xlabel(f"head\n{about.get('about', '')}", fontsize=8)
    axes.set_ylabel("layer")
    axes.set_xticks(range(0, heads, max(1, heads // 12)))
    axes.set_yticks(range(0, layers, max(1, layers // 15)))
    return figure


def _roles(atlas: HeadAtlas) -> Figure:
    """How many heads of each layer have each role."""
    evidence = atlas.roles()
    names = list(dict.fromkeys(row.role for row in evidence))
    layers = len(atlas.heads)
    counts = [[sum(r.role == name and r.layer == layer for r in evidence) for layer in range(layers)] for name in names]
    free = [atlas.heads[layer] - len({row.head for row in evidence if row.layer == layer}) for layer in range(layers)]
    names, counts = [*names, "no role"], [*counts, free]
    size = max(7.0, 0.28 * layers + 2.6), 0.3 * len(names) + 1.4
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes: Any = figure.subplots()
    most = max(max(row) for row in counts)
    axes.imshow(counts, cmap="Blues", aspect="auto", vmin=0, vmax=most * 1.3)
    for y, row in enumerate(counts):
        for x, count in enumerate(row):
            if count:
                axes.text(x, y, str(count), ha="center", va="center", fontsize=7)
    axes.set_yticks(range(len(names)), [with_arrow(name) for name in names], fontsize=8)
    axes.set_xticks(range(0, layers, max(1, layers // 15)))
    axes.set_xlabel("layer", fontsize=8)
    axes.set_title(f"{atlas.name}: how many heads of a layer have a role", fontsize=10, fontweight="bold")
    return figure


def _worth(atlas: HeadAtlas) -> Figure:
    """What heads are worth, by role: each dot a head."""
    if "ablation_zero" not in atlas.worth.values:
        raise AtlasError("what the heads are worth was not measured: run headscope heads without --no-worth.")
    zero = atlas.columns()["ablation_zero"]
    evidence = atlas.roles()
    names = [*dict.fromkeys(row.role for row in evidence), "no role"]
    figure = Figure(figsize=(8, 0.32 * len(names) + 1.4), dpi=150, layout="constrained")
    axes: Any = figure.subplots()
    taken = {(row.layer, row.head) for row in evidence}
    for y, name in enumerate(names):
        heads = [(row.layer, row.head) for row in evidence if row.role == name]
        if name == "no role":
            every = ((layer, head) for layer, count in enumerate(atlas.heads) for head in range(count))
            heads = [head for head in every if head not in taken]
        values = [v for v in (float(zero[head]) for head in heads) if not math.isnan(v)]
        axes.plot(values, [y] * len(values), "o", color=_GREY if name == "no role" else _BLUE, alpha=0.6, markersize=4)
        if values:
            axes.plot([statistics.median(values)], [y], "|", color=_ORANGE, markersize=14, markeredgewidth=2)
    axes.axvline(0, color="#888888", linewidth=0.6)
    most = max((float(v) for v in zero.abs().flatten() if not math.isnan(v)), default=1.0)
    axes.set_xscale("symlog", linthresh=max(most / 20, 1e-6))
    axes.set_yticks(range(len(names)), [with_arrow(name) for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"metric without the head minus metric with it ({atlas.worth.unit}); bar: median", fontsize=8)
    axes.set_title(f"{atlas.name}: where heads look, and what they are worth", fontsize=10, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
