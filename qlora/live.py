"""The model as it was trained: a 4-bit base and everything that an adapter file can hold.

For measuring only: embeddings, biases and what was trained in full are put into the model for good.
A and B of linear layers run beside them, as in training.
"""

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora.adapter_files import attach, check_fits
from qlora.adapter_reader import AdapterFile
from qlora.lora import is_tied, vocabulary


@torch.no_grad()
def put_on(model: PreTrainedModel, adapter: AdapterFile) -> None:
    """Put `adapter` on `model`, the 4-bit base that it was trained on, to stay there.

    Raises:
        UserError: it belongs to another base, or its shapes do not fit.
    """
    check_fits(model, adapter)
    embedding, head = vocabulary(model)
    if is_tied(model) and adapter.parts(embedding, head):
        module = model.get_submodule(str(head))
        module.weight = nn.Parameter(module.weight.detach().clone())  # type: ignore[operator]
    for param, value in adapter.whole.items():
        _replace(model, param, value)
    for name, change in adapter.bias_changes.items():
        _add(model.get_submodule(name).bias, change)
    for name, (ids, rows) in adapter.rows.items():
        weight: Any = model.get_submodule(name).weight
        weight[ids.to(weight.device)] = rows.to(weight)
    for name in adapter.embeddings:
        weight = model.get_submodule(name).weight
        _add(weight, adapter.pairs[name].to(weight.device).change(weight.float().T).T)
    attach(model, adapter)


def _replace(model: nn.Module, param: str, value: Tensor) -> None:
    """Another tensor for a parameter, which may have more rows, or have been 4-bit codes."""
    name, _, kind = param.rpartition(".")
    module: Any = model.get_submodule(name)
    old = getattr(module, kind)
    dtype = module.compute_dtype if isinstance(module, Linear4bit) else old.dtype
    new = nn.Parameter(value.to(old.device, dtype), requires_grad=False)
    if isinstance(module, Linear4bit) and kind == "weight":
        plain = nn.Linear(value.shape[1], value.shape[0], bias=False, device="meta")
        plain.weight, plain.bias = new, module.bias
        model.set_submodule(name, plain, strict=True)
        return
    setattr(module, kind, new)
    if isinstance(module, nn.Embedding) and kind == "weight":
        module.num_embeddings = len(value)


def _add(parameter: Any, change: Tensor) -> None:
    parameter.copy_(parameter.float() + change.to(parameter.device))
