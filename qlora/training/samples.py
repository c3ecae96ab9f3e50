"""samples.jsonl: a model's answers to a few rows of the data, before and after training.

Samples are evenly spaced rows of the evaluation data, or else of the training data. The prompt is a
row up to its last answer (of plain text the first half); the model generates greedily, at most
twice the answer's length and MAX_NEW_TOKENS. No random number is drawn: training is bit for bit the
same without samples. Prompts are generated one at a time, as training's attention takes no padding
(qlora.fast.attention).
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from qlora import files
from qlora.data import generation
from qlora.data.generation import Question
from qlora.data.objectives import OBJECTIVES
from qlora.data.templates import PROBE
from qlora.errors import UserError
from qlora.training import ranks

MAX_NEW_TOKENS = 128


def choose_samples(
    task: str, count: int, rows: Any, eval_rows: Any | None, max_length: int
) -> list[Question]:
    """Up to `count` evenly spaced rows, of `eval_rows` if given, as questions to a model that takes
    `max_length` tokens; none for a classifier, whose accuracy evaluation reports."""
    if not count or OBJECTIVES[task].classifies:
        return []
    rows, kind = (rows, "training") if eval_rows is None else (eval_rows, "evaluation")
    count = min(count, len(rows))
    of = f"{count} row{'s' * (count != 1)} of the {kind} data"
    print(f"{files.SAMPLES}: answers to {of}, before and after training")
    samples = []
    for row in (rows[i * len(rows) // count] for i in range(count)):
        question = generation.question_of(row, task)
        if not question.prompt:  # plain text
            half = (len(question.answer) + 1) // 2
            question = Question(question.answer[:half], question.answer[half:])
        positions = max_length if task == "seq2seq" else max_length - len(question.prompt)
        max_new_tokens = min(MAX_NEW_TOKENS, 2 * len(question.answer), positions)
        samples.append(question._replace(max_new_tokens=max_new_tokens))
    return samples


def write_answers(
    folder: Path, when: str, samples: list[Question], model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    """Generate answers into column `when` of samples.jsonl, "before" or "after"; keep the other."""
    earlier = {(row["prompt"], row["wanted"]): row for row in files.read_samples(folder)}
    rows = []
    for question in samples:
        prompt = _without_template(tokenizer, question.prompt)
        wanted = generation.decode(tokenizer, question.answer)
        row = {"prompt": prompt, "wanted": wanted, "before": None, "after": None}
        settings = generation.generation_settings(model, tokenizer, question.max_new_tokens)
        (generated,) = generation.generate(model, tokenizer, [question.prompt], settings)
        rows.append(row | earlier.get((prompt, wanted), {}) | {when: generated})
    if not ranks.is_first():  # of a sharded model, which all run
        return
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    files.replace_text(folder / files.SAMPLES, "".join(lines))


def _without_template(tokenizer: Tokenizer, prompt: list[int]) -> str:
    """The content of a prompt that is a single user turn in the chat template; else its text."""
    text = str(tokenizer.decode(prompt, skip_special_tokens=False))
    if not tokenizer.chat_template:
        return text
    try:
        probe = generation.prompt_ids(tokenizer, [{"role": "user", "content": PROBE}])
    except UserError:  # the template needs more than a user turn
        return text
    begin, _, end = str(tokenizer.decode(probe, skip_special_tokens=False)).partition(PROBE)
    content = text.removeprefix(begin).removesuffix(end)
    return content if begin + content + end == text else text
