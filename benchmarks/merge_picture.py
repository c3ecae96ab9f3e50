"""The README's picture: the share of the training gain that each merge method keeps.

    python benchmarks/merge_picture.py     redraws docs/merge.svg

The bars are the last records of each method for one adapter and its held-out data (E2E, rank 16) in
benchmarks/results/merge.jsonl. Their values are also in the file's metadata, so that a test can
detect an outdated picture. The colours are Okabe and Ito's, safe for all colour vision, on white,
so that it is readable on a dark page.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import RESULTS

PICTURE = Path(__file__).parents[1] / "docs" / "merge.svg"
ADAPTER, DATA = "ad_e2e", "e2e_test512"
OURS, OTHERS, TEXT = "#0072B2", "#E69F00", "#24292f"
ABOUT = "share of what training gained in held-out loss; SmolLM2-135M, E2E, rank 16"
WAYS = {  # name in the records -> group, label, whether it is ours
    "bf16 onto NF4 (the default)": ("16 bits", "this project", True),
    "bf16 onto the original weights": ("16 bits", "onto the original weights", False),
    "NF4, calibrated": ("4 bits", "this project", True),
    "NF4, GPTQ": ("4 bits", "GPTQ", False),
    "NF4 by PEFT": ("4 bits", "PEFT's merge", False),
}


def kept(file: Path) -> dict[str, float]:
    """Method -> share of the training gain that the merged model keeps, in the order of WAYS."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    found = {
        row["way"]: row["kept"] for row in rows if (row["adapter"], row["data"]) == (ADAPTER, DATA)
    }
    return {way: found[way] for way in WAYS}


def in_words(shares: Mapping[str, float]) -> str:
    """The values as text, for accessibility and for the test."""
    said = (f"{WAYS[way][0]}, {WAYS[way][1]}: {percent(share)}" for way, share in shares.items())
    return "; ".join(said)


def percent(share: float) -> str:
    """One decimal; two above 99.9 %."""
    return f"{100 * share:.2f} %" if share > 0.999 else f"{100 * share:.1f} %"


def draw(shares: Mapping[str, float], path: Path) -> None:
    """Draw one bar per method, in two groups."""
    matplotlib.rcParams["svg.hashsalt"] = "qlora"  # the same picture, the same file
    figure = Figure(figsize=(8, 3.7), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    axes = figure.add_subplot()
    title = "How much of the training is left after merging the adapter into the model"
    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold", color=TEXT)
    places = bars(axes, shares)
    axes.set_yticks(list(places.values()), [WAYS[way][1] for way in places], fontsize=11)
    axes.set_xlim(0, 1.14)
    axes.set_xticks([])
    axes.set_xlabel(ABOUT, fontsize=9, color=TEXT, loc="left")
    axes.invert_yaxis()
    axes.tick_params(length=0, colors=TEXT)
    axes.spines[:].set_visible(False)
    for label, way in zip(axes.get_yticklabels(), places, strict=True):
        label.set_fontweight("bold" if WAYS[way][2] else "normal")
    says = {"Description": in_words(shares), "Date": None, "Creator": None}
    figure.savefig(path, metadata=says)


def bars(axes: Axes, shares: Mapping[str, float]) -> dict[str, float]:
    """Draw the bars; returns the height of each."""
    places: dict[str, float] = {}
    at, group = 0.0, ""
    for way, share in shares.items():
        if WAYS[way][0] != group:
            group = WAYS[way][0]
            axes.text(0, at, f"into {group}", fontsize=10, va="center", color=TEXT, style="italic")
            at += 0.85
        axes.barh(at, 1, color="#eaeef2", height=0.72)
        axes.barh(at, share, color=OURS if WAYS[way][2] else OTHERS, height=0.72)
        axes.text(1.015, at, percent(share), fontsize=11, va="center", color=TEXT)
        places[way] = at
        at += 1
    return places


if __name__ == "__main__":
    draw(kept(RESULTS / "merge.jsonl"), PICTURE)
