"""Memory of a training step of a large model on a GPU, counted without a GPU.

    python benchmarks/step_memory.py llama2-7b --seq 2048 [--batch 1] [--r 16] [--offload]

Prints {"loaded": bytes, "peak": bytes} as JSON: the memory of all tensors, without the kernels' own
memory, the CUDA context and fragmentation.

A narrow model of that family, as deep as the large one, is loaded and prepared; then each of its
tensors is replaced by one of the large model's size on the meta device, and two steps run there.
Run it in a separate process: functions that read values or check the device are replaced by
versions that allocate the same memory as on a GPU.
"""

import argparse
import copy
import json
import sys
import tempfile
import weakref
from typing import Any

import torch
import torch.fx.experimental._config as fx_config
import transformers.masking_utils
from shapes import on_meta, shape
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig

from qlora.adapters.apply import apply_lora
from qlora.adapters.lora import LoRALayer
from qlora.adapters.wrappers import base_modules, plain
from qlora.base import modules
from qlora.base.load import load_base
from qlora.base.modules import is_quantized
from qlora.config import LoraConfig, QuantConfig
from qlora.errors import UserError
from qlora.fast import head, layers
from qlora.fast.offload import offload_activations
from qlora.ops import gated, loss, nf4
from qlora.training import prepare_for_training

DTYPE = torch.bfloat16


class Counter(TorchDispatchMode):
    """Bytes of all storages that operators allocate, while they are alive."""

    def __init__(self, *, without: int) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.without = without  # values of the logits, which have a shape only
        self.is_host = False
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._note(tensor)
        return made

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, 0 if self.is_host else storage.nbytes()
        if key in self._known or tensor.numel() == self.without:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class HostMemory:
    """Copies to host memory, which is not counted."""

    def __init__(self, counter: Counter) -> None:
        self.device = torch.device("meta")
        self.counter = counter

    def allocate(self, size: int) -> Tensor:
        self.counter.is_host = True
        made = empty((size,), torch.uint8)
        self.counter.is_host = False
        return made

    def start(self, target: Tensor, source: Tensor) -> None:
        pass

    def finish(self, started: Any) -> None:
        pass


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


def prepared(config: PretrainedConfig, r: int) -> Any:
    """The narrow model, quantized, with 16-bit adapters, prepared for training."""
    with tempfile.TemporaryDirectory() as folder:
        made = AutoModelForCausalLM.from_config(narrow(config), dtype=DTYPE)
        made.save_pretrained(folder)
        model = load_base(folder, QuantConfig(compute_dtype="bf16"), device="cpu")
    apply_lora(model, LoraConfig(r=r, lora_alpha=2 * r))
    return prepare_for_training(model)


def widen(model: Any, large: dict[str, Any], r: int) -> None:
    """Replace every tensor with one of the large model's size, on the meta device."""
    for name, module in base_modules(model).items():
        own = plain(module)
        if isinstance(module, LoRALayer):
            out_features, in_features = large[name].weight.shape
            for key in module.lora_A:
                module.lora_A[key] = nn.Parameter(empty((r, in_features)))
                module.lora_B[key] = nn.Parameter(empty((out_features, r)))
        for key, parameter in own._parameters.items():
            if parameter is not None:
                size = large[name]._parameters[key].shape
                is_coded = key == "weight" and is_quantized(own)
                made = _coded(parameter, size) if is_coded else empty(size)
                own._parameters[key] = _frozen(made)
        for key, buffer in own._buffers.items():
            own._buffers[key] = empty(buffer.shape, buffer.dtype)
    if large[""].config.tie_word_embeddings:
        plain(model.get_output_embeddings()).weight = plain(model.get_input_embeddings()).weight
    model.config.vocab_size = model.vocab_size = large[""].vocab_size


def _frozen(tensor: Tensor) -> nn.Parameter:
    made = nn.Parameter(tensor, requires_grad=False)
    made.__dict__.update(tensor.__dict__)
    return made


def _coded(weight: Any, size: torch.Size) -> Tensor:
    """4-bit codes of that size, with their quantization state."""
    state = copy.copy(weight.quant_state)
    state.state2 = copy.copy(state.state2)
    state.shape = size
    blocks = size.numel() // state.blocksize
    state.absmax, state.offset = empty((blocks,), torch.uint8), empty((), torch.float32)
    state.state2.absmax = empty((blocks // state.state2.blocksize,), torch.float32)
    state.code, state.state2.code = (
        empty(code.shape, torch.float32) for code in (state.code, state.state2.code)
    )
    made: Any = empty((size.numel() // 2, 1), torch.uint8)
    made.quant_state = state
    return made


# ---- replacements for GPU code ----


class Norm(torch.autograd.Function):
    """As torch's kernel, saves x and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, empty(x.shape[:-1], torch.float32), weight)
        return empty(x.shape, x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, *_ = ctx.saved_tensors
        return empty(x.shape, x.dtype), None


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, **how: Any) -> Tensor:
    """FlashAttention, which SDPA uses where rows need no mask."""
    assert attn_mask is None
    found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
    first: Tensor = found[0]
    return first


def replace(module: Any, name: str, value: Any) -> None:
    """Set an attribute that exists: a renamed one would leave the count without its replacement."""
    if not hasattr(module, name):
        raise AttributeError(f"{module.__name__} has no {name} to replace")
    setattr(module, name, value)


def stand_ins() -> None:
    """Install the replacements in this process, permanently."""
    here: Any = torch
    scratch: dict[int, Tensor] = {}

    def buffer(size: torch.Size, dtype: torch.dtype, _: Any, slot: int) -> Tensor:
        wanted = size.numel() * dtype.itemsize
        if slot not in scratch or len(scratch[slot]) < wanted:
            scratch.pop(slot, None)
            scratch[slot] = empty((wanted,), torch.uint8)
        return scratch[slot][:wanted].view(dtype).view(size)

    replace(nf4, "scratch", buffer)
    replace(nf4, "decoder", lambda *_: lambda *_: None)
    for name in ("plain_forward", "plain_backward"):
        replace(gated, name, lambda *_: None)  # a kernel writes in place
    replace(layers, "HAS_KERNEL", ("meta",))
    F.rms_norm = lambda x, _, weight, eps: Norm.apply(x, weight)
    F.scaled_dot_product_attention = attention
    shape_of = lambda dz, weight: empty((len(dz), weight.shape[1]), torch.float32)  # noqa: E731
    replace(loss, "_input_gradient", shape_of)
    # checks of autocast and of restarting positions read values, and neither applies here
    for module in (modules, layers, head):
        replace(module, "product_dtype", lambda x: x.dtype)
    here.is_autocast_enabled = lambda *_: False
    real = torch.autocast
    here.autocast = lambda _, *given, **how: real("cpu", *given, **how)
    transformers.masking_utils.find_packed_sequence_indices = lambda _: None
    fx_config.meta_nonzero_assume_all_nonzero = True  # type: ignore[attr-defined]


# ---- the count ----


def count(name: str, *, seq: int, batch: int, r: int, offload: bool) -> dict[str, int]:
    """Bytes of the model with adapters, and the peak of the second step."""
    config = shape(name)
    model = prepared(config, r)
    large = dict(on_meta(config).named_modules())
    stand_ins()
    counter = Counter(without=batch * seq * config.vocab_size)
    context = offload_activations(copies=HostMemory(counter)) if offload else torch.enable_grad()
    with counter:
        widen(model, large, r)
        loaded = counter.now
        ids = empty((batch, seq), torch.int64)
        for _ in range(2):
            with context:
                of_batch = model(input_ids=ids, labels=ids).loss
            of_batch.backward()
            del of_batch
            model.zero_grad(set_to_none=True)
    return {"loaded": loaded, "peak": counter.peak}


def main() -> None:
    """The command; a user's error is one line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", metavar="shape", help="llama2-7b, llama3.1-8b, …")
    parser.add_argument("--offload", action="store_true", help="as --offload-activations does")
    for flag, default in (("seq", 2048), ("batch", 1), ("r", 16)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    try:
        print(json.dumps(count(**vars(parser.parse_args()))))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
