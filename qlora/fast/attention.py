"""Attention within each of several rows that are concatenated to one, without padding or a mask.

A batch is one row of n_1 + n_2 + … tokens whose position_ids begin again with each row
(qlora.data.batches). The first of these attentions with which the model keeps rows apart is set, by
name, through transformers' AttentionInterface:

    qlora_varlen        torch.nn.attention.varlen, torch's FlashAttention for rows of any length:
                        16 bits, on a GPU of compute capability 8.0 or later
    flash_attention_2   the same from the flash-attn package, where installed; supports softcaps
    qlora_rows          scaled_dot_product_attention, a row at a time: any device and dtype. Waits
                        for the GPU once per layer, to read the lengths; the oracle of the others
    the model's own     with a mask that the model computes from the position_ids of a pack

The first three compute sum n_i^2 scores and no mask. The last computes T^2 for a pack of T tokens,
with a mask of T^2 bytes per step and once more per layer in the dtype of the scores: 3 GiB for
32,768 tokens in 16 bits. So it is used for packs only; without packing, rows are padded instead.

The check runs two short rows together: the gradient of the second's logits in the first's
embeddings must be zero, and all logits must be those of each row alone, up to rounding. It fails
for models that do not read position_ids, mix tokens by a convolution or a recurrent state, or need
an unsupported argument (softcap, sinks). Left out: flex_attention, which compiles for new lengths.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils.import_utils import is_flash_attn_2_available

from qlora.data.batches import FlatCollator, PackCollator
from qlora.errors import first_line, require
from qlora.ops import relative_error

VARLEN, ROWS = "qlora_varlen", "qlora_rows"
FEW_TOKENS = 8  # per row of the check
# releases of torch after 2.11 need it for grouped-query attention
GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def rows_collator(
    model: Any, *, packing: bool, fast_path: bool, pad_token_id: int
) -> FlatCollator | PackCollator | None:
    """The collator for batches whose rows `model` keeps apart; sets the model's attention.

    None where rows have to be padded; prints why.

    Raises:
        UserError: `packing`, and the model does not keep rows apart.
    """
    for name, function in ((VARLEN, varlen_attention), (ROWS, rows_attention)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, _no_mask)
    own, reason = model.config._attn_implementation, "its attention is one of its own"
    candidates: list[str] = []
    # as for FlashAttention, arguments must determine the attention: none does for Llama 4's chunks
    has_chunks = getattr(model.config.get_text_config(), "attention_chunk_size", None)
    if fast_path and model._supports_flash_attn and not has_chunks:
        if model.device.type == "cuda" and model.dtype in (torch.float16, torch.bfloat16):
            if torch.cuda.get_device_capability(model.device) >= (8, 0):
                candidates.append(VARLEN)
            if is_flash_attn_2_available():
                candidates.append("flash_attention_2")
        candidates.append(ROWS)
    for name in candidates:
        fault = _set_if_correct(model, name, FlatCollator())
        if fault is None:
            return FlatCollator()
        reason = f"{name}: {fault}"
    if packing:
        fault = _set_if_correct(model, own, PackCollator(pad_token_id))
        require(
            fault is None,
            "--packing wants a model that keeps the rows of a pack apart, by their position_ids; "
            f"{type(model).__name__} does not ({fault}): leave --packing out, rows are padded",
        )
        return PackCollator(pad_token_id)
    if fast_path:
        print(f"rows are padded to the longest of their batch ({reason})")
    return None


def varlen_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention within rows by torch's FlashAttention; with dropout by rows_attention.

    In 16 bits, query (1, heads, total, head_dim), key and value the same or with fewer heads, to
    (1, total, heads, head_dim). `options`: those of rows_attention; max_length_q, the longest row.
    """
    bounds = options.get("cu_seq_lens_q")
    if bounds is None or options.get("dropout"):
        return rows_attention(module, query, key, value, attention_mask, **options)
    _refuse_unsupported(options)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (total, heads, head_dim)
    longest, window = options["max_length_q"], options.get("sliding_window")
    settings: Any = {"window_size": (window - 1 if window else -1, 0), **GQA}
    settings["scale"] = options.get("scaling")
    out: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest, **settings)
    return out[None], None


def rows_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """The same a row at a time, in any dtype; without cu_seq_lens_q, of an ordinary batch.

    `options`: dropout; scaling of the scores; sliding_window, the tokens that a token attends to,
    including itself; cu_seq_lens_q (rows + 1,) int32, the rows' starts, and the end.
    """
    _refuse_unsupported(options)
    settings = {"dropout_p": options.get("dropout", 0.0), "scale": options.get("scaling")}
    window, bounds = options.get("sliding_window"), options.get("cu_seq_lens_q")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # not enable_gqa, which only some of SDPA's kernels support
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    parts: Any = [(query, key, value)]
    if bounds is not None:
        lengths = bounds.diff().tolist()
        parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    outs = []
    for q, k, v in parts:  # (batch, heads, length, head_dim)
        length, keys, mask = q.shape[2], k.shape[2], None
        reach = min(window or keys, keys)
        if length != keys or reach != keys:  # of more keys than queries, the last are the queries'
            mask = torch.ones(length, keys, dtype=torch.bool, device=q.device)
            mask = mask.tril(keys - length).triu(keys - length + 1 - reach)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, **settings)
        outs.append(out.transpose(1, 2))
    return torch.cat(outs, dim=1) if len(outs) > 1 else outs[0].contiguous(), None


def _refuse_unsupported(options: dict[str, Any]) -> None:
    for name in ("softcap", "s_aux", "position_bias"):  # they change the scores
        if options.get(name) is not None:
            raise ValueError(f"no attention within rows has {name}")


def _no_mask(*args: Any, attention_mask: Tensor | None = None, **sizes: Any) -> None:
    """For transformers: none. So the last key must be the last query's: no static cache."""
    queries, keys = (int(sizes.get(f"{x}_offset", 0)) + sizes[f"{x}_length"] for x in ("q", "kv"))
    is_padded = attention_mask is not None and not attention_mask.is_meta  # a plan's has no values
    is_padded = is_padded and not bool(torch.as_tensor(attention_mask).all())
    reason = "these have some" if is_padded else "this cache has space for more tokens"
    require(
        not is_padded and keys == queries,
        f"the model's attention is set for rows without padding, and {reason}: "
        "model.set_attn_implementation('sdpa') sets it back",
    )


def _set_if_correct(model: Any, attention: str, collate: Any) -> str | None:
    """Set `attention` and return None if `model` keeps rows apart with it; else return why not."""
    own, was_training, fault = model.config._attn_implementation, model.training, None
    model.eval()
    try:
        ids = torch.arange(2 * FEW_TOKENS)
        alone = [_forward(model, {"input_ids": row})[1].detach() for row in ids.view(2, 1, -1)]
        model.set_attn_implementation(attention)
        if model.config._attn_implementation != attention:
            return "its attention cannot be set"
        pack = [{"input_ids": row, "labels": row} for row in ids.view(2, -1).tolist()]
        embedded, together = _forward(model, collate([pack]))
        first, second = together[:, : 2 * FEW_TOKENS].split(FEW_TOKENS, 1)
        # weighted, as a plain sum of a norm's outputs may be constant; cosines as random weights
        weights = torch.arange(second.shape[-1], device=second.device).cos()
        (gradient,) = torch.autograd.grad((second.float() * weights).sum(), embedded)
        error = relative_error([first.detach(), second.detach()], alone)
        if gradient[:, :FEW_TOKENS].any():  # exactly 0 for tokens that are not read
            fault = "a row reads the one before it"
        # rounding differs by a few eps per layer; a row at another position by far more
        elif error > torch.finfo(together.dtype).eps ** 0.5:
            fault = f"its logits are {error:.1%} off those of a row alone"
    except (ImportError, RuntimeError, TypeError, ValueError) as failure:
        fault = first_line(failure)
    finally:
        model.train(was_training)
    if fault is not None:
        model.set_attn_implementation(own)
    return fault


def _forward(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Embeddings and logits of a batch, with a graph between them, by the whole model: some with a
    head do not pass the batch's arguments on."""
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "attention_mask")}
    moved = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    embedded: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> None:
        embedded.append(output if output.requires_grad else output.requires_grad_())

    with model.get_input_embeddings().register_forward_hook(keep):
        logits: Tensor = model(**moved).logits
    return embedded[0], logits
