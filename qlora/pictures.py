"""Figures for people: the curves of a run, and how much of each layer a merge kept.

A figure is drawn once and written as a PNG, or as an SVG for a page that may be light or dark. The
colours are those of Okabe and Ito (2008), which colour-blind readers tell apart; lines also differ
by style or marker, for print in grey.
"""

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


INK, BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY = (
    "#24292f", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c959f",
)  # fmt: skip
MARKERS = "os^vDPX*"  # one more than there are colours, so that pairs repeat late
PANELS = {
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens a second",
    "peak_bytes": "peak memory",
}
SMOOTHED = 30  # a point of the smooth line is the mean of a 30th of the rows
FEW = 40  # up to so many rows are drawn with a marker each
MANY = 500  # points of a line: more look the same, and would make an SVG a megabyte
GIB = 2**30

Row = Mapping[str, Any]
Facts = dict[str, float]


# ---- a run ----


def draw_run(
    rows: Sequence[Row], *, per: str = "supervised token", total_bytes: int | None = None
) -> "Figure":
    """Loss over optimizer steps, raw and smoothed, with evaluations; below it the other curves.

    Args:
        rows: of metrics.jsonl.
        per: what the loss is a mean over.
        total_bytes: memory of the device, to compare the peak with.
    """
    from matplotlib.figure import Figure

    panels = [key for key in PANELS if any(row.get(key) is not None for row in rows)]
    figure = Figure(figsize=(8, 4.9 if panels else 3.4), layout="constrained")
    heights = (2.4, 1) if panels else (1,)
    grid = figure.add_gridspec(len(heights), max(len(panels), 1), height_ratios=heights)
    _draw_loss(figure.add_subplot(grid[0, :]), rows, per)
    for column, key in enumerate(panels):
        axes = figure.add_subplot(grid[1, column])
        steps, values = _series(rows, key)
        _style(axes, size=8, ticks=3)
        axes.set_title(PANELS[key], fontsize=9, loc="left", color=INK)
        if key == "peak_bytes":
            _draw_memory(axes, steps, values / GIB, total_bytes)
        else:
            _draw_curve(axes, steps, values, smooth=key != "learning_rate")
        if key == "learning_rate":
            axes.yaxis.set_major_formatter(_short)
    for axes in figure.axes:
        axes.set_xlim(0, 1.02 * max((row["step"] for row in rows), default=1))
    return figure


def _series(rows: Sequence[Row], key: str) -> tuple[Any, Any]:
    """Steps and values of the rows that have one, an array each."""
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    pairs = np.array(found, dtype=float).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _draw_loss(axes: "Axes", rows: Sequence[Row], per: str) -> None:
    _style(axes)
    axes.set_xlabel("optimizer step", color=INK)
    axes.set_ylabel(f"loss (nats per {per})", color=INK)
    steps, values = _series(rows, "loss")
    if len(steps):
        line = _draw_curve(axes, steps, values, smooth=True)
        smooth = " (smoothed)" if len(axes.lines) > 1 else ""
        line.set_label(f"training{smooth}, {_last(line.get_ydata())} at the end")
        lost = steps[~np.isfinite(values)]
        if len(lost):
            axes.axvspan(lost[0], steps[-1], color=GREY, alpha=0.25, label="not a number")
    steps, values = _series(rows, "eval_loss")
    if len(steps):
        label = f"evaluation, {_last(values)} at the end"
        axes.plot(
            steps, values, "D--", color=VERMILION, linewidth=0.9, markersize=5.5,
            markeredgecolor="white", markeredgewidth=0.8, label=label, zorder=4, clip_on=False,
        )  # fmt: skip
        axes.set_ylim(top=max(axes.get_ylim()[1], _top(values)))
    if not axes.lines:
        return
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    # An axis from 0 would press lines that all are high against its top.
    drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    low, top = min(drawn[np.isfinite(drawn)], default=0.0), axes.get_ylim()[1]
    if low > 0.4 * top:
        axes.set_ylim(bottom=low - 0.2 * (top - low))


def _draw_curve(axes: "Axes", steps: Any, values: Any, *, smooth: bool) -> Any:
    """Draw a line on an axis from 0, over the raw values where it is smoothed; returns it."""
    width = len(values) // SMOOTHED if smooth else 0
    points, top = "." if len(values) <= FEW else "", _top(values)
    if width > 1:
        raw, values = values, smoothed(values, width)
        axes.plot(steps, raw, color=BLUE, alpha=0.3, linewidth=0.7, rasterized=len(raw) > MANY)
        top = min(top, 1.4 * _top(values))  # a few spikes may not flatten the rest
    some = _some(len(values))
    look: Any = {"color": BLUE, "linewidth": 1.6, "clip_on": False}
    (line,) = axes.plot(steps[some], values[some], points + "-", **look)
    axes.set_ylim(0, top)
    return line


def _some(count: int) -> Any:
    """At most MANY indices below `count`, the first and the last included."""
    return np.linspace(0, count - 1, min(count, MANY)).round().astype(int)


def _draw_memory(axes: "Axes", steps: Any, gib: Any, total_bytes: int | None) -> None:
    """The peak so far as an area, and the device's memory as a dashed line."""
    some = _some(len(gib))
    axes.fill_between(steps[some], gib[some], color=BLUE, alpha=0.25, linewidth=0)
    axes.plot(steps[some], gib[some], color=BLUE, linewidth=1.6)
    total = (total_bytes or 0) / GIB
    if total:
        axes.axhline(total, color=INK, linewidth=1, linestyle="--")
    title = f"memory: {gib[-1]:.1f}{f' of {total:.0f}' if total else ''} GiB"
    axes.set_title(title, fontsize=9, loc="left", color=INK)
    axes.set_ylim(0, 1.12 * (total or float(gib.max())) or 1)


def smoothed(values: Any, width: int) -> Any:
    """The mean of `width` values around each, fewer at the ends, over the finite ones."""
    known = np.isfinite(values)
    sums, counts = (
        np.concatenate([[0.0], np.cumsum(x)]) for x in (np.where(known, values, 0.0), known)
    )
    places = np.arange(len(values))
    low, high = np.maximum(places - width // 2, 0), np.minimum(places + width // 2 + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])


def _top(values: Any) -> float:
    """The upper end of an axis that begins at 0."""
    known = values[np.isfinite(values)]
    return 1.05 * float(known.max()) if len(known) and known.max() > 0 else 1.0


def _last(values: Any) -> str:
    return f"{values[-1]:.4f}" if np.isfinite(values[-1]) else "not a number"


def _short(rate: float, _: float = 0) -> str:
    """`5e-4`"""
    return f"{rate:.1e}".replace(".0e", "e").replace("e-0", "e-") if rate else "0"


def _style(axes: "Axes", *, size: int = 9, ticks: int = 9) -> None:
    """Quiet axes, with at most `ticks` ticks for steps or layers."""
    from matplotlib.ticker import MaxNLocator

    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(GREY)
    axes.tick_params(labelsize=size, color=GREY, labelcolor=INK)
    if ticks:
        axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")


# ---- a merge ----


def by_kind(layers: Mapping[str, dict[str, float]]) -> dict[str, list[tuple[int, Facts]]]:
    """Figures of the layers by the last part of their names, each with its number, in order."""
    kinds: dict[str, list[tuple[int, Facts]]] = {}
    for name, facts in layers.items():
        number = re.search(r"\d+", name)
        point = (int(number[0]) if number else 0, facts)
        kinds.setdefault(name.rpartition(".")[2], []).append(point)
    return {kind: sorted(found, key=lambda point: point[0]) for kind, found in kinds.items()}


def draw_merge(report: Mapping[str, Any]) -> "Figure":
    """Change and kept share of each kind of layer, and the loss as bars where it was measured.

    Args:
        report: what merge_report.json holds.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    verify = report["verify"]
    figure = Figure(figsize=(11 if verify else 8, 4.8), layout="constrained")
    grid = figure.add_gridspec(2, 2 if verify else 1, width_ratios=[3, 1] if verify else [1])
    changes, kept = (figure.add_subplot(grid[row, 0]) for row in (0, 1))
    for axes in (changes, kept):
        _style(axes)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    colors = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, INK)
    for i, (kind, found) in enumerate(by_kind(report["layers"]).items()):
        places = [place for place, _ in found]
        look: Any = {"color": colors[i % len(colors)], "marker": MARKERS[i % len(MARKERS)]}
        look |= {"markersize": 4, "linewidth": 1}
        changes.plot(places, [facts["delta_over_weight"] for _, facts in found], **look, label=kind)
        kept.plot(places, [facts["kept"] for _, facts in found], **look)
    changes.set_ylabel("|change| / |weight|", color=INK)
    changes.set_ylim(bottom=0)
    legend: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1), "frameon": False, "ncols": 4}
    changes.legend(**legend, fontsize=9, labelcolor=INK)
    kept.set_ylabel("share of the change kept", color=INK)
    kept.set_ylim(0, max(1.1, *(facts["kept"] + 0.05 for facts in report["layers"].values())))
    kept.axhline(1, color=INK, linewidth=0.6)
    kept.set_xlabel("layer", color=INK)
    if verify:
        _draw_verified(figure.add_subplot(grid[:, 1]), verify)
    return figure


def _draw_verified(axes: "Axes", verify: Mapping[str, Any]) -> None:
    _style(axes, ticks=0)
    axes.grid(visible=False, axis="x")
    values = [verify[f"loss_{which}"] for which in ("base", "live", "merged")]
    bars = axes.bar(["4-bit base", "live", "merged"], values, color=[GREY, BLUE, ORANGE])
    axes.bar_label(bars, fmt="%.4f", fontsize=9, color=INK)
    axes.set_ylabel("loss (nats per supervised token)", color=INK)
    share = "no gain" if verify["kept"] is None else f"{verify['kept']:.2%} of the gain kept"
    axes.set_title(f"{share}\nKL to live {verify['kl']:.4f}", fontsize=10, color=INK)


# ---- files and pages ----


def save_png(figure: "Figure", path: Path) -> None:
    """Write a figure at the resolution of a page."""
    figure.savefig(path, dpi=150)


def as_svg(figure: "Figure", title: str) -> str:
    """The figure as an SVG element that takes its colours from the page: `currentColor` for ink,
    variables such as `--blue` for the others."""
    from matplotlib import rc_context

    text = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue().partition("<svg")[2]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # the ids repeat between the figures of a page
    svg = re.sub(r'^(.*?) (?:width|height)="[^"]*"', r"\1", svg, count=1, flags=re.DOTALL)
    for name, color in (("blue", BLUE), ("grey", GREY), ("page", "#ffffff")):
        svg = svg.replace(color, f"var(--{name}, {color})")
    return f'<svg role="img" aria-label="{title}"' + svg.replace(INK, "currentColor")
