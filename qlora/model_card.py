"""The README.md beside what was made: what it is, how it was made, how to use it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
