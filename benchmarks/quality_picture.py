"""The picture of quality.py: held-out loss against learning rate, rank, targets and steps."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = Mapping[str, Any]
Curve = Sequence[tuple[float, float]]
Line = tuple[Curve, str, str]  # points, label, colour
Way = tuple[str, int, str, str]  # place, r, label, colour
RANKS: list[Way] = [
    ("full", 0, "full", "#1a202c"),
    ("all", 1, "r 1", "#63b3ed"),
    ("all", 16, "r 16", "#2b6cb0"),
    ("all", 64, "r 64", "#1a365d"),
]
PLACES: list[Way] = [
    ("attention", 42, "attention", "#c05621"),
    ("mlp", 26, "MLP", "#2f855a"),
    ("all", 16, "all", "#2b6cb0"),
]
ONE_LAYER = "mlp of layer 15"


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
    """The (rate, loss) with the lowest loss."""
    return min(curve, key=lambda point: point[1])


def by_step(rows: Iterable[Row], place: str, r: int) -> Curve:
    """(step, held-out loss) of the longest runs, at each step the lowest over their rates."""
    own = [row for row in rows if (row["place"], row["r"]) == (place, r)]
    most = max((row["steps"] for row in own), default=0)
    curves = [row["test_loss"] for row in own if row["steps"] == most]
    return [min(points, key=lambda point: point[1]) for points in zip(*curves, strict=True)]


def draw(rows: Sequence[Row], path: Path, *, steps: int) -> None:
    """Loss after `steps` against the rate, by rank and by place; loss against steps, by rank."""
    figure = Figure(figsize=(8, 6.4), layout="constrained")
    (by_rank, by_place), (all_layers, one_layer) = figure.subplots(2, 2)
    for axes, ways in ((by_rank, RANKS), (by_place, PLACES)):
        _rates(axes, [(by_rate(rows, *way[:2], steps), *way[2:]) for way in ways])
    _steps(all_layers, [(by_step(rows, *way[:2]), *way[2:]) for way in RANKS])
    _steps(one_layer, [(by_step(rows, ONE_LAYER, r), *way) for _, r, *way in RANKS])
    titles = {
        by_rank: f"Rate and rank: loss after {steps} steps",
        by_place: "Place: attention r 42, MLP r 26, all r 16",
        all_layers: "Rank: all layers, best rate at each step",
        one_layer: "Capacity: the MLP of one layer of 30",
    }
    for axes, title in titles.items():
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_ylabel("held-out loss (nats a token)")
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _rates(axes: Axes, lines: Sequence[Line]) -> None:
    """Draw one line each, with a mark at its minimum."""
    lines = [line for line in lines if line[0]]
    lowest = min((best(curve)[1] for curve, _, _ in lines), default=0)
    axes.set_xscale("log")
    axes.set_ylim(lowest - 0.03, lowest + 0.22)  # what diverges leaves through the top
    for curve, _, colour in lines:
        axes.plot(*zip(*curve, strict=True), ".-", color=colour, linewidth=1.5)
        axes.plot(*best(curve), "v", color=colour, markersize=8)
    rates = sorted({rate for curve, _, _ in lines for rate, _ in curve})
    ticks = [rate for rate in rates if f"{rate:.2e}"[:4] in ("1.00", "3.16")]  # half decades
    axes.set_xticks(ticks, [f"{rate:.0e}".replace("e-0", "e-") for rate in ticks])
    axes.margins(x=0.3)
    axes.set_xlabel("learning rate")
    _label(axes, lines, end=0)


def _steps(axes: Axes, lines: Sequence[Line]) -> None:
    """Draw one line each, over the logarithm of the steps."""
    lines = [line for line in lines if line[0]]
    axes.set_xscale("log")
    for curve, _, colour in lines:
        axes.plot(*zip(*curve, strict=True), ".-", color=colour, linewidth=1.5)
    ticks = sorted({step for curve, _, _ in lines for step, _ in curve})
    axes.set_xticks(ticks, [f"{step:g}" for step in ticks])
    axes.margins(x=0.15)
    axes.set_xlabel("step")
    _label(axes, lines, end=-1)


def _label(axes: Axes, lines: Sequence[Line], *, end: int) -> None:
    """Label each line at its first point (end 0) or last (end -1), without overlap."""
    low, high = axes.get_ylim()
    at = -math.inf
    for curve, label, colour in sorted(lines, key=lambda line: line[0][end][1]):
        at = max(curve[end][1], at + 0.06 * (high - low))
        axes.annotate(
            label,
            (curve[end][0], at),
            (-6 if end == 0 else 6, 0),
            textcoords="offset points",
            ha="right" if end == 0 else "left",
            va="center",
            color=colour,
            fontsize=9,
        )
