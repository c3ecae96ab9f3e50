"""What people look at after a run: the loss curve, and the cards that say what was made and how."""

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


def write_adapter_card(folder: Path, facts: Mapping[str, Any]) -> None:
    """README.md of an adapter: what it is, how it was trained, how to use it.

    Args:
        facts: base_model, data, rows, r, lora_alpha, target_modules, steps, learning_rate,
            loss, eval_loss (or None), quant_type, blocksize, double_quant; and where there are
            such: task, eval_accuracy, eval_f1, a classifier's labels and heads.
    """
    found = {"training loss": facts["loss"], "evaluation loss": facts["eval_loss"]}
    found |= {name: facts.get(f"eval_{name}") for name in ("accuracy", "f1")}
    losses = ", ".join(f"{name} {x:.4f}" for name, x in found.items() if x is not None)
    double = " with double quantization" if facts["double_quant"] else ""
    base = str(facts["base_model"])
    task = facts.get("task", "causal-lm")
    of_task = "" if task == "causal-lm" else f', task="{task}"'
    head = ""
    if "labels" in facts:
        of_task += f", labels={list(facts['labels'])!r}"
        head = f" Trained in full beside it: {', '.join(facts['heads'])}."
    text = f"""{_front_matter(base, "library_name: peft", "lora", "qlora")}
# LoRA adapter for {Path(base).name}

Trained with QLoRA: the base was frozen in 4 bits ({facts["quant_type"].upper()}, blocksize
{facts["blocksize"]}{double}), the adapter has rank {facts["r"]} and lora_alpha
{facts["lora_alpha"]:g} on {facts["target_modules"]}.{head}

| | |
|---|---|
| data | {facts["data"]} ({facts["rows"]} rows) |
| optimizer steps | {facts["steps"]} |
| learning rate | {facts["learning_rate"]:.3g} |
| at the end | {losses or "not logged"} |

![loss](loss.png)

Use it live on the 4-bit base it was trained on:

```python
from qlora import load_base, load_adapter
model = load_adapter(load_base("{base}"{of_task}), "path/to/this/folder")
```

or with PEFT (`PeftModel.from_pretrained`), or merged: `python merge_dequant.py --adapter
path/to/this/folder --output-dir merged`.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def write_merge_card(folder: Path, report: Mapping[str, Any]) -> None:
    """README.md of a merged checkpoint: what was merged onto what, and what was measured."""
    onto = {
        "nf4": f"the base dequantized from 4 bits ({report['quant_type'].upper()}, blocksize "
        f"{report['blocksize']}), as it was in training",
        "original": "the original weights, which the adapter did not see in training",
    }[report["onto"]]
    verify = report["verify"]
    measured = "Not measured: merge with `--verify DATA` to compare it with the live adapter."
    if verify:
        measured = (
            f"On {verify['rows']} rows: loss {verify['loss_base']:.4f} for the 4-bit base, "
            f"{verify['loss_live']:.4f} with the live adapter, {verify['loss_merged']:.4f} merged; "
            f"KL to the live adapter {verify['kl']:.2g} nats a token, the same most likely token "
            f"in {verify['agreement']:.1%} of the places."
        )
        if verify["kept"] is not None:
            measured += f" That keeps {verify['kept']:.2%} of what training gained."
    picture = "\n![what each layer kept](merge.png)" if report["layers"] else ""
    base = str(report["base_model"])
    text = f"""{_front_matter(base, "library_name: transformers", "qlora", "merged")}
# {Path(base).name} with a LoRA adapter merged in

{_adapters(report["adapters"])} folded in fp32 into {onto},
and rounded once to {report["format"]}.

{measured}
{picture}
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _adapters(weights: Mapping[str, float]) -> str:
    """Each adapter by name, with its weight where that is not 1."""
    names = [
        f"`{a}`" + (f" times {weight:g}" if weight != 1 else "") for a, weight in weights.items()
    ]
    return (
        f"The adapter {names[0]} was"
        if len(names) == 1
        else f"The adapters {', '.join(names)} were"
    )


def _front_matter(base_model: str, *lines: str) -> str:
    """What the hub reads; a base that is a local folder has no name there and is left out."""
    *settings, first, second = lines
    path = Path(base_model).expanduser()
    if not path.is_absolute() and not path.exists():
        settings.insert(0, f"base_model: {base_model}")
    return "\n".join(["---", *settings, "tags:", f"- {first}", f"- {second}", "---", ""])
