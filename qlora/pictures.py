"""Figures: the curves of a run, and how much of each layer's change a merge kept.

A figure is written as a PNG, or as an SVG for a page in light or dark mode. The colours are those
of Okabe and Ito (2008), for colour-blind readers; lines also differ by style or marker, for print
in grey.
"""

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

INK, BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY = (
    "#24292f", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c959f",
)  # fmt: skip
LINES = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, INK)
AREAS = (*LINES, "#f0e442", "#a6761d", GREY)
MARKERS = "os^vDPX*"  # 8 markers for 7 colours: the first 56 lines differ
PANELS = {
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
    "peak_bytes": "peak memory",
}
SMOOTHED = 30  # each point of the smooth line is the mean over 1/30 of the rows
MAX_MARKERS = 40  # a line of at most this many rows has markers
MAX_POINTS = 500  # of a line: more look the same, and make an SVG of a megabyte
GIB = 2**30

Row = Mapping[str, Any]


def draw_run(
    rows: Sequence[Row], *, per: str = "supervised token", total_bytes: int | None = None
) -> Figure:
    """Loss over optimizer steps, raw and smoothed, with evaluations; below it the other curves.

    `rows` are of metrics.jsonl, `per` is the unit of the loss, `total_bytes` the device's memory.
    """
    panels = [key for key in PANELS if any(row.get(key) is not None for row in rows)]
    figure = Figure(figsize=(8, 4.9 if panels else 3.4), layout="constrained")
    heights = (2.4, 1) if panels else (1,)
    grid = figure.add_gridspec(len(heights), max(len(panels), 1), height_ratios=heights)
    _draw_loss(figure.add_subplot(grid[0, :]), rows, per)
    for column, key in enumerate(panels):
        axes = figure.add_subplot(grid[1, column])
        _style(axes, size=8, ticks=3)
        title, (steps, values) = PANELS[key], _series(rows, key)
        if key == "peak_bytes":  # the peak so far as an area, the device's memory as a line
            gib, total = values / GIB, (total_bytes or 0) / GIB
            shown = _thinned(len(gib))
            axes.fill_between(steps[shown], gib[shown], color=BLUE, alpha=0.25, linewidth=0)
            axes.plot(steps[shown], gib[shown], color=BLUE, linewidth=1.6)
            if total:
                axes.axhline(total, color=INK, linewidth=1, linestyle="--")
            planned = _series(rows, "planned_bytes")[1] / GIB
            if len(planned):
                axes.axhline(planned[-1], color=VERMILION, linewidth=1.2, linestyle=":")
            highest = max([total or float(gib.max()), *planned[-1:]])
            axes.set_ylim(0, 1.12 * highest or 1)
            title = f"memory: {gib[-1]:.1f}{f' of {total:.0f}' if total else ''} GiB"
            title += f", planned {planned[-1]:.1f}" if len(planned) else ""
        else:
            _draw_curve(axes, steps, values, smooth=key != "learning_rate")
        if key == "learning_rate":
            axes.yaxis.set_major_formatter(_short)
        axes.set_title(title, fontsize=9, loc="left", color=INK)
    for axes in figure.axes:
        axes.set_xlim(0, 1.02 * max((row["step"] for row in rows), default=1))
    return figure


def _series(rows: Sequence[Row], key: str) -> tuple[Any, Any]:
    """Steps and values of the rows that have `key`, an array each."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def _draw_loss(axes: Axes, rows: Sequence[Row], per: str) -> None:
    _style(axes, x="optimizer step", y=f"loss (nats per {per})")
    steps, values = _series(rows, "loss")
    if len(steps):
        line = _draw_curve(axes, steps, values, smooth=True)
        smooth = " (smoothed)" if len(axes.lines) > 1 else ""
        line.set_label(f"training{smooth}, {_last(line.get_ydata())} at the end")
        not_finite = steps[~np.isfinite(values)]
        if len(not_finite):
            axes.axvspan(not_finite[0], steps[-1], color=GREY, alpha=0.25, label="not a number")
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
    # An axis that starts at 0 would flatten lines far above 0.
    drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    low, top = min(drawn[np.isfinite(drawn)], default=0.0), axes.get_ylim()[1]
    if low > 0.4 * top:
        axes.set_ylim(bottom=low - 0.2 * (top - low))


def _draw_curve(axes: Axes, steps: Any, values: Any, *, smooth: bool) -> Any:
    """Draw and return a line on an axis from 0; a smoothed line is drawn over the raw values."""
    width = len(values) // SMOOTHED if smooth else 0
    top = _top(values)
    if width > 1:
        is_long = len(values) > MAX_POINTS
        axes.plot(steps, values, color=BLUE, alpha=0.3, linewidth=0.7, rasterized=is_long)
        values = smoothed(values, width)
        top = min(top, 1.4 * _top(values))  # a few spikes would flatten the rest
    shown = _thinned(len(values))
    style = ".-" if len(values) <= MAX_MARKERS else "-"
    (line,) = axes.plot(
        steps[shown], values[shown], style, color=BLUE, linewidth=1.6, clip_on=False
    )
    axes.set_ylim(0, top)
    return line


def _thinned(count: int) -> Any:
    """At most MAX_POINTS indices below `count`, including the first and the last."""
    return np.linspace(0, count - 1, min(count, MAX_POINTS)).round().astype(int)


def smoothed(values: Any, width: int) -> Any:
    """The mean over a window of `width` around each value, shorter at the ends; skips NaN, inf."""
    known = np.isfinite(values)
    sums, counts = (
        np.concatenate([[0.0], np.cumsum(x)]) for x in (np.where(known, values, 0.0), known)
    )
    i = np.arange(len(values))
    low, high = np.maximum(i - width // 2, 0), np.minimum(i + width // 2 + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])


def _top(values: Any) -> float:
    """The upper end of an axis that starts at 0."""
    known = values[np.isfinite(values)]
    return 1.05 * float(known.max()) if len(known) and known.max() > 0 else 1.0


def _last(values: Any) -> str:
    return f"{values[-1]:.4f}" if np.isfinite(values[-1]) else "not a number"


def _short(rate: float, _: float) -> str:
    """`5e-4`"""
    return f"{rate:.1e}".replace(".0e", "e").replace("e-0", "e-") if rate else "0"


def _style(axes: Axes, *, x: str = "", y: str = "", size: int = 9, ticks: int = 9) -> None:
    """Thin lines, the labels of both axes, and at most `ticks` whole numbers on the x axis."""
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(GREY)
    axes.tick_params(labelsize=size, color=GREY, labelcolor=INK)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    if ticks:
        axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")


def by_kind(
    layers: Mapping[str, dict[str, float]],
) -> dict[str, list[tuple[int, dict[str, float]]]]:
    """(index, facts) of the layers in order, grouped by the last part of their names."""
    kinds: dict[str, list[tuple[int, dict[str, float]]]] = {}
    for name, facts in layers.items():
        index = int((re.findall(r"\d+", name) or ["0"])[0])
        kinds.setdefault(name.rpartition(".")[2], []).append((index, facts))
    return {kind: sorted(points, key=lambda point: point[0]) for kind, points in kinds.items()}


def draw_merge(report: Mapping[str, Any]) -> Figure:
    """Change and kept share of each kind of layer in merge_report.json, and bars of its losses."""
    verify = report["verify"]
    figure = Figure(figsize=(11 if verify else 8, 4.8), layout="constrained")
    grid = figure.add_gridspec(2, 2 if verify else 1, width_ratios=[3, 1] if verify else [1])
    changes, kept = (figure.add_subplot(grid[row, 0]) for row in (0, 1))
    _style(changes, y="|change| / |weight|")
    _style(kept, x="layer", y="share of the change kept")
    for i, (kind, points) in enumerate(by_kind(report["layers"]).items()):
        for axes, key in ((changes, "delta_over_weight"), (kept, "kept")):
            axes.plot(
                [index for index, _ in points], [facts[key] for _, facts in points], label=kind,
                color=LINES[i % len(LINES)], marker=MARKERS[i % len(MARKERS)], markersize=4,
                linewidth=1,
            )  # fmt: skip
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    changes.set_ylim(bottom=0)
    legend: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1), "frameon": False, "ncols": 4}
    changes.legend(**legend, fontsize=9, labelcolor=INK)
    kept.set_ylim(0, max(1.1, *(facts["kept"] + 0.05 for facts in report["layers"].values())))
    kept.axhline(1, color=INK, linewidth=0.6)
    if verify:
        axes = figure.add_subplot(grid[:, 1])
        _style(axes, y="loss (nats per supervised token)", ticks=0)
        axes.grid(visible=False, axis="x")
        losses = [verify[f"loss_{which}"] for which in ("base", "live", "merged")]
        base = "16-bit base" if report.get("trained_on") == "16bit" else "4-bit base"
        bars = axes.bar([base, "live", "merged"], losses, color=[GREY, BLUE, ORANGE])
        axes.bar_label(bars, fmt="%.4f", fontsize=9, color=INK)
        share = "no gain" if verify["kept"] is None else f"{verify['kept']:.2%} of the gain kept"
        axes.set_title(f"{share}\nKL to live {verify['kl']:.4f}", fontsize=10, color=INK)
    return figure


def draw_memory(
    moments: Sequence[tuple[str, Mapping[str, int]]], total_bytes: int | None = None
) -> Figure:
    """Memory over a training step, stacked by kind: (part of the step, bytes by kind) in order.

    The kinds that are largest at the peak have an area each, the smallest share one."""
    sums = [sum(held.values()) for _, held in moments]
    at_peak = moments[int(np.argmax(sums))][1]
    every = {kind for _, held in moments for kind in held}
    largest = sorted(every, key=lambda kind: -max(held.get(kind, 0) for _, held in moments))
    shown, rest = largest[: len(AREAS) - 1], largest[len(AREAS) - 1 :]
    rows = [[held.get(kind, 0) / GIB for _, held in moments] for kind in shown]
    rows.append([sum(held.get(kind, 0) for kind in rest) / GIB for _, held in moments])
    names = [*shown, "others"]
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.add_subplot()
    _style(axes, y="GiB", ticks=0)
    order = sorted(range(len(rows)), key=lambda i: float(np.ptp(rows[i])))  # constant ones below
    axes.stackplot(
        range(len(moments)), [rows[i] for i in order], labels=[names[i] for i in order],
        colors=[AREAS[i] for i in order], linewidth=0,
    )  # fmt: skip
    starts = [i for i, (name, _) in enumerate(moments) if i == 0 or moments[i - 1][0] != name]
    axes.set_xticks(starts, [moments[i][0] for i in starts], rotation=20, ha="left", fontsize=8)
    if total_bytes:
        axes.axhline(total_bytes / GIB, color=INK, linewidth=1, linestyle="--")
    axes.set_xlim(0, len(moments) - 1)
    axes.set_ylim(0, 1.08 * max(max(sums), total_bytes or 0) / GIB)
    axes.set_title(
        f"peak {sum(at_peak.values()) / GIB:.2f} GiB"
        + (f" of {total_bytes / GIB:.1f} GiB" if total_bytes else ""),
        fontsize=10, loc="left", color=INK,
    )  # fmt: skip
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False, fontsize=8)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG."""
    figure.savefig(path, dpi=150)


def as_svg(figure: Figure, title: str) -> str:
    """An SVG element in the page's colours: `currentColor` for text, variables like `--blue`."""
    text = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue().partition("<svg")[2]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # figures of one page share ids
    svg = re.sub(r'^(.*?) (?:width|height)="[^"]*"', r"\1", svg, count=1, flags=re.DOTALL)
    for name, color in (("blue", BLUE), ("grey", GREY), ("page", "#ffffff")):
        svg = svg.replace(color, f"var(--{name}, {color})")
    return f'<svg role="img" aria-label="{title}"' + svg.replace(INK, "currentColor")
