"""`prepare_for_training(model)`: checkpointing and the fast path, for any training loop. `neftune`:
noise on the embeddings, around the passes of one batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora.adapters.apply import active_adapters
from qlora.adapters.files import save_adapter
from qlora.adapters.wrappers import remove_wrappers
from qlora.base.modules import set_checkpointing
from qlora.errors import require
from qlora.fast import layers
from qlora.fast.head import LanguageHead, put_language_head


def prepare_for_training(
    model: PreTrainedModel, gradient_checkpointing: bool = True, *, fast_path: bool = True
) -> PreTrainedModel:
    """Prepare a model with adapters for a training loop, in place.

    Sets training mode, no key-value cache and, if asked, non-reentrant gradient checkpointing.
    `fast_path`: layers, norms (qlora.fast.layers) and a loss (qlora.fast.head) that compute the
    same numbers in less memory. Generation works as before. A later call overrides an earlier one.

    transformers' Trainer and TRL's SFTTrainer then accept the model: `model.save_pretrained`, which
    they call, writes the active adapter as long as the model has one.

    Raises UserError if the family has no gradient checkpointing.
    """
    supported = not gradient_checkpointing or model.supports_gradient_checkpointing
    family = type(model).__name__
    require(supported, f"{family} has no gradient checkpointing: use --no-gradient-checkpointing")
    model._hf_peft_config_loaded = False  # with it, checkpointing computes gradients of embeddings
    model.config.use_cache = False
    if fast_path:
        put_language_head(model)
        layers.put_norms(model)
    else:
        layers.remove_fast_path(model)
        remove_wrappers(model, lambda wrapper: isinstance(wrapper, LanguageHead | layers.RMSNorm))
    draws = layers.draws_numbers(model)
    set_checkpointing(model, on=gradient_checkpointing, preserve_rng_state=draws)
    model.train()
    if fast_path:
        layers.use_fast_path(model, recompute=gradient_checkpointing)
    model._hf_peft_config_loaded = True  # PEFT's mark: Trainer refuses a 4-bit model without it
    model.save_pretrained = MethodType(_save_pretrained, model)  # type: ignore[method-assign]
    return model


def _save_pretrained(model: PreTrainedModel, save_directory: str | Path, **options: Any) -> None:
    """The adapter of `model` in PEFT's format; transformers' method once it has none."""
    if active := active_adapters(model):
        for name in active:
            save_adapter(model, save_directory, adapter_name=name)
        return
    model._hf_peft_config_loaded = False
    type(model).save_pretrained(model, save_directory, **options)


@contextmanager
def neftune(model: Any, alpha: float, lengths: Tensor) -> Iterator[None]:
    """NEFTune's noise on the embeddings, uniform within alpha / sqrt(L d) for rows of L tokens
    (arXiv:2310.05914); `lengths` (B, T) has the L of each token. Trainer's L is that of the batch:
    with pads, and of all rows of a pack."""

    def noisy(module: Any, args: Any, output: Tensor) -> Tensor:
        if output.shape[:-1] != lengths.shape:  # a decoder's
            return output
        scale = alpha / (lengths * output.shape[-1]) ** 0.5
        noise = torch.empty_like(output).uniform_(-1, 1)
        noise *= scale[..., None].to(output)  # (B, T, 1)
        return output + noise

    source = model.get_encoder() if model.config.is_encoder_decoder else model
    handle = source.get_input_embeddings().register_forward_hook(noisy)
    try:
        yield
    finally:
        handle.remove()
