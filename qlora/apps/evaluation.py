"""`evaluate(config)`: the scores of a model, or of a base with and without its adapter, on rows.

Rows are prepared as in training (qlora.data.rows), so the loss is what train.py logs as eval_loss.
The prompt of an answer is a row up to its last part with loss, in a chat the assistant's last turn.
Rows of `text` have no prompt: no answers are generated.

    loss          mean of -log p over supervised tokens, in nats
    perplexity    exp(loss): the number of equally likely tokens with the same loss
    exact match   share of answers equal to the expected one, ignoring white space around them
    ROUGE-1/2/L   F1 of shared words, pairs of words, and the longest common subsequence: the mean
                  over answers, 0 to 1, as rouge_score computes it without stemming (Lin 2004)
    BLEU          shared runs of 1 to 4 words over all answers, 0 to 100, as sacrebleu computes it
                  by default (Papineni et al. 2002; Post 2018, arXiv:1804.08771)

Words in rouge_score are of a-z and 0-9: ROUGE is left out if no expected answer has one. The scores
of a classifier are loss, accuracy, and F1 of entities (qlora.data.objectives).

The results are printed as a table, and written with all answers to one JSON file:

    {"model", "adapter", "data", "task", "rows", "supervised_tokens", "max_length",
     "max_new_tokens", "compute_dtype",
     "scores": {"base": {"loss", "perplexity", "exact_match", "rouge1", …, "bleu"}, "adapter": …},
     "answers": [{"request", "wanted", "base", "adapter"}]}

A model without an adapter has one entry, "model"; a classifier has no "base", as its head is part
of the adapter. Left out: several right answers to one question; judging by a model.
"""

import importlib.util
import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora.adapters.apply import disable_adapter
from qlora.adapters.live import ResolvedModel, resolve_model
from qlora.apps.terminal import printable
from qlora.base.load import share_pad
from qlora.base.modules import embedding_rows
from qlora.cli import Progress
from qlora.config import MAX_LENGTH, EvaluateConfig
from qlora.config.tasks import task_named
from qlora.data.batches import length_batches
from qlora.data.chat_template import learned_turns
from qlora.data.chats import AS_IT_IS, Reading, chat_of, reading_in
from qlora.data.encoding import require_vocabulary
from qlora.data.generation import Question, decode, generate, generation_settings, question_of
from qlora.data.objectives import OBJECTIVES, measure
from qlora.data.records import load_records
from qlora.data.rows import describe, prepare_data, prepare_tokenizer
from qlora.data.templates import apply_settings
from qlora.errors import UserError, require
from qlora.fast.head import put_language_head
from qlora.files import read_run_file, replace_text

RESULTS = "evaluation.json"
NO_LIMIT = 1 << 40  # tokens
SHOWN = 3  # answers on the terminal
ROUGE = ("rouge1", "rouge2", "rougeL")
PACKAGES = ("rouge-score", "sacrebleu")
# key of a score -> its title in the table, and its format
TABLE: dict[str, tuple[str, Callable[[float], str]]] = {
    "loss": ("loss", "{:.4f}".format),
    "perplexity": ("perplexity", "{:,.2f}".format),
    "accuracy": ("accuracy", "{:.1%}".format),
    "f1": ("F1 of entities", "{:.1%}".format),
    "exact_match": ("exact match", "{:.1%}".format),
    **{key: (f"ROUGE-{key[5:]}", lambda value: f"{100 * value:.1f}") for key in ROUGE},
    "bleu": ("BLEU", "{:.1f}".format),
}


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure the model, print the results and write them; returns them as written.

    Raises:
        UserError: the settings, the data or the model do not fit; no file is written then.
    """
    resolved = resolve_model(config)
    output = resolved.adapter.folder / RESULTS if resolved.adapter else None
    output = output if config.output is None else Path(config.output).expanduser()
    if output:
        folder = output.absolute().parent
        fault = f"--output {output} must be a file in a folder that exists"
        require(folder.is_dir() and not output.is_dir(), fault)
        fault = f"no write permission for {folder}: choose another file with --output"
        require(os.access(folder, os.W_OK), fault)
    tokenizer = resolved.load_tokenizer()
    apply_settings(tokenizer, config)
    prepare_tokenizer(tokenizer)
    max_length, reading = _max_length(config, resolved), AS_IT_IS
    if resolved.adapter:
        with suppress(UserError):  # of a damaged run.yaml, if --max-length is given
            reading = reading_in(resolved.adapter.folder)
    task: Any = {"task": resolved.task, "classes": resolved.labels}
    limits: Any = {"max_length": max_length, "limit": config.limit, "new_classes": False}
    limits["reading"] = reading
    try:
        rows, stats = prepare_data(config.data, tokenizer, split="evaluation", **limits, **task)
    except UserError as error:
        kind = task_named(resolved.task).kind
        raise UserError(f"{error} ({resolved.what} is a {kind})") from error
    print(describe(stats, name=config.data))
    generates = config.generate and not OBJECTIVES[resolved.task].classifies
    questions = _questions(config, resolved, tokenizer, reading) if generates else []
    if questions:
        require_scorers()
    scores, answers = _measure(config, resolved, tokenizer, rows, questions)
    results = {
        "model": resolved.name, "adapter": config.adapter, "data": config.data,
        "task": resolved.task, "rows": stats.rows, "supervised_tokens": stats.supervised_tokens,
        "max_length": max_length, "max_new_tokens": config.max_new_tokens if questions else None,
        "compute_dtype": resolved.quantization.compute_dtype, "scores": scores, "answers": answers,
    }  # fmt: skip
    print(f"\n{table(results)}")
    print(samples(results))
    if output:
        replace_text(output, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        print(f"\nAll results are in {output}.")
    print()
    if "base" in scores and scores["adapter"]["loss"] >= scores["base"]["loss"]:
        print("The adapter is no better than its base: was it trained on data like this?\n")
    model = str(config.adapter or config.model)
    name, merged = shlex.quote(model), shlex.quote(f"{model}-merged")
    if resolved.task == "causal-lm":
        flags = f"--adapter {name} --compare" if config.adapter else f"--model {name}"
        print(f"Chat:   python -m qlora.chat {flags}")
    if config.adapter:
        flags = f"--adapter {name} --output-dir {merged}"
        print(f"Merge:  python -m qlora merge {flags}")
    return results


def _max_length(config: EvaluateConfig, resolved: ResolvedModel) -> int:
    """--max-length, else that of the adapter's run.yaml; at most the model's context."""
    length: Any = config.max_length
    if length is None and resolved.adapter:
        folder = resolved.adapter.folder
        folder = folder.parent if folder.name.startswith("checkpoint-") else folder
        length = read_run_file(folder).get("config", {}).get("max_length")
    length = length if isinstance(length, int) else MAX_LENGTH
    return int(min(length, resolved.checkpoint.max_positions or length))


def _questions(
    config: EvaluateConfig, resolved: ResolvedModel, tokenizer: Any, reading: Reading
) -> list[Question]:
    """The questions in the data that fit into the model's context together with an answer."""
    kinds = reading.kinds(OBJECTIVES[resolved.task].kinds)
    records = load_records(config.data, kinds, split="evaluation", limit=config.limit)
    questions = list(questions_in(records, tokenizer, resolved.task, reading))
    positions = resolved.checkpoint.max_positions
    longest = NO_LIMIT if positions is None else positions - config.max_new_tokens
    fitting = [question for question in questions if len(question.prompt) <= longest]
    if not questions:
        print("The rows are plain text without prompts: only the loss is measured.")
    elif not fitting:
        raise UserError(
            f"each question in {config.data} with an answer of {config.max_new_tokens:,} tokens "
            f"exceeds the model's context, {positions:,} tokens: lower --max-new-tokens"
        )
    elif left_out := len(questions) - len(fitting):
        print(f"{left_out} of {len(questions)} questions exceed the model's context: left out.")
    return fitting


def questions_in(
    records: Any, tokenizer: Any, task: str, reading: Reading = AS_IT_IS
) -> Iterator[Question]:
    """Split each record before its last part with loss; `text` records are skipped."""
    for record in records:
        *_, row = OBJECTIVES[task].encode(record, tokenizer, NO_LIMIT, (), reading)
        question = question_of(row, task)
        request = decode(tokenizer, question.prompt)
        if question.prompt and task == "causal-lm" and (chat := chat_of(record, reading)):
            turn = learned_turns(chat)[-1]
            request = str(chat.messages[turn - 1].get("content", "")) if turn else ""
        if question.prompt:
            yield question._replace(request=request)


def _measure(
    config: EvaluateConfig,
    resolved: ResolvedModel,
    tokenizer: Any,
    rows: Any,
    questions: Sequence[Question],
) -> tuple[dict[str, dict[str, float]], list[dict[str, str]]]:
    """The scores of each state of the model, and for each question the answers of all states."""
    model = resolved.load()
    share_pad(model, tokenizer.pad_token_id)  # of a whole model; an adapter has it
    states: dict[str, Callable[[], AbstractContextManager[None]]] = {"model": nullcontext}
    if resolved.adapter:
        states = {"base": partial(disable_adapter, model), "adapter": nullcontext}
    if OBJECTIVES[resolved.task].classifies:
        states.pop("base", None)
    else:
        put_language_head(model.requires_grad_(False))  # loss without logits
    vocabulary = embedding_rows(model)
    used = chain(rows["input_ids"], (question.prompt for question in questions))
    require_vocabulary(chain(used, [[tokenizer.pad_token_id]]), tokenizer, vocabulary)
    scores: dict[str, dict[str, float]] = {}
    task: Any = {"task": resolved.task, "classes": resolved.labels}
    settings = generation_settings(model, tokenizer, config.max_new_tokens) if questions else {}
    prompts = [question.prompt for question in questions]
    wanted = [decode(tokenizer, question.answer) for question in questions]
    answers = [{"request": q.request, "wanted": w} for q, w in zip(questions, wanted, strict=True)]
    for name, state in states.items():
        with state():
            scores[name] = measure_rows(model, tokenizer, rows, progress=f"{name}, loss", **task)
            if questions:
                title = f"{name}, answers"
                generated = generate(model, tokenizer, prompts, settings, progress=title)
                scores[name] |= compare_answers(generated, wanted)
                for answer, text in zip(answers, generated, strict=True):
                    answer[name] = text
    return scores, answers


@torch.no_grad()
def measure_rows(
    model: PreTrainedModel,
    tokenizer: Any,
    rows: Any,
    *,
    task: str = "causal-lm",
    classes: Sequence[str] = (),
    progress: str = "",
) -> dict[str, float]:
    """`loss` over the rows of `prepare_data`, with `perplexity`, or a classifier's scores."""
    model.eval()
    objective = OBJECTIVES[task]
    one = torch.tensor(1, device=model.device)  # num_items=1 keeps the loss a sum
    batches = length_batches(rows, tokenizer, task=task, model=model)

    def results() -> Iterator[tuple[Any, Any, Any]]:
        for batch in Progress(batches, desc=progress, disable=not progress):
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            yield objective.loss(outputs, labels, one), outputs, labels

    scores = measure(objective, results(), classes)
    perplexity = {} if objective.classifies else {"perplexity": math.exp(min(scores["loss"], 700))}
    return scores | perplexity


def require_scorers() -> None:
    """Raise if a package that computes ROUGE or BLEU is not installed."""
    missing = [name for name in PACKAGES if not importlib.util.find_spec(name.replace("-", "_"))]
    fault = f"comparing answers needs {' and '.join(missing)}: pip install {' '.join(missing)}, "
    require(not missing, fault + "or measure only the loss with --no-generate")


def compare_answers(generated: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """exact_match, rouge1, rouge2, rougeL (0 to 1 each) and bleu (0 to 100) of answers."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    pairs = list(zip(generated, wanted, strict=True))
    equal = sum(answer.strip() == reference.strip() for answer, reference in pairs)
    scores = {"exact_match": equal / max(len(pairs), 1)}
    if any(re.search("[a-z0-9]", reference.lower()) for reference in wanted):
        scorer = RougeScorer(list(ROUGE))
        rouge = [scorer.score(reference, answer) for answer, reference in pairs]
        scores |= {k: sum(score[k].fmeasure for score in rouge) / len(rouge) for k in ROUGE}
    # force: sacrebleu warns of answers that end in " .", as tokenized text does
    scores["bleu"] = BLEU(force=True).corpus_score(list(generated), [list(wanted)]).score
    return scores


# ---- output on the terminal ----


def table(results: dict[str, Any]) -> str:
    """The scores, with a column for each state of the model."""
    scores = results["scores"]
    heads = ["with adapter" if name == "adapter" else name for name in scores]
    kind = "labels" if OBJECTIVES[results["task"]].classifies else "supervised tokens"
    about = f"Measured on {results['rows']:,} rows, {results['supervised_tokens']:,} {kind}"
    if count := len(results["answers"]):
        about += f", and {count:,} answers of up to {results['max_new_tokens']} tokens"
    lines = [f"{about}:", "", f"  {'':15}" + "".join(f"{head:>14}" for head in heads)]
    for key, (title, show) in TABLE.items():
        if any(key in column for column in scores.values()):
            values = [show(column[key]) if key in column else "–" for column in scores.values()]
            lines.append(f"  {title:15}" + "".join(f"{value:>14}" for value in values))
    return "\n".join(lines)


def samples(results: dict[str, Any]) -> str:
    """SHOWN answers, evenly spaced from the first to the last."""
    answers, lines = results["answers"], []
    indices = sorted({round(i * (len(answers) - 1) / (SHOWN - 1)) for i in range(SHOWN)})
    for answer in [answers[i] for i in indices] if answers else ():
        lines += ["", f"  {_short(answer['request'])}"]
        for name in [key for key in answer if key not in ("request", "wanted")] + ["wanted"]:
            lines.append(f"    {name:9}{_short(answer[name]) or '(nothing)'}")
    return "\n".join(lines)


def _short(text: str) -> str:
    longest = max(60, min(120, shutil.get_terminal_size((100, 24)).columns)) - 14
    words = printable(" ".join(text.split()))
    return words if len(words) <= longest else f"{words[: longest - 1]}…"
