"""What the model answers before training and after it, for people to read: samples.jsonl.

A few rows of the evaluation data, or of the training data where there is none, spread over it. The
model reads each up to its last answer (of a row of text, the first half) and writes on, by its most
likely tokens, up to twice the length of the answer that was wanted, at most MAX_NEW_TOKENS. Nothing
random is drawn, so training goes as it does without. One prompt at a time: training's attention
takes no padding (qlora.fast.attention).

Left out: classifiers, whose answers evaluation counts.

The README.md beside what was made: what it is, how it was made, how to use it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora.config import TrainConfig
from qlora.data.chat_template import NO_LOSS, PROBE
from qlora.data.generation import decode, generate, generation_settings, prompt_ids
from qlora.data.objectives import OBJECTIVES
from qlora.errors import UserError
from qlora.files import SAMPLES, front_matter, read_samples, replace_text

MAX_NEW_TOKENS = 128


class Question(NamedTuple):
    """A row, cut in two."""

    prompt: list[int]
    wanted: list[int]
    max_new_tokens: int


def questions(
    config: TrainConfig, rows: Any, eval_rows: Any | None, max_length: int
) -> list[Question]:
    """What to ask, as many as `config.samples`, of prepared rows; prints which.

    Args:
        max_length: tokens that the model takes.
    """
    if not config.samples or OBJECTIVES[config.task].classifies:
        return []
    rows, of = (rows, "training") if eval_rows is None else (eval_rows, "evaluation")
    count = min(config.samples, len(rows))
    print(f"before and after training, {count} rows of the {of} data are answered: {SAMPLES}")
    found = []
    for row in (rows[i * len(rows) // count] for i in range(count)):
        prompt, wanted, room = row["input_ids"], row["labels"], max_length
        if config.task != "seq2seq":  # whose answer is apart
            begin, end = _last_answer(wanted)
            prompt, wanted, room = prompt[:begin], prompt[begin:end], max_length - begin
        found.append(Question(prompt, wanted, min(MAX_NEW_TOKENS, 2 * len(wanted), room)))
    return found


def _last_answer(labels: list[int]) -> tuple[int, int]:
    """Where the last run of tokens with loss begins and ends; its half where nothing is before."""
    end = max(i for i, label in enumerate(labels) if label != NO_LOSS) + 1
    begin = max((i + 1 for i in range(end) if labels[i] == NO_LOSS), default=0)
    return begin or (end + 1) // 2, end


def ask(
    folder: Path,
    when: str,
    asked: list[Question],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write the model's answers into `folder`, as those `when` "before" or "after".

    A row has prompt, wanted, before and after; what the file has already of such a row stays.
    """
    known = {(row["prompt"], row["wanted"]): row for row in read_samples(folder)}
    rows = []
    for prompt, wanted, max_new_tokens in asked:
        pair = _shown(tokenizer, prompt), decode(tokenizer, wanted)
        row = {"prompt": pair[0], "wanted": pair[1], "before": None, "after": None}
        settings = generation_settings(model, tokenizer, max_new_tokens)
        (answer,) = generate(model, tokenizer, [prompt], settings)
        rows.append(row | known.get(pair, {}) | {when: answer})
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    replace_text(folder / SAMPLES, "".join(lines))


def _shown(tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> str:
    """The user's words where the chat template has its own around them, else the whole prompt."""
    text = str(tokenizer.decode(prompt, skip_special_tokens=False))
    if tokenizer.chat_template:
        try:
            probe = prompt_ids(tokenizer, [{"role": "user", "content": PROBE}])
        except UserError:  # it wants more than a user's turn
            return text
        begin, _, end = str(tokenizer.decode(probe, skip_special_tokens=False)).partition(PROBE)
        inner = text.removeprefix(begin).removesuffix(end)
        if begin + inner + end == text:
            return inner
    return text


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
    text = f"""{front_matter(base, "library_name: peft", "lora", "qlora")}
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
