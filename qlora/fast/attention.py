"""Attention within each of several rows that stand one after the other, and seeing that it is.

Rows of n_1, n_2, … tokens as one row of their sum, with position_ids that begin again with each
(qlora.data.rows). What keeps them apart is the first of these that a model does right:

    qlora_varlen        torch.nn.attention.varlen, torch's own FlashAttention for rows of any
                        length: 16 bits, on a GPU of compute capability 8.0 or later
    flash_attention_2   the flash-attn package through transformers, where it is installed: the
                        same, and it has softcaps
    qlora_rows          scaled_dot_product_attention, a row at a time: any device and dtype. It
                        waits for the GPU once a layer, to know the lengths; the oracle of the rest
    the model's own     which makes a mask of each pack out of its position_ids

The first three compute sum n_i^2 scores and no mask. The last computes T^2 for a pack of T tokens
and holds a mask of as many bytes, made once a step, and in each layer once more in the dtype of the
scores: 48 MiB for 4,096 tokens in 16 bits, 3 GiB for 32,768. So it is for packs alone; without
packing rows are padded instead. All are set by the names that transformers' AttentionInterface
gives them, its public way to bring an attention of one's own.

Whether a model does it right is not asked of its class but seen, once, on two short rows: the
gradient of the second's logits in the first's embeddings must be exactly zero, and both must be
what they are alone, but for rounding. A model that does not read position_ids, mixes tokens with
a convolution or a recurrent state, or adds what an attention does not know (softcap, sinks) fails.

Left out: flex_attention, which compiles its kernels anew for new lengths; torch's varlen does the
same without.
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

VARLEN, ROWS = "qlora_varlen", "qlora_rows"
FEW_TOKENS = 8
CHANGES_SCORES = ("softcap", "s_aux", "position_bias")  # what other attentions of transformers take
# The kernel takes fewer heads of keys and values than of queries; later releases want to be told.
TOLD: Any = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)

Collator = Callable[[Any], dict[str, Any]]


# ---- the attentions, as transformers calls them


def varlen_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within rows, by torch's FlashAttention; with dropout as rows_attention does.

    Args:
        query: (1, heads, total, head_dim), 16 bits; key, value: of as many or fewer heads.
        sliding_window: tokens that a token sees, itself among them.
        cu_seq_lens_q: (rows + 1,) int32.

    Returns:
        (1, total, heads, head_dim)
    """
    if cu_seq_lens_q is None or dropout:
        others |= {"scaling": scaling, "sliding_window": sliding_window, "dropout": dropout}
        return rows_attention(
            module, query, key, value, attention_mask, cu_seq_lens_q=cu_seq_lens_q, **others
        )
    _refuse(others)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (total, heads, head_dim)
    cu, longest = cu_seq_lens_q, max_length_q
    window = (sliding_window - 1 if sliding_window else -1, 0)
    out: Any = varlen_attn(
        q, k, v, cu, cu, longest, longest, scale=scaling, window_size=window, **TOLD
    )
    return out[None], None


def rows_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The same, a row at a time, in any dtype; of a batch as it is where no rows are given."""
    _refuse(others)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # not enable_gqa: only some of SDPA's kernels have it
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if cu_seq_lens_q is None:
        out = _causal(query, key, value, dropout, scaling, sliding_window)
        return out.transpose(1, 2).contiguous(), None
    lengths = cu_seq_lens_q.diff().tolist()
    parts = (x.split(lengths, dim=2) for x in (query, key, value))
    outs = [
        _causal(q, k, v, dropout, scaling, sliding_window).transpose(1, 2)
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(outs, dim=1), None  # (1, total, heads, head_dim)


def _causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Causal attention, (batch, heads, length, head_dim); with more keys, queries are the last."""
    length, keys, mask = query.shape[2], key.shape[2], None
    window = min(sliding_window or keys, keys)
    if length != keys or window != keys:
        seen = torch.ones(length, keys, dtype=torch.bool, device=query.device)
        mask = seen.tril(keys - length).triu(keys - length + 1 - window)
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=mask is None, scale=scaling
    )


def _refuse(others: dict[str, Any]) -> None:
    for name in CHANGES_SCORES:
        if others.get(name) is not None:
            raise ValueError(f"no attention within rows has {name}")


def _no_mask(
    *args: Any,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> None:
    """The mask that transformers makes for these attentions: none. The last key is then that of
    the last query, which a cache of a fixed size, with room for tokens to come, does not hold to.
    """
    padded = attention_mask is not None and not bool(attention_mask.all())
    if padded or int(kv_offset) + kv_length != int(q_offset) + q_length:
        what = "these have some" if padded else "the cache of this generation has room to come"
        raise UserError(
            f"the model's attention is set for rows without padding, and {what}: "
            "model.set_attn_implementation('sdpa') sets it back"
        )


# ---- which of them


def rows_collator(
    model: Any, *, packing: bool, fast_path: bool, pad_token_id: int
) -> Collator | None:
    """What makes batches in which `model` keeps rows apart, with its attention set to do so.

    None, and a line on the terminal, where rows have to be padded.

    Raises:
        UserError: packing was asked for, and the model does not keep rows apart.
    """
    before, faults = model.config._attn_implementation, []
    for name in _candidates(model) if fast_path else ():
        fault = _fault(model, FlatCollator(), name)
        if fault is None:
            return FlatCollator()
        faults.append(f"{name}: {fault}")
    if packing:
        fault = _fault(model, PackCollator(pad_token_id), before)
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


def _candidates(model: Any) -> Iterator[str]:
    config = model.config.get_text_config()
    # No mask is made for these: of a model they must know all from their arguments, as those of
    # FlashAttention, and chunks of a long row are not among them.
    if not model._supports_flash_attn or getattr(config, "attention_chunk_size", None):
        return
    if model.device.type == "cuda" and model.dtype in (torch.float16, torch.bfloat16):
        if torch.cuda.get_device_capability(model.device) >= (8, 0):
            yield VARLEN
        if is_flash_attn_2_available():
            yield "flash_attention_2"
    yield ROWS


def _fault(model: Any, collate: Collator, attention: str) -> str | None:
    """Why rows do not stay apart with `attention`; None where they do, and it is left set."""
    for name, function in ((VARLEN, varlen_attention), (ROWS, rows_attention)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, _no_mask)
    own = model.config._attn_implementation
    was_training = model.training
    model.eval()
    try:
        rows = torch.arange(2 * FEW_TOKENS).view(2, -1).tolist()
        alone = [_seen(model, {"input_ids": torch.tensor([row])})[1].detach() for row in rows]
        model.set_attn_implementation(attention)
        if model.config._attn_implementation != attention:
            return "its attention cannot be set"
        fault = _difference(*_seen(model, collate([_pack(rows)])), alone)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        fault = first_line(error)
    finally:
        model.train(was_training)
    if fault is not None:
        model.set_attn_implementation(own)
    return fault


def _pack(rows: list[list[int]]) -> dict[str, list[int]]:
    ids = [i for row in rows for i in row]
    positions = [i for row in rows for i in range(len(row))]
    return {"input_ids": ids, "labels": ids, "position_ids": positions}


def _seen(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The embeddings, and the logits that the model makes of them, with gradients. Of the whole
    model, as some hand the arguments of a batch on to nobody."""
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "attention_mask")}
    moved = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    embedded: list[Tensor] = []

    def keep(module: Any, given: Any, found: Tensor) -> None:
        embedded.append(found if found.requires_grad else found.requires_grad_())

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        logits = model(**moved).logits
        return embedded[0], logits
    finally:
        hook.remove()


def _difference(embedded: Tensor, together: Tensor, alone: list[Tensor]) -> str | None:
    """What two rows together, (1, 2 * FEW_TOKENS, vocab), have that they have not alone."""
    first, second = (part.float() for part in together[:, : 2 * FEW_TOKENS].split(FEW_TOKENS, 1))
    # Of a sum a norm may make a constant: cosines are as good as random factors.
    some = (second * torch.arange(second.shape[-1], device=second.device).cos()).sum()
    (gradient,) = torch.autograd.grad(some, embedded)
    if gradient[:, :FEW_TOKENS].any():  # exactly 0 where nothing of it is read
        return "a row reads the one before it"
    pairs = zip((first.detach(), second.detach()), alone, strict=True)
    apart = max(float((a - b.float()).norm() / b.float().norm()) for a, b in pairs)
    # Rounding differs by a few eps, as a GPU has other kernels for other shapes, and that grows
    # from layer to layer; a row in another place is another row.
    if apart > torch.finfo(together.dtype).eps ** 0.5:
        return f"its logits are {apart:.1%} off those of a row alone"
    return None
