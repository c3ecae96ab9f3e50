"""An output head whose logits are made when somebody looks at them: the loss needs none.

    model(input_ids=..., labels=...).loss

is what the model's own forward computes of logits: it takes them from its head, may scale and bound
them, and asks transformers for the loss. `LanguageHead`, in front of the head, gives it LazyLogits
(qlora.lazy_logits), of which the loss comes without them. Nothing of the model is replaced, nothing
is asked of its class or its config, and what it adds to the loss (the router loss of experts) is
added as ever.

A head that is trained, adapted, quantized or watched by hooks makes its logits at once; so do
torch.compile, inference_mode, and few tokens: up to a chunk of qlora.loss there is nothing to save,
and generation wants the logits of one.
"""

from typing import TypeGuard

import torch
from torch import Tensor, nn

from qlora.adapter_module import Wrapper, put_module
from qlora.frozen import is_quantized, is_watched, output_head, product_dtype, vocabulary
from qlora.lazy_logits import lazy_logits
from qlora.loss import chunk_rows


class LanguageHead(Wrapper):
    """A frozen linear layer that makes logits of hidden states, lazily where that pays."""

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., dim) -> (..., vocab)."""
        layer = self.base_layer
        if torch.compiler.is_compiling() or not (is_untouched(layer) and _pays(hidden, layer)):
            logits: Tensor = layer(hidden)
            return logits
        return lazy_logits(hidden, layer.weight, layer.bias)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """The head's: transformers puts a weight there that is tied to the embedding's."""
        self.base_layer.register_parameter(name, param)


def put_language_head(model: nn.Module) -> None:
    """A LanguageHead in front of the output head of `model`, in place; or a line on the terminal
    where there is a head for which it can do nothing."""
    name, head = vocabulary(model)[1], output_head(model)
    if name is None or isinstance(head, LanguageHead):
        return
    if is_untouched(head):
        put_module(model, name, LanguageHead(head).train(head.training))
        return
    what = "quantized" if is_quantized(head) else "trained, adapted or no plain linear layer"
    print(f"the loss is computed from all logits: the output head, {name}, is {what}")


def is_untouched(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a plain linear layer that nobody trains or watches."""
    trained = any(parameter.requires_grad for parameter in layer.parameters())
    return type(layer) is nn.Linear and not is_watched(layer) and not trained


def _pays(hidden: Tensor, layer: nn.Linear) -> bool:
    """Whether there is more than a chunk of logits, of which there may be a loss."""
    return (
        type(hidden) is Tensor
        and product_dtype(hidden) == product_dtype(layer.weight)
        and hidden.shape[:-1].numel() > chunk_rows(layer.weight)
        and not torch.is_inference_mode_enabled()
    )
