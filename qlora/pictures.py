"""What people look at after a run: the loss curve, and how much of each layer a merge kept."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def plot_loss(
    rows: Sequence[Mapping[str, Any]], path: Path, *, per: str = "supervised token"
) -> None:
    """Training loss as a line and evaluation loss as points over optimizer steps, as a PNG."""
    from matplotlib.figure import Figure

    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    evals = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="#2b6cb0", linewidth=1.8, label="training")
    if evals:
        axes.plot(
            *zip(*evals, strict=True), "o-", color="#c05621", linewidth=1.2, label="evaluation"
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"loss (nats per {per})")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if train or evals:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def by_kind(
    layers: Mapping[str, dict[str, float]],
) -> dict[str, list[tuple[int, dict[str, float]]]]:
    """What is known of each layer, by the last part of its name; with its number, in that order."""
    kinds: dict[str, list[tuple[int, dict[str, float]]]] = {}
    for name, facts in layers.items():
        number = re.search(r"\d+", name)
        point = (int(number[0]) if number else 0, facts)
        kinds.setdefault(name.rpartition(".")[2], []).append(point)
    return {kind: sorted(found, key=lambda point: point[0]) for kind, found in kinds.items()}


def plot_merge(report: Mapping[str, Any], path: Path) -> None:
    """How much each layer changes and how much of that is kept, and the loss, as a PNG.

    Args:
        report: what merge_report.json holds.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    verify = report["verify"]
    figure = Figure(figsize=(11 if verify else 8, 4.5), layout="constrained")
    grid = figure.add_gridspec(2, 2 if verify else 1, width_ratios=[3, 1] if verify else [1])
    changes, kept = (figure.add_subplot(grid[row, 0]) for row in (0, 1))
    for kind, found in by_kind(report["layers"]).items():
        places = [place for place, _ in found]
        ratios = [facts["delta_over_weight"] for _, facts in found]
        changes.plot(places, ratios, ".-", linewidth=1, label=kind)
        kept.plot(places, [facts["kept"] for _, facts in found], ".-", linewidth=1)
    changes.set_ylabel("|change| / |weight|")
    changes.set_ylim(bottom=0)
    changes.legend(frameon=False, ncols=4, fontsize=8)
    kept.set_ylabel("share of the change kept")
    kept.set_ylim(0, max(1.1, *(facts["kept"] + 0.05 for facts in report["layers"].values())))
    kept.axhline(1, color="black", linewidth=0.6)
    kept.set_xlabel("layer")
    for axes in (changes, kept):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    shown = [changes, kept]
    if verify:
        bars = figure.add_subplot(grid[:, 1])
        values = [verify[f"loss_{which}"] for which in ("base", "live", "merged")]
        colors = ["#a0aec0", "#2b6cb0", "#c05621"]
        drawn = bars.bar(["4-bit base", "live", "merged"], values, color=colors)
        bars.bar_label(drawn, fmt="%.4f", fontsize=8)
        bars.set_ylabel("loss (nats per supervised token)")
        share = "no gain" if verify["kept"] is None else f"{verify['kept']:.2%} of the gain kept"
        bars.set_title(f"{share}\nKL to live {verify['kl']:.4f}", fontsize=10)
        shown.append(bars)
    for axes in shown:
        axes.grid(alpha=0.25, axis="y")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
