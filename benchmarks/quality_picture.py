"""The picture of quality.py, and the table under it, from the records of its runs.

python benchmarks/quality_picture.py
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = Mapping[str, Any]
Curve = Sequence[tuple[float, float]]
LABELS = {"full": "full fine-tuning", "all": "all layers", "mlp": "MLP"}
COLOURS = {
    ("full", 0): "#1a202c",
    ("all", 1): "#90cdf4",
    ("all", 4): "#63b3ed",
    ("all", 16): "#2b6cb0",
    ("all", 256): "#1a365d",
    ("attention", 42): "#c05621",
    ("mlp", 26): "#2f855a",
}


def by_rate(rows: Iterable[Row], place: str, r: int, steps: int) -> Curve:
    """(learning rate, held-out loss after `steps`) of the runs that began with that many or more,
    lowest rate first. The rate is constant, so that a longer run passes through a shorter one."""
    found = {}
    for row in rows:
        if (row["place"], row["r"]) == (place, r):
            losses = dict(row["test_loss"])
            if steps in losses and math.isfinite(losses[steps]):
                found[row["learning_rate"]] = losses[steps]
    return sorted(found.items())


def best(curve: Curve) -> tuple[float, float]:
    """(rate, loss) at the vertex of the parabola through the best point and its neighbours, over
    the logarithm of the rate; the best point itself if it has not two."""
    i = min(range(len(curve)), key=lambda i: curve[i][1])
    if not 0 < i < len(curve) - 1:
        return curve[i]
    (x0, y0), (x1, y1), (x2, y2) = ((math.log(x), y) for x, y in curve[i - 1 : i + 2])
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    bend = (right - left) / (x2 - x0)
    x = (x0 + x1) / 2 - left / (2 * bend)
    return math.exp(x), y1 + left * (x - x1) + bend * (x - x0) * (x - x1)


def steps_of(rows: Iterable[Row], place: str, r: int) -> Curve:
    """(step, held-out loss) of the longest run, of those the best."""
    found = [row for row in rows if (row["place"], row["r"]) == (place, r)]
    if not found:
        return []
    longest = max(row["steps"] for row in found)
    return min(
        (row["test_loss"] for row in found if row["steps"] == longest), key=lambda c: c[-1][1]
    )


def draw(rows: Sequence[Row], path: Path, *, steps: int) -> None:
    """Loss after `steps` against the rate, by rank and by place; loss against steps, by rank."""
    figure = Figure(figsize=(8, 6.6), layout="constrained")
    (by_rank, by_place), (one_layer, all_layers) = figure.subplots(2, 2)
    _rates(by_rank, rows, steps, [("full", 0), ("all", 1), ("all", 16), ("all", 256)])
    by_rank.set_title("rate and rank", loc="left")
    _rates(by_place, rows, steps, [("attention", 42), ("mlp", 26), ("all", 16)])
    by_place.set_title("place, 4.9 M parameters each", loc="left")
    for axes, place in ((one_layer, "mlp of layer 15"), (all_layers, "all")):
        _steps(axes, rows, place)
    for axes in figure.axes:
        axes.set_ylabel("held-out loss (nats a token)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _rates(axes: Axes, rows: Sequence[Row], steps: int, shown: Sequence[tuple[str, int]]) -> None:
    """A curve a way of training, with a mark at its best."""
    for place, r in shown:
        curve = by_rate(rows, place, r, steps)
        if not curve:
            continue
        name = {"full": "full", "all": "all" if len({p for p, _ in shown}) > 2 else "LoRA"}
        label = name.get(place, place) + (f" r {r}" if r else "")
        (line,) = axes.plot(*zip(*curve, strict=True), ".-", linewidth=1.5)
        x, y = best(curve)
        axes.plot(x, y, "v", color=line.get_color())
        axes.annotate(label, (x, y), (0, -12), textcoords="offset points", ha="center")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")


def _steps(axes: Axes, rows: Sequence[Row], place: str) -> None:
    """A curve a rank of `place`, over the logarithm of the steps."""
    for r in sorted({row["r"] for row in rows if row["place"] == place}):
        curve = steps_of(rows, place, r)
        axes.plot(*zip(*curve, strict=True), ".-", linewidth=1.5)
        axes.annotate(f"r {r}", curve[-1], (4, 0), textcoords="offset points", va="center")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("step")
