"""Attention within each of several rows that are concatenated to one, without padding or a mask.

A batch is one row of n_1 + n_2 + … tokens whose position_ids begin again with each row
(qlora.data.rows). The first of these attentions that the model computes correctly is set, by name,
through transformers' AttentionInterface:

    qlora_varlen        torch.nn.attention.varlen, torch's FlashAttention for rows of any length:
                        16 bits, on a GPU of compute capability 8.0 or later
    flash_attention_2   the same from the flash-attn package, where installed; it has softcaps
    qlora_rows          scaled_dot_product_attention, a row at a time: any device and dtype. Waits
                        for the GPU once per layer, to read the lengths; the oracle of the others
    the model's own     which makes a mask of each pack out of its position_ids

The first three compute sum n_i^2 scores and no mask. The last computes T^2 for a pack of T tokens,
with a mask of T^2 bytes per step and once more per layer in the dtype of the scores: 3 GiB for
32,768 tokens in 16 bits. So it is used for packs alone; without packing, rows are padded instead.

Two short rows are run: the gradient of the second's logits in the first's embeddings must be zero,
and the logits of both those of each row alone, up to rounding. A model that does not read
position_ids, mixes tokens by a convolution or a recurrent state, or has what an attention does not
support (softcap, sinks) fails. Left out: flex_attention, which compiles kernels for new lengths.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils.import_utils import is_flash_attn_2_available

from qlora.data.rows import FlatCollator, PackCollator
from qlora.errors import UserError, first_line
from qlora.ops.agree import relative_error

VARLEN, ROWS = "qlora_varlen", "qlora_rows"
FEW_TOKENS = 8  # of each of the two rows that are tried
UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # arguments that change the scores
# releases of torch after 2.11 want to know of fewer heads of keys and values than of queries
GROUPED = [name for name in inspect.signature(varlen_attn).parameters if name == "enable_gqa"]

Collator = Callable[[Any], dict[str, Any]]


def rows_collator(
    model: Any, *, packing: bool, fast_path: bool, pad_token_id: int
) -> Collator | None:
    """The collator of batches in which `model` keeps rows apart; sets the model's attention.

    None, and a printed line, where rows have to be padded.

    Raises:
        UserError: packing is asked for, and the model does not keep rows apart.
    """
    for name, function in ((VARLEN, varlen_attention), (ROWS, rows_attention)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, _no_mask)
    own, faults = model.config._attn_implementation, []
    for name in _candidates(model) if fast_path else ():
        fault = _try(model, FlatCollator(), name)
        if fault is None:
            return FlatCollator()
        faults.append(f"{name}: {fault}")
    if packing:
        fault = _try(model, PackCollator(pad_token_id), own)
        if fault is None:
            return PackCollator(pad_token_id)
        raise UserError(
            "--packing wants a model that keeps the rows of a pack apart, by their position_ids; "
            f"{type(model).__name__} does not ({fault}): leave --packing out, rows are padded"
        )
    if fast_path:
        reason = faults[-1] if faults else "its attention is one of its own"
        print(f"rows are padded to the longest of their batch ({reason})")
    return None


# ---- the attentions, with the arguments of transformers


def varlen_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention within rows by torch's FlashAttention; with dropout by rows_attention.

    Args:
        query: (1, heads, total, head_dim), 16 bits; key, value: the same, or fewer heads.
        options: those of rows_attention, and max_length_q, the longest row.

    Returns:
        (1, total, heads, head_dim)
    """
    bounds = options.get("cu_seq_lens_q")
    if bounds is None or options.get("dropout"):
        return rows_attention(module, query, key, value, attention_mask, **options)
    _refuse_unsupported(options)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (total, heads, head_dim)
    longest, window = options["max_length_q"], options.get("sliding_window")
    settings: Any = {"scale": options.get("scaling"), **dict.fromkeys(GROUPED, True)}
    settings["window_size"] = (window - 1 if window else -1, 0)
    out: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest, **settings)
    return out[None], None


def rows_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """The same a row at a time, in any dtype; of a usual batch where no rows are given.

    Args:
        options: dropout; scaling of the scores; sliding_window, the tokens that a token attends to,
            including itself; cu_seq_lens_q (rows + 1,) int32, where rows begin, and the end.
    """
    _refuse_unsupported(options)
    how = {"dropout_p": options.get("dropout", 0.0), "scale": options.get("scaling")}
    window, bounds = options.get("sliding_window"), options.get("cu_seq_lens_q")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # not enable_gqa: only some of SDPA's kernels have it
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if bounds is None:
        return _causal(query, key, value, window, **how).transpose(1, 2).contiguous(), None
    lengths = bounds.diff().tolist()
    parts = (x.split(lengths, dim=2) for x in (query, key, value))
    outs = [_causal(q, k, v, window, **how) for q, k, v in zip(*parts, strict=True)]
    return torch.cat([out.transpose(1, 2) for out in outs], dim=1), None  # (1, total, heads, dim)


def _causal(query: Tensor, key: Tensor, value: Tensor, window: int | None, **how: Any) -> Tensor:
    """Causal attention, (batch, heads, length, head_dim); with more keys, queries are the last."""
    length, keys, mask = query.shape[2], key.shape[2], None
    window = min(window or keys, keys)
    if length != keys or window != keys:
        mask = torch.ones(length, keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(keys - length).triu(keys - length + 1 - window)
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, **how)


def _refuse_unsupported(others: dict[str, Any]) -> None:
    for name in UNSUPPORTED:
        if others.get(name) is not None:
            raise ValueError(f"no attention within rows has {name}")


def _no_mask(*args: Any, attention_mask: Tensor | None = None, **sizes: Any) -> None:
    """transformers' mask for these attentions: none. So the last key must be that of the last
    query, which a cache of fixed size, with space for tokens to come, does not satisfy."""
    queries, keys = (int(sizes.get(f"{x}_offset", 0)) + sizes[f"{x}_length"] for x in ("q", "kv"))
    is_padded = attention_mask is not None and not bool(attention_mask.all())
    if is_padded or keys != queries:
        what = "these have some" if is_padded else "this cache has space for more tokens"
        raise UserError(
            f"the model's attention is set for rows without padding, and {what}: "
            "model.set_attn_implementation('sdpa') sets it back"
        )


# ---- which of them a model computes correctly


def _candidates(model: Any) -> Iterator[str]:
    config = model.config.get_text_config()
    # These get no mask: the model must say all by arguments, as to FlashAttention, which has none
    # for chunks of a long row.
    if not model._supports_flash_attn or getattr(config, "attention_chunk_size", None):
        return
    if model.device.type == "cuda" and model.dtype in (torch.float16, torch.bfloat16):
        if torch.cuda.get_device_capability(model.device) >= (8, 0):
            yield VARLEN
        if is_flash_attn_2_available():
            yield "flash_attention_2"
    yield ROWS


def _try(model: Any, collate: Collator, attention: str) -> str | None:
    """Set `attention` and return None, if `model` keeps rows apart with it; else the reason."""
    own, was_training = model.config._attn_implementation, model.training
    model.eval()
    try:
        ids = torch.arange(2 * FEW_TOKENS)
        alone = [_run(model, {"input_ids": row})[1].detach() for row in ids.view(2, 1, -1)]
        model.set_attn_implementation(attention)
        if model.config._attn_implementation != attention:
            return "its attention cannot be set"
        pack = [{"input_ids": row, "labels": row} for row in ids.view(2, -1).tolist()]
        fault = _fault(*_run(model, collate([pack])), alone)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        fault = first_line(error)
    finally:
        model.train(was_training)
    if fault is not None:
        model.set_attn_implementation(own)
    return fault


def _run(model: Any, batch: dict[str, Any]) -> tuple[list[Tensor], Tensor]:
    """The embeddings of a batch and its logits, which have gradients in them. Of the whole model:
    some heads do not pass a batch's arguments on."""
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "attention_mask")}
    moved = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    embedded: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> None:
        embedded.append(output if output.requires_grad else output.requires_grad_())

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        return embedded, model(**moved).logits
    finally:
        hook.remove()


def _fault(embedded: list[Tensor], together: Tensor, alone: list[Tensor]) -> str | None:
    """How the logits of two rows together, (1, 2 * FEW_TOKENS, vocab), differ from each alone."""
    first, second = together[:, : 2 * FEW_TOKENS].split(FEW_TOKENS, 1)
    # a norm may make a constant of a plain sum: cosines are as good as random factors
    weighted = second.float() * torch.arange(second.shape[-1], device=second.device).cos()
    (gradient,) = torch.autograd.grad(weighted.sum(), embedded[0])
    if gradient[:, :FEW_TOKENS].any():  # exactly 0 where nothing of it is read
        return "a row reads the one before it"
    error = relative_error([first.detach(), second.detach()], alone)
    # rounding differs by a few eps per layer; a row at another position by far more
    if error > torch.finfo(together.dtype).eps ** 0.5:
        return f"its logits are {error:.1%} off those of a row alone"
    return None
