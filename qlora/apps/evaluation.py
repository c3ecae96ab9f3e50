"""`evaluate(config)`: a model, or a base with and without its adapter, measured on rows.

Rows are prepared as for training (qlora.data.rows), so the loss is what train.py logs as
eval_loss. To write an answer the model reads each row up to its last part with loss: of a chat, up
to the mark that opens the assistant's last turn. Rows of `text` have no such place, and nothing to
answer.

What is found goes to the terminal as a table, and with all answers into one JSON file:

    {"model", "adapter", "data", "task", "rows", "supervised_tokens", "max_length",
     "max_new_tokens", "compute_dtype",
     "scores": {"base": {"loss", "perplexity", "exact_match", "rouge1", …, "bleu"}, "adapter": …},
     "answers": [{"request", "wanted", "base", "adapter"}]}

A whole model has one entry, "model", where the two stand. Of a classifier the base is left out: the
head is part of the adapter.

How good a model is on rows: the loss of what it was to write, and what it writes instead.

    loss          mean of -log p over supervised tokens, in nats; as evaluation in training has it
    perplexity    exp(loss): among so many equally likely tokens it chose, on average
    exact match   share of answers that are the wanted one, white space around them aside
    ROUGE-1/2/L   F1 of shared words, pairs of words, and the longest common subsequence: the mean
                  over answers, 0 to 1, as rouge_score computes it without stemming (Lin 2004)
    BLEU          shared runs of 1 to 4 words over all answers, 0 to 100, as sacrebleu computes it
                  by default (Papineni et al. 2002; Post 2018, arXiv:1804.08771)

rouge_score knows words of a-z and 0-9 alone, so ROUGE is left out where no wanted answer has one.
Classifiers have their labels' loss, accuracy, and F1 of entities (qlora.data.objectives).

Left out: several right answers to one question; judges.
"""

import importlib.util
import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora.adapters.apply import disable_adapter
from qlora.adapters.live import ResolvedModel, resolve_model
from qlora.apps.terminal import printable
from qlora.config import EvaluateConfig
from qlora.data.chat_template import NO_LOSS
from qlora.data.generation import decode, generate, generation_settings
from qlora.data.objectives import OBJECTIVES, measure
from qlora.data.records import load_records, prompt_messages
from qlora.data.rows import (
    DataStats,
    describe,
    length_batches,
    prepare_data,
    prepare_tokenizer,
)
from qlora.errors import UserError
from qlora.fast.head import put_language_head
from qlora.files import replace_text

RESULTS = "evaluation.json"
MAX_LENGTH = 2048
WHOLE = 1 << 40  # tokens: a row that is not cut
SHOWN = 3
# how a score is called in the table, and shown
TABLE: dict[str, tuple[str, Callable[[float], str]]] = {
    "loss": ("loss", "{:.4f}".format),
    "perplexity": ("perplexity", "{:,.2f}".format),
    "accuracy": ("accuracy", "{:.1%}".format),
    "f1": ("F1 of entities", "{:.1%}".format),
    "exact_match": ("exact match", "{:.1%}".format),
    **{
        f"rouge{kind}": (f"ROUGE-{kind}", lambda value: f"{100 * value:.1f}")
        for kind in ("1", "2", "L")
    },
    "bleu": ("BLEU", "{:.1f}".format),
}


class Question(NamedTuple):
    """A row as something to answer."""

    request: str
    """the user's last words"""
    prompt: list[int]
    """all that the model reads"""
    wanted: str


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure as `config` says, print it, and write it; returns what is written.

    Raises:
        UserError: anything the user can mend. Nothing was written then.
    """
    found = resolve_model(config)
    output = _output(config, found)
    tokenizer = found.load_tokenizer()
    prepare_tokenizer(tokenizer)
    rows, stats = _prepare(config, found, tokenizer)
    print(describe(stats, name=config.data))
    questions = _ask(config, found, tokenizer) if config.generate else []
    if questions:
        require_scorers()
    try:
        model = found.load()
        scores, answers = _measure(config, found, model, tokenizer, rows, questions)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU's memory ran out: lower --max-new-tokens or --max-length, or take a smaller "
            "model"
        ) from error
    results = _results(config, found, stats, scores, questions, answers)
    print(f"\n{table(results)}")
    print(samples(results))
    if output:
        replace_text(output, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        print(f"\nAll of it is in {output}.")
    print(_next_commands(config, scores))
    return results


# ---- what is measured on ----


def _output(config: EvaluateConfig, found: ResolvedModel) -> Path | None:
    """Where the results go; nowhere for a whole model, unless it is said."""
    if config.output is not None:
        path = Path(config.output).expanduser()
    elif found.adapter:
        path = found.adapter.folder / RESULTS
    else:
        return None
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir():
        raise UserError(f"--output {path} must be a file in a folder that exists")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} is not yours to write to: give a file elsewhere as --output")
    return path


def _prepare(config: EvaluateConfig, found: ResolvedModel, tokenizer: Any) -> tuple[Any, DataStats]:
    """Rows as training would have them."""
    return prepare_data(
        config.data,
        tokenizer,
        max_length=_max_length(config, found),
        task=found.task,
        labels=found.labels,
        new_labels=False,
        limit=config.limit,
    )


def _max_length(config: EvaluateConfig, found: ResolvedModel) -> int:
    trained = _trained_length(found.adapter.folder) if found.adapter else None
    asked = config.max_length or trained or MAX_LENGTH
    return min(asked, found.checkpoint.max_positions or asked)


def _trained_length(folder: Path) -> int | None:
    """The max_length of the run that left this adapter, where its run.yaml is still there."""
    is_checkpoint = folder.name.startswith("checkpoint-")
    path = (folder.parent if is_checkpoint else folder) / "run.yaml"
    try:
        length = yaml.safe_load(path.read_text(encoding="utf-8"))["config"]["max_length"]
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError):  # none, or not train.py's
        return None
    return length if isinstance(length, int) else None


def _ask(config: EvaluateConfig, found: ResolvedModel, tokenizer: Any) -> list[Question]:
    """The questions in the data that fit into the model with an answer."""
    objective = OBJECTIVES[found.task]
    if objective.classifies:
        return []
    records = load_records(config.data, objective.kinds)
    records = records.select(range(min(config.limit or WHOLE, len(records))))
    every = list(questions_in(records, tokenizer, found.task))
    longest = found.checkpoint.max_positions
    room = WHOLE if longest is None else longest - config.max_new_tokens
    questions = [question for question in every if len(question.prompt) <= room]
    if not every:
        print("These rows are text without questions: the loss is all there is to measure.")
    elif not questions:
        raise UserError(
            f"no question of {config.data} fits into the {longest:,} tokens that the model takes, "
            f"beside an answer of {config.max_new_tokens:,}: lower --max-new-tokens"
        )
    elif len(questions) < len(every):
        print(
            f"{len(every) - len(questions)} of {len(every)} questions do not fit into the model "
            "beside an answer: they are not asked."
        )
    return questions


def questions_in(records: Any, tokenizer: Any, task: str) -> Iterator[Question]:
    """Each record up to its last part with loss, and that part; none of a `text` record."""
    for record in records:
        row = OBJECTIVES[task].encode(record, tokenizer, WHOLE, ()).row
        ids, labels = row["input_ids"], row["labels"]
        if task == "seq2seq":
            prompt, wanted = ids, labels
            request = decode(tokenizer, ids)
        else:
            end = max((i for i, label in enumerate(labels) if label != NO_LOSS), default=-1) + 1
            start = max((i for i in range(end) if labels[i] == NO_LOSS), default=-1) + 1
            prompt, wanted = ids[:start], ids[start:end]
            messages = prompt_messages(record)
            request = str(messages[-1].get("content", "")) if messages else ""
        if prompt:
            yield Question(request, prompt, decode(tokenizer, wanted))


# ---- measuring ----


def _measure(
    config: EvaluateConfig,
    found: ResolvedModel,
    model: PreTrainedModel,
    tokenizer: Any,
    rows: Any,
    questions: Sequence[Question],
) -> tuple[dict[str, dict[str, float]], dict[str, list[str]]]:
    """Of each that is measured: its scores, and its answers."""
    states: dict[str, Callable[[], AbstractContextManager[None]]] = {"model": nullcontext}
    if found.adapter:
        states = {"base": partial(disable_adapter, model), "adapter": nullcontext}
    if OBJECTIVES[found.task].classifies:
        states.pop("base", None)
    else:
        put_language_head(model)  # the loss needs no logits
    scores: dict[str, dict[str, float]] = {}
    answers: dict[str, list[str]] = {}
    known: Any = {"task": found.task, "labels": found.labels}
    settings = generation_settings(model, tokenizer, config.max_new_tokens) if questions else {}
    for name, state in states.items():
        with state():
            scores[name] = measure_rows(model, tokenizer, rows, progress=f"{name}, loss", **known)
            if questions:
                prompts = [question.prompt for question in questions]
                bar = f"{name}, answers"
                answers[name] = generate(model, tokenizer, prompts, settings, progress=bar)
                wanted = [question.wanted for question in questions]
                scores[name] |= compare_answers(answers[name], wanted)
    return scores, answers


def _results(
    config: EvaluateConfig,
    found: ResolvedModel,
    stats: DataStats,
    scores: dict[str, dict[str, float]],
    questions: Sequence[Question],
    answers: dict[str, list[str]],
) -> dict[str, Any]:
    return {
        "model": found.name,
        "adapter": config.adapter,
        "data": config.data,
        "task": found.task,
        "rows": stats.rows,
        "supervised_tokens": stats.supervised_tokens,
        "max_length": _max_length(config, found),
        "max_new_tokens": config.max_new_tokens if questions else None,
        "compute_dtype": found.quantization.compute_dtype,
        "scores": scores,
        "answers": [
            {"request": question.request, "wanted": question.wanted}
            | {name: given[i] for name, given in answers.items()}
            for i, question in enumerate(questions)
        ],
    }


# ---- what a person reads ----


def table(results: dict[str, Any]) -> str:
    """The scores of each, in columns."""
    scores = results["scores"]
    heads = ["with adapter" if name == "adapter" else name for name in scores]
    kind = "labels" if OBJECTIVES[results["task"]].classifies else "supervised tokens"
    about = f"Measured on {results['rows']:,} rows, {results['supervised_tokens']:,} {kind}"
    if results["answers"]:
        about += (
            f", and {len(results['answers']):,} answers of up to {results['max_new_tokens']} tokens"
        )
    lines = [f"{about}:", "", f"  {'':15}" + "".join(f"{head:>14}" for head in heads)]
    for key, (title, show) in TABLE.items():
        if any(key in found for found in scores.values()):
            values = [show(found[key]) if key in found else "–" for found in scores.values()]
            lines.append(f"  {title:15}" + "".join(f"{value:>14}" for value in values))
    return "\n".join(lines)


def samples(results: dict[str, Any]) -> str:
    """Some of the answers, from the first row to the last."""
    every = results["answers"]
    places = sorted({round(i * (len(every) - 1) / (SHOWN - 1)) for i in range(SHOWN)})
    lines: list[str] = []
    for answer in [every[i] for i in places] if every else ():
        lines += ["", f"  {_short(answer['request'])}"]
        for name in [key for key in answer if key not in ("request", "wanted")] + ["wanted"]:
            lines.append(f"    {name:9}{_short(answer[name]) or '(nothing)'}")
    return "\n".join(lines)


def _short(text: str) -> str:
    longest = max(60, min(120, shutil.get_terminal_size((100, 24)).columns)) - 14
    words = printable(" ".join(text.split()))
    return words if len(words) <= longest else f"{words[: longest - 1]}…"


def _next_commands(config: EvaluateConfig, scores: dict[str, dict[str, float]]) -> str:
    """What to type next, and a word where the adapter is no gain."""
    place = shlex.quote(str(config.adapter or config.model))
    lines = [""]
    if "base" in scores and scores["adapter"]["loss"] >= scores["base"]["loss"]:
        lines += ["On this data the adapter is no better than its base: is it what it learned?", ""]
    if "accuracy" not in next(iter(scores.values())):
        flags = f"--adapter {place} --compare" if config.adapter else f"--model {place}"
        lines.append(f"Talk to it:  python -m qlora.chat {flags}")
    if config.adapter:
        merge = f"python merge_dequant.py --adapter {place} --output-dir {place}-merged"
        lines.append(f"Merge it:    {merge}")
    return "\n".join(lines)


ROUGE = ("rouge1", "rouge2", "rougeL")
PACKAGES = {"rouge_score": "rouge-score", "sacrebleu": "sacrebleu"}


@torch.no_grad()
def measure_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Any,
    *,
    task: str = "causal-lm",
    labels: Sequence[str] = (),
    progress: str = "",
) -> dict[str, float]:
    """`loss` over the labels of prepared rows, and `perplexity` or what the task measures.

    Args:
        rows: those of `prepare_data`.
        labels: the names of a classifier's labels.
        progress: what to call a progress bar on a terminal; none without.
    """
    model.eval()
    objective = OBJECTIVES[task]
    one = torch.tensor(1, device=model.device)  # num_items=1 keeps the loss a sum
    batches = length_batches(rows, tokenizer, task=task, model=model)
    hidden = None if progress else True  # None: where there is no terminal

    def results() -> Iterator[tuple[Any, Any, Any]]:
        for batch in tqdm(batches, desc=progress, leave=False, disable=hidden):
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            targets = inputs.pop("labels")
            outputs = model(**inputs)
            yield objective.loss(outputs, targets, one), outputs, targets

    found = measure(objective, results(), labels)
    if objective.classifies:
        return found
    return found | {"perplexity": math.exp(min(found["loss"], 700.0))}


def require_scorers() -> None:
    """Refuse to go on where ROUGE's and BLEU's packages are not installed."""
    missing = [name for module, name in PACKAGES.items() if not importlib.util.find_spec(module)]
    if missing:
        raise UserError(
            f"answers are compared with the help of {' and '.join(missing)}, not installed here: "
            f"pip install {' '.join(missing)}, or measure the loss alone with --no-generate"
        )


def compare_answers(given: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """exact_match, rouge1, rouge2, rougeL (0 to 1 each) and bleu (0 to 100) of answers."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    pairs = list(zip(given, wanted, strict=True))
    right = sum(answer.strip() == wish.strip() for answer, wish in pairs)
    found = {"exact_match": right / max(len(pairs), 1)}
    if any(re.search("[a-z0-9]", wish.lower()) for wish in wanted):
        scorer = RougeScorer(list(ROUGE))
        scores = [scorer.score(wish, answer) for answer, wish in pairs]
        found |= {k: sum(score[k].fmeasure for score in scores) / len(scores) for k in ROUGE}
    # force: no warning of answers that end in " ." as tokenized text does
    found["bleu"] = BLEU(force=True).corpus_score(list(given), [list(wanted)]).score
    return found
