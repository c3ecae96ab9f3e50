"""The tasks a model can be trained for, and what transformers and PEFT call each.

A language model ends in its output head, which comes with the checkpoint. A classifier ends in a
head of its own, which a pretrained checkpoint lacks: it is created and trained in full, as in PEFT.
What a task does with records, batches and losses is in qlora.data.objectives.
"""

from dataclasses import dataclass
from typing import Any

from qlora.errors import require


@dataclass(frozen=True)
class Task:
    """One kind of model."""

    name: str
    """value of `--task`"""
    task_type: str
    """PEFT's name, in adapter_config.json"""
    class_ending: str
    """suffix of its auto class in transformers, and of the model classes of a classifier"""
    kind: str
    """description, for messages"""
    trains_head: bool = False
    """whether the head is trained in full, and may be missing from a checkpoint"""
    tokenizer_options: tuple[tuple[str, Any], ...] = ()
    """keyword arguments for the tokenizer's from_pretrained"""

    @property
    def auto_class(self) -> str:
        """The name of the class of transformers that loads such a model."""
        return f"AutoModel{self.class_ending}"


CAUSAL_LM = Task("causal-lm", "CAUSAL_LM", "ForCausalLM", "causal language model")
SEQ2SEQ = Task("seq2seq", "SEQ_2_SEQ_LM", "ForSeq2SeqLM", "encoder-decoder language model")
SEQ_CLS = Task("seq-cls", "SEQ_CLS", "ForSequenceClassification", "classifier of texts", True)
SPLIT = (("add_prefix_space", True),)  # rows are split into words: the first starts one too
TOKEN_CLS = Task(
    "token-cls", "TOKEN_CLS", "ForTokenClassification", "classifier of tokens", True, SPLIT
)
TASKS = {task.name: task for task in (CAUSAL_LM, SEQ2SEQ, SEQ_CLS, TOKEN_CLS)}


def task_named(name: str) -> Task:
    """The task of that name."""
    require(name in TASKS, f"task must be {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]


def task_typed(task_type: str | None) -> str:
    """Name of the task with PEFT's `task_type`; causal-lm for any other value."""
    names = (name for name, task in TASKS.items() if task.task_type == task_type)
    return next(names, CAUSAL_LM.name)
