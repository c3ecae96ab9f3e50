"""What kind of model a task has: transformers' Auto class, PEFT's task_type, and its head.

A language model ends in its output head, which turns hidden states into logits of the vocabulary
and comes with the checkpoint. A classifier ends in a head of its own: a checkpoint that was only
pretrained lacks it, so it is made, and always trained in full, as PEFT does. Neither is quantized.
(What a task does with records, batches and losses is in qlora.data.objectives.)
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from qlora.base.modules import output_head
from qlora.errors import UserError


@dataclass(frozen=True)
class Task:
    """A kind of model."""

    task_type: str
    """PEFT's name of it, for adapter_config.json"""
    auto_class: str
    """transformers' class that loads it"""
    kind: str
    """what a model of it is, in words"""
    class_ending: str = ""
    """of a classifier: how the names of its classes end"""
    tokenizer_options: tuple[tuple[str, Any], ...] = ()
    """what its tokenizer is loaded with"""

    @property
    def trains_head(self) -> bool:
        """Whether its head is trained in full, and may be missing from a checkpoint."""
        return bool(self.class_ending)

    def load(self, what: str) -> Any:
        """Its Auto class's method `what`."""
        import transformers

        return getattr(getattr(transformers, self.auto_class), what)


TASKS = {
    "causal-lm": Task("CAUSAL_LM", "AutoModelForCausalLM", "causal language model"),
    "seq2seq": Task("SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM", "encoder-decoder language model"),
    "seq-cls": Task(
        "SEQ_CLS",
        "AutoModelForSequenceClassification",
        "classifier of texts",
        "ForSequenceClassification",
    ),
    "token-cls": Task(
        "TOKEN_CLS",
        "AutoModelForTokenClassification",
        "classifier of tokens",
        "ForTokenClassification",
        tokenizer_options=(("add_prefix_space", True),),  # words stand apart, also the first
    ),
}
CAUSAL_LM = TASKS["causal-lm"]  # what predicts the next token of a text


def task_named(name: str) -> Task:
    """The task of that name."""
    if name not in TASKS:
        raise UserError(f"task must be {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]


def task_of(model: nn.Module) -> Task | None:
    """The task of `model`: what it was loaded for, or what its class says; None of another kind."""
    name = getattr(model, "qlora_base", {}).get("task")
    if name is not None:
        return task_named(name)
    for task in TASKS.values():
        if task.trains_head and type(model).__name__.endswith(task.class_ending):
            return task
    if not hasattr(model, "prepare_inputs_for_generation"):
        return None
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return TASKS["seq2seq" if is_encoder_decoder else "causal-lm"]


def task_typed(task_type: str | None) -> str:
    """The name of the task that PEFT calls `task_type`; of what it does not say, causal-lm."""
    names = (name for name, task in TASKS.items() if task.task_type == task_type)
    return next(names, "causal-lm")


def heads(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` that make its output, which are neither quantized nor adapted.

    That is the output head of a language model; of another transformers model all that stands
    beside its `base_model`, and a pooler that the checkpoint lacked; of any other module nothing.
    """
    head = output_head(model)
    if head is not None:
        return {name: module for name, module in model.named_modules() if module is head}
    base = getattr(model, "base_model", model)
    if base is model:
        return {}
    recorded: list[str] = getattr(model, "qlora_base", {}).get("heads", [])
    children = {n: m for n, m in model.named_children() if any(True for _ in m.parameters())}
    beside = {n: m for n, m in children.items() if m is not base}
    return beside | {name: model.get_submodule(name) for name in recorded}


def is_in(name: str, modules: Any) -> bool:
    """Whether `name` is one of the modules named, or inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)
