"""The task of a model, and its head (the table of tasks is qlora.config.tasks).

A language model ends in its output head, which turns hidden states into logits of the vocabulary
and comes with the checkpoint. A classifier ends in a head of its own: a checkpoint that was only
pretrained lacks it, so it is made, and always trained in full, as PEFT does. Neither is quantized.
(What a task does with records, batches and losses is in qlora.data.objectives.)
"""

from typing import Any

from torch import nn

from qlora.base.modules import output_head
from qlora.config.tasks import TASKS, Task, task_named


def auto_class(task: Task) -> Any:
    """The class of transformers that loads models for `task`."""
    import transformers

    return getattr(transformers, task.auto_class)


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
