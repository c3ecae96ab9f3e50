"""The tasks a model can be trained for, and what transformers and PEFT call each.

A language model ends in its output head, which comes with the checkpoint. A classifier ends in a
head of its own, which a pretrained checkpoint lacks: it is created and trained in full, as in PEFT.
What a task does with records, batches and losses is in qlora.data.objectives.
"""

from dataclasses import dataclass
from typing import Any

from qlora.errors import UserError


@dataclass(frozen=True)
class Task:
    """One kind of model."""

    name: str
    """value of `--task`"""
    task_type: str
    """PEFT's name, in adapter_config.json"""
    auto_class: str
    """name of the class of transformers that loads such a model"""
    kind: str
    """description, for messages"""
    class_ending: str = ""
    """suffix of the model classes of a classifier"""
    tokenizer_options: tuple[tuple[str, Any], ...] = ()
    """keyword arguments for the tokenizer's from_pretrained"""

    @property
    def trains_head(self) -> bool:
        """Whether the head is trained in full, and may be missing from a checkpoint."""
        return bool(self.class_ending)


TASKS = {
    task.name: task
    for task in (
        Task("causal-lm", "CAUSAL_LM", "AutoModelForCausalLM", "causal language model"),
        Task("seq2seq", "SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM", "encoder-decoder language model"),
        Task(
            "seq-cls",
            "SEQ_CLS",
            "AutoModelForSequenceClassification",
            "classifier of texts",
            "ForSequenceClassification",
        ),
        Task(
            "token-cls",
            "TOKEN_CLS",
            "AutoModelForTokenClassification",
            "classifier of tokens",
            "ForTokenClassification",
            (("add_prefix_space", True),),  # rows are split into words: the first starts one too
        ),
    )
}
CAUSAL_LM = TASKS["causal-lm"]


def task_named(name: str) -> Task:
    """The task of that name."""
    if name not in TASKS:
        raise UserError(f"task must be {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]


def task_typed(task_type: str | None) -> str:
    """Name of the task with PEFT's `task_type`; causal-lm for any other value."""
    names = (name for name, task in TASKS.items() if task.task_type == task_type)
    return next(names, CAUSAL_LM.name)
