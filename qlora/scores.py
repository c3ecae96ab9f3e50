"""How good a model is on rows: the loss of what it was to write, and what it writes instead.

    loss          mean of -log p over supervised tokens, in nats; as evaluation in training has it
    perplexity    exp(loss): among so many equally likely tokens it chose, on average
    exact match   share of answers that are the wanted one, white space around them aside
    ROUGE-1/2/L   F1 of shared words, pairs of words, and the longest common subsequence: the mean
                  over answers, 0 to 1, as rouge_score computes it without stemming (Lin 2004)
    BLEU          shared runs of 1 to 4 words over all answers, 0 to 100, as sacrebleu computes it
                  by default (Papineni et al. 2002; Post 2018, arXiv:1804.08771)

rouge_score knows words of a-z and 0-9 alone, so ROUGE is left out where no wanted answer has one.
Classifiers have their labels' loss, accuracy, and F1 of entities (qlora.objectives).

Left out: several right answers to one question; judges.
"""

import importlib.util
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora.data import length_batches
from qlora.errors import UserError
from qlora.objectives import OBJECTIVES, labelled

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
    one = torch.tensor(1, device=model.device)  # divide by nothing: sums are added up
    total, count = 0.0, 0
    predicted: list[list[int]] = []
    wanted: list[list[int]] = []
    batches = length_batches(rows, tokenizer, task=task, model=model)
    hidden = None if progress else True  # None: where there is no terminal
    for batch in tqdm(batches, desc=progress, leave=False, disable=hidden):
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        targets = inputs.pop("labels")
        outputs = model(**inputs)
        total += float(objective.loss(outputs, targets, one))
        count += objective.supervised(targets)
        if objective.measure:
            wanted += labelled(targets, targets)
            predicted += labelled(outputs["logits"].argmax(-1), targets)
    loss = total / max(count, 1)
    if objective.measure:
        return {"loss": loss, **objective.measure(predicted, wanted, labels)}
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


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
