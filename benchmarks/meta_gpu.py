"""A model of any size on the meta device, where it takes the steps that it takes on a GPU.

A narrow model of a family is loaded and prepared on the CPU, so that every check runs on values;
then `widen` replaces each of its tensors by one of the large model's size without memory, and
`stand_ins` makes the code choose what it chooses on a GPU. What stands in: torch's kernels that
exist for CUDA alone (norm, FlashAttention, a 16-bit product in fp32), Triton's launches and
checks, one operator of bitsandbytes (its others have versions for meta tensors), and the checks of
a device or of autocast.

Not fake tensors of device cuda: a build of torch without CUDA refuses to run their backward pass.
Use a separate process: the replacements are permanent.
"""

import copy
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.fx.experimental._config as fx_config
import transformers.masking_utils
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PretrainedConfig
from triton.runtime import KernelInterface

from qlora.base import modules
from qlora.base.modules import is_quantized
from qlora.fast import head, layers
from qlora.ops import kernels, loss, nf4
from qlora.plan.meta import attention, coded

DTYPE = torch.bfloat16
KERNELS: Counter[str] = Counter()
"""launches of kernels that are no operator here: Triton's, and the norm's"""


def empty(size: Any, dtype: torch.dtype = DTYPE) -> Tensor:
    """A tensor on the meta device."""
    return torch.empty(tuple(size), dtype=dtype, device="meta")


# ---- the model ----


def narrow(config: PretrainedConfig) -> PretrainedConfig:
    """The config of a narrow model of the same depth, with one key head."""
    made = copy.deepcopy(config)
    made.head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    made.num_attention_heads = config.num_attention_heads // config.num_key_value_heads
    made.num_key_value_heads = 1
    made.hidden_size = made.head_dim * made.num_attention_heads
    made.intermediate_size, made.vocab_size = 256, 512
    return made


def write_narrow(config: PretrainedConfig, folder: str) -> None:
    """A checkpoint of the narrow model."""
    AutoModelForCausalLM.from_config(narrow(config), dtype=DTYPE).save_pretrained(folder)


def widen(model: Any, large: nn.Module, r: int) -> None:
    """Replace every tensor of a model with our adapters or PEFT's by one of the large model's size,
    on the meta device."""
    sizes = {name: parameter.shape for name, parameter in large.named_parameters()}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            full = f"{name}.{key}".replace("base_layer.", "").removeprefix("base_model.model.")
            layer, _, factor = full.partition(".lora_")
            if parameter is None:
                continue
            if factor:
                out_features, in_features = sizes[f"{layer}.weight"]
                size = (r, in_features) if factor.startswith("A") else (out_features, r)
                module._parameters[key] = nn.Parameter(empty(size))
            else:
                is_coded = key == "weight" and is_quantized(module)
                made = coded(parameter, sizes[full]) if is_coded else empty(sizes[full])
                module._parameters[key] = _frozen(made)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = empty(buffer.shape, buffer.dtype)
    wide: Any = large
    if wide.config.tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    model.config.vocab_size = model.vocab_size = wide.vocab_size


def _frozen(tensor: Tensor) -> nn.Parameter:
    made = nn.Parameter(tensor, requires_grad=False)
    made.__dict__.update(tensor.__dict__)
    return made


# ---- what stands in for a GPU ----

_decoder = nf4.decoder


class Norm(torch.autograd.Function):
    """As torch's kernel, saves x and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        KERNELS["rms_norm"] += 1
        ctx.save_for_backward(x, empty(x.shape[:-1], torch.float32), weight)
        return empty(x.shape, x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        KERNELS["rms_norm_backward"] += 1
        x, *_ = ctx.saved_tensors
        return empty(x.shape, x.dtype), None


class Kernel:
    """A Triton kernel whose launches are counted."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.launch

    def launch(self, *_: Any, **__: Any) -> None:
        KERNELS[self.name] += 1


def decode_on_meta(quantized: nf4.Quantized, out: Tensor) -> None:
    """By bitsandbytes; its operator with `out` takes no meta tensors (0.50)."""
    nf4.absmax(quantized)
    KERNELS["dequantize_4bit"] += 1


def decode_on_cpu(quantized: nf4.Quantized, out: Tensor) -> None:
    """By bitsandbytes, which has no operator with `out` on a CPU; the result is dropped."""
    nf4.dequantize(quantized, out.dtype)


def product_in_fp32(dz: Tensor, weight: Tensor) -> Tensor:
    """qlora.ops.loss's on a GPU."""
    return torch.mm(dz, weight, out_dtype=torch.float32)


def replace(module: Any, name: str, value: Any) -> None:
    """Set an attribute that exists: a renamed one would leave the count without its replacement."""
    if not hasattr(module, name):
        raise AttributeError(f"{module.__name__} has no {name} to replace")
    setattr(module, name, value)


def on_cpu(implementation: Callable[..., Any], _: torch.device, *args: Any) -> Any:
    """The choice of an operation's implementation, whose check then runs on a CPU."""
    return implementation(torch.device("cpu"), *args)


def choose_as_on_gpu(decode: nf4.Decoder) -> None:
    """Make our code choose a GPU's functions on any device, in this process, permanently; Triton's
    kernels only count their launches, and `decode` is bitsandbytes'."""
    for module in [m for name, m in sys.modules.items() if name.startswith("qlora.")]:
        for name, value in (("may_use_triton", lambda *_: True), ("agrees", lambda *_, **__: True)):
            if name in vars(module):  # it has imported the function
                replace(module, name, value)
        if "implementation" in vars(module):
            fresh = module.implementation.__wrapped__  # without what it has cached
            replace(module, "implementation", cache(partial(on_cpu, fresh)))
    for name, value in list(vars(kernels).items()):
        if isinstance(value, KernelInterface):
            replace(kernels, name, Kernel(name))
    replace(nf4, "decoder", lambda _, dtype: _decoder(torch.device("cuda"), dtype))
    replace(nf4, "triton_decodes", lambda *_: True)
    replace(nf4, "GPU_DECODER", "bitsandbytes")
    nf4.DECODERS["bitsandbytes"] = decode
    replace(layers, "HAS_KERNEL", ("cpu", "meta"))


def stand_ins() -> None:
    """Install all that meta tensors need, in this process, permanently."""
    here: Any = torch
    choose_as_on_gpu(decode_on_meta)
    replace(loss, "_input_gradient", product_in_fp32)
    F.rms_norm = lambda x, _, weight, eps: Norm.apply(x, weight)
    F.scaled_dot_product_attention = attention
    # checks of autocast and of restarting positions read values, and neither applies here
    for module in (modules, layers, head):
        replace(module, "product_dtype", lambda x: x.dtype)
    here.is_autocast_enabled = lambda *_: False
    real = torch.autocast
    here.autocast = lambda _, *given, **how: real("cpu", *given, **how)
    transformers.masking_utils.find_packed_sequence_indices = lambda _: None
    fx_config.meta_nonzero_assume_all_nonzero = True  # type: ignore[attr-defined]
