"""The picture of quality.py: held-out loss against rate, by rank and place, and against steps."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = Mapping[str, Any]
Curve = Sequence[tuple[float, float]]
Shown = tuple[str, int, str, str]  # place, r, label, colour
RANKS: list[Shown] = [
    ("full", 0, "full", "#1a202c"),
    ("all", 1, "r 1", "#63b3ed"),
    ("all", 16, "r 16", "#2b6cb0"),
    ("all", 64, "r 64", "#1a365d"),
]
PLACES: list[Shown] = [
    ("attention", 42, "attention, r 42", "#c05621"),
    ("mlp", 26, "MLP, r 26", "#2f855a"),
    ("all", 16, "all, r 16", "#2b6cb0"),
]
BLUES = ("#90cdf4", "#4299e1", "#2b6cb0", "#1a365d")


def by_rate(rows: Iterable[Row], place: str, r: int, steps: int) -> Curve:
    """(learning rate, held-out loss after `steps`), lowest rate first, of all runs with so many
    steps or more: at a constant rate a longer run passes through a shorter one."""
    found = {}
    for row in rows:
        loss = dict(row["test_loss"]).get(steps, math.inf)
        if (row["place"], row["r"]) == (place, r) and math.isfinite(loss):
            found[row["learning_rate"]] = loss
    return sorted(found.items())


def best(curve: Curve) -> tuple[float, float]:
    """(rate, loss) at the vertex of the parabola through the best point and its neighbours, over
    the logarithm of the rate; the best point itself where it has not two."""
    i = min(range(len(curve)), key=lambda i: curve[i][1])
    if not 0 < i < len(curve) - 1:
        return curve[i]
    (x0, y0), (x1, y1), (x2, y2) = ((math.log(x), y) for x, y in curve[i - 1 : i + 2])
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    bend = (right - left) / (x2 - x0)
    x = (x0 + x1) / 2 - left / (2 * bend)
    return math.exp(x), y1 + left * (x - x1) + bend * (x - x0) * (x - x1)


def longest(rows: Iterable[Row], place: str) -> dict[int, Curve]:
    """(step, held-out loss) by rank, of the runs of `place` with the most steps."""
    own = [row for row in rows if row["place"] == place]
    most = max((row["steps"] for row in own), default=0)
    return {row["r"]: row["test_loss"] for row in own if row["steps"] == most}


def draw(rows: Sequence[Row], path: Path, *, steps: int) -> None:
    """Loss after `steps` against the rate, by rank and by place; loss against steps, by rank."""
    figure = Figure(figsize=(8, 6.4), layout="constrained")
    (by_rank, by_place), (all_layers, one_layer) = figure.subplots(2, 2)
    _rates(by_rank, [(by_rate(rows, *shown[:2], steps), *shown[2:]) for shown in RANKS])
    by_rank.set_title(f"Rate and rank, {steps} steps")
    _rates(by_place, [(by_rate(rows, *shown[:2], steps), *shown[2:]) for shown in PLACES])
    by_place.set_title(f"Place, {steps} steps, 4.9 M parameters each")
    _steps(all_layers, longest(rows, "all"))
    all_layers.set_title("Rank on all layers")
    _steps(one_layer, longest(rows, "mlp of layer 15"))
    one_layer.set_title("Rank on the MLP of one layer")
    for axes in figure.axes:
        axes.set_ylabel("held-out loss (nats a token)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _rates(axes: Axes, curves: Sequence[tuple[Curve, str, str]]) -> None:
    """A line each, labelled at its left end, with a mark where it is lowest."""
    curves = [found for found in curves if found[0]]
    for curve, label, colour in curves:
        axes.plot(*zip(*curve, strict=True), ".-", color=colour, linewidth=1.5)
        axes.plot(*best(curve), "v", color=colour, markersize=7)
        place = {"xytext": (-4, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
        axes.annotate(label, curve[0], color=colour, fontsize=9, **place)
    lowest = min((best(curve)[1] for curve, _, _ in curves), default=0)
    axes.set_ylim(lowest - 0.02, lowest + 0.25)  # what diverges leaves through the top
    axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.set_xlabel("learning rate")


def _steps(axes: Axes, curves: Mapping[int, Curve]) -> None:
    """A line a rank, labelled at its right end."""
    for (r, curve), colour in zip(sorted(curves.items()), BLUES, strict=False):
        axes.plot(*zip(*curve, strict=True), ".-", color=colour, linewidth=1.5)
        place = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"r {r}", curve[-1], color=colour, fontsize=9, **place)
    axes.set_xscale("log")
    ticks = sorted({step for curve in curves.values() for step, _ in curve})
    axes.set_xticks(ticks, [str(step) for step in ticks])
    axes.minorticks_off()
    axes.set_xlabel("step")
