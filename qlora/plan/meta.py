"""A model on the meta device, where it takes the steps that it takes on a GPU, or on a CPU.

`widen` turns a narrow model, loaded and prepared on the CPU so that every check ran on values, into
the large model: parameters and buffers of its sizes without memory, and its modules' numbers.
`as_on` replaces what meta tensors lack, and puts it back: torch's kernels for CUDA alone (RMSNorm,
attention), a CPU's attention, autocast's checks of a device, and methods that read values.

Not fake tensors of device cuda: a build of torch without CUDA refuses to run their backward pass.
`backward` runs on a second thread, as autograd's does for a GPU: buffers count once a thread.
"""

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.fx.experimental._config as fx_config
import transformers.masking_utils
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from qlora.adapters.wrappers import Wrapper
from qlora.base.load import own_kernel
from qlora.base.modules import is_quantized, was_conv1d
from qlora.ops import meta_as_cpu, nf4

WRAPPED = "base_layer."  # in names of what is behind wrappers
# Attributes of modules that loading and the preparation for training set.
KEPT = ("training", "gradient_checkpointing", "name_or_path", "is_loaded_in_4bit")
QUESTIONS = ("__bool__", "__contains__")  # is nothing masked? is a pad among the tokens? No
PLAIN = (int, float, str, tuple, list, torch.Size, Tensor, PreTrainedConfig)


def empty(size: Any, dtype: torch.dtype) -> Tensor:
    """A tensor on the meta device."""
    return torch.empty(tuple(size), dtype=dtype, device="meta")


# ---- the model ----


def widen(model: Any, large: nn.Module, device: str = "cuda") -> None:
    """Give `model` the sizes of `large`, in place: the same modules with the same adapters, on the
    meta device. Dtypes stay, and so does what is quantized."""
    every: Any = {"remove_duplicate": False}
    twins = {
        f"{name}.".replace(WRAPPED, "").rstrip("."): module
        for name, module in large.named_modules(**every)
        if not isinstance(module, Wrapper)
    }
    sizes = {n.replace(WRAPPED, ""): p.shape for n, p in large.named_parameters(**every)}
    sizes |= {n.replace(WRAPPED, ""): b.shape for n, b in large.named_buffers(**every)}
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for name, module in list(model.named_modules()):
        prefix = f"{name}.".replace(WRAPPED, "").lstrip(".")
        twin = None if isinstance(module, Wrapper) else twins.get(prefix[:-1])
        for key, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    made[parameter] = _wide(module, key, parameter, sizes[prefix + key], twin)
                module._parameters[key] = made[parameter]
        for key, buffer in module._buffers.items():
            if buffer is not None:
                size = sizes.get(prefix + key, buffer.shape)
                module._buffers[key] = empty(size, buffer.dtype)
        if twin is not None:
            _copy_numbers(module, twin)
        if isinstance(module, Linear4bit):  # on a CPU, of the class for the large width
            module.__class__ = Linear4bit
            if device == "cpu":
                own_kernel(module)


def _wide(module: Any, key: str, narrow: nn.Parameter, size: Any, twin: Any) -> nn.Parameter:
    """The parameter of that size that stands for one of the narrow model."""
    if key == "weight" and is_quantized(module):
        out_first = size[::-1] if twin is not None and was_conv1d(twin) else size
        made = coded(narrow, torch.Size(out_first))
        module.quant_state = made.quant_state  # type: ignore[attr-defined]
    else:
        made = empty(size, narrow.dtype)
    parameter = nn.Parameter(made, requires_grad=narrow.requires_grad)
    parameter.__dict__.update(made.__dict__)
    return parameter


def coded(weight: Any, size: torch.Size) -> Tensor:
    """4-bit codes of that size, with their quantization state."""
    state = copy.copy(weight.quant_state)
    state.shape = size
    blocks = -(-size.numel() // state.blocksize)
    state.absmax = empty((blocks,), state.absmax.dtype)
    state.code = empty(state.code.shape, torch.float32)
    if state.nested:
        state.state2, state.offset = copy.copy(state.state2), empty((), torch.float32)
        state.state2.absmax = empty((-(-blocks // state.state2.blocksize),), torch.float32)
        state.state2.code = empty(state.state2.code.shape, torch.float32)
    made: Any = empty((-(-size.numel() // 2), 1), torch.uint8)
    made.quant_state = state
    return made  # type: ignore[no-any-return]


def _copy_numbers(module: nn.Module, twin: nn.Module) -> None:
    """The plain attributes of `twin`, such as head counts: models compute with them."""
    own = vars(module)
    for key, value in vars(twin).items():
        if key == "config":
            value._attn_implementation = own["config"]._attn_implementation
            value.use_cache = False
        if key[0] != "_" and key in own and key not in KEPT and isinstance(value, PLAIN):
            own[key] = value


# ---- what stands in for a GPU ----


def unread(name: str, answer: Any) -> AbstractContextManager[Any]:
    """A method of tensors that gives `answer` for those on the meta device: they have no values."""
    own = getattr(Tensor, name)

    def read(self: Tensor, *args: Any) -> Any:
        return answer if self.is_meta else own(self, *args)

    return patch.object(Tensor, name, read)


class Norm(torch.autograd.Function):
    """torch's kernel for a GPU: keeps x, one number per row and the weight. On meta tensors torch
    composes it of others, in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, empty(x.shape[:-1], torch.float32), weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, _, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def rms_norm(x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
    """As F.rms_norm on a GPU."""
    return Norm.apply(x, weight)  # type: ignore[no-any-return, no-untyped-call]


def attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What scaled_dot_product_attention calls on a GPU: FlashAttention without a mask in 16 bits,
    else the kernel that takes one, which wants as many heads and a mask in q's dtype."""
    if attn_mask is None and q.dtype != torch.float32 and q.shape[-1] == v.shape[-1] <= 256:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(q, k, v, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]
    if enable_gqa and (groups := q.shape[1] // k.shape[1]) > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    if attn_mask is not None:
        attn_mask = attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    found = efficient(q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale)
    return found[0]  # type: ignore[no-any-return]


def attention_of_cpu(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What scaled_dot_product_attention calls on a CPU: its FlashAttention, which wants a mask in
    q's dtype; with dropout, or values of another size than keys, products and a softmax."""
    if dropout_p or q.shape[-1] != v.shape[-1]:
        settings: Any = {"scale": scale, "enable_gqa": enable_gqa}
        return _attention(q, k, v, attn_mask, dropout_p, is_causal, **settings)
    if enable_gqa and (groups := q.shape[1] // k.shape[1]) > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    mask = None if attn_mask is None else attn_mask.to(q.dtype)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found = flash(q, k, v, dropout_p, is_causal, attn_mask=mask, scale=scale)
    return found[0]  # type: ignore[no-any-return]


_attention = F.scaled_dot_product_attention


@contextmanager
def as_on(device: str, *, packed: bool = False, lengths: Sequence[int] = ()) -> Iterator[None]:
    """Within the block, models of meta tensors run, and choose what they choose on a `device`: cuda
    or cpu. `packed`: positions begin again within a row, which models find in their values; those
    of the `lengths` of rows are read by qlora.fast.attention."""
    autocast, is_enabled, generator = torch.autocast, torch.is_autocast_enabled, torch.Generator

    def of_cpu(kind: str, *args: Any, **settings: Any) -> Any:
        return autocast("cpu" if kind == "meta" else kind, *args, **settings)

    def on_cpu(device: torch.device | str = "cpu") -> torch.Generator:
        return generator("cpu" if torch.device(device).type == "meta" else device)

    def is_on(*kind: str) -> bool:
        return kind != ("meta",) and is_enabled(*kind)

    with ExitStack() as stack:
        for name in QUESTIONS:
            stack.enter_context(unread(name, False))
        stack.enter_context(unread("tolist", [*lengths]))
        stack.enter_context(unread("item", 0))  # the longest row, the expert of a token
        if device == "cpu":
            stack.enter_context(meta_as_cpu())
        else:
            stack.enter_context(patch.object(F, "rms_norm", rms_norm))
        own = attention_of_cpu if device == "cpu" else attention
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", own))
        stack.enter_context(patch.object(torch, "autocast", of_cpu))
        stack.enter_context(patch.object(torch, "Generator", on_cpu))
        stack.enter_context(patch.object(torch, "is_autocast_enabled", is_on))
        masks = transformers.masking_utils
        found = (lambda positions: positions) if packed else (lambda _: None)
        stack.enter_context(patch.object(masks, "find_packed_sequence_indices", found))
        stack.enter_context(all_nonzero())
        yield


def all_nonzero() -> AbstractContextManager[Any]:
    """Within the block, on this thread, a nonzero of meta tensors finds all: tokens have labels."""
    settings: Any = {"meta_nonzero_assume_all_nonzero": True}
    return fx_config.patch(**settings)  # type: ignore[no-any-return, attr-defined]


_autograd = ThreadPoolExecutor(max_workers=1)


def forget_buffers() -> None:
    """Free the buffers of decoded weights of both threads."""
    for forget in (vars(nf4._thread).clear, _autograd.submit(_clear_own).result):
        forget()


def _clear_own() -> None:
    vars(nf4._thread).clear()


def backward(loss: Tensor, *modes: AbstractContextManager[Any]) -> None:
    """`loss.backward()` on a thread of its own, always the same, within `modes`."""

    def run() -> None:
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            loss.backward()

    _autograd.submit(run).result()
