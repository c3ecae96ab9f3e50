"""How a language model makes logits of its last hidden states, and its loss without making them.

    logits = softcap * tanh(scale * (W x + b) / softcap)

What a model's class does between the two is not asked of its class but seen: its head is a plain
frozen linear layer, its config names a scale or a softcap (below), and once, on a few tokens, these
give the logits that the model itself gives. Of any other model all logits are made, as before.

    final_logit_softcapping   Gemma         bounds logits
    logit_scale               Cohere        multiplies them
    lm_head_multiplier        Falcon-H1     the same
    logits_scaling            Granite       divides them
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.adapter_module import AdapterModule
from qlora.frozen import is_quantized, output_head
from qlora.loss import NO_LABEL, linear_cross_entropy

FEW_TOKENS = 8


@dataclass(frozen=True)
class LanguageHead:
    """What makes logits of a model's last hidden states."""

    layer: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., dim) -> (..., vocab), as the model makes them."""
        z: Tensor = self.layer(hidden) * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def next_token_loss(
        self, hidden: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """What qlora.objectives.token_loss gives for the logits of `hidden`.

        Args:
            hidden: (rows, length, dim).
            labels: (rows, length), of each token itself: the one before predicts it.
            num_items_in_batch: how many have loss in the whole optimizer step.
        """
        following = F.pad(labels, (0, 1), value=NO_LABEL)[:, 1:]
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            self.layer.weight,
            following.flatten().to(hidden.device),
            bias=self.layer.bias,
            scale=self.scale,
            softcap=self.softcap,
            divisor=num_items_in_batch,
        )


def language_head(model: Any) -> LanguageHead | None:
    """The head of `model`, or None and a line on the terminal where its loss needs all logits."""
    why_not = _why_not(model)
    if why_not is None:
        head = LanguageHead(output_head(model), *_scale_and_softcap(model))
        if _is_all(model, head):
            return head
        why_not = "it makes more of its last hidden states than its head does"
    print(f"the loss is computed from all logits of the model: {why_not}")
    return None


def _why_not(model: Any) -> str | None:
    """What stands against a loss without logits, as far as a look at the model tells."""
    head = output_head(model)
    if model.base_model is model or not isinstance(head, nn.Linear | AdapterModule):
        return "it has no linear layer as its head"
    if isinstance(head, AdapterModule) or any(p.requires_grad for p in head.parameters()):
        return "its head is trained or adapted"
    if is_quantized(head):
        return "its head is quantized"
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return "its experts' router has a loss of its own"
    return None


def _scale_and_softcap(model: Any) -> tuple[float, float | None]:
    """What the config says about logits."""
    config = model.config.get_text_config()

    def number(name: str) -> float | None:
        value = getattr(config, name, None)
        return float(value) if isinstance(value, int | float) and value > 0 else None

    scale = (number("logit_scale") or 1.0) * (number("lm_head_multiplier") or 1.0)
    return scale / (number("logits_scaling") or 1.0), number("final_logit_softcapping")


@torch.no_grad()
def _is_all(model: Any, head: LanguageHead) -> bool:
    """Whether head(hidden states) are the model's own logits, on a few tokens."""
    was_training = model.training
    ids = torch.arange(FEW_TOKENS, device=model.device)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    try:
        model.eval()
        hidden = model.base_model(**inputs)[0]
        if hidden.shape[-1] != head.layer.in_features:
            return False
        wanted, got = model(**inputs).logits.float(), head.logits(hidden).float()
    finally:
        model.train(was_training)
    # the same operations, but for the order of a few factors: each may round once
    close = 4 * torch.finfo(hidden.dtype).eps
    return bool((got - wanted).norm() <= close * wanted.norm())
