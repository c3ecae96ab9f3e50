"""LoRA layers and gated MLPs as autograd functions that save little for the backward pass.

Layers i that share an input x (n, in), with frozen W_i (out_i, in), factors A_i (r, in) and
B_i (out_i, r), and scaling s_i:

    y_i  = x W_i' + s_i (x A_i') B_i'
    dx   = sum_i dy_i W_i + s_i (dy_i B_i) A_i
    dA_i = s_i (dy_i B_i)' x        dB_i = s_i dy_i' (x A_i')

B A is never formed. The A of all layers are stacked, so that x is read once for them. The backward
pass needs x, which its producer holds anyway, x A' (n, r), and the packed weight by reference;
plain autograd allocates a tensor of dx's size for each term and one of y's size for each sum.

A gated MLP, y = down(act(gate(x)) * up(x)), is one function. It saves x, gate(x) and up(x) and
recomputes the rest. With `recompute`, for models with gradient checkpointing, it saves x alone (see
_SaveInput) and computes a tile of tokens at a time, since the factors' gradients are sums over
tokens: for rows of any length, a few tensors (tile, intermediate) exist at a time.

Plain equivalents: LoRALinear's own forward, and the model's own MLP. Left to them: DoRA, a bias of
B, several adapters at once.
"""

import itertools
import math
import os
import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qlora.ops import agrees, computing_device
from qlora.ops.gated import gated_backward, gated_forward
from qlora.ops.nf4 import decoded, keep, kept

# Of each of the four tensors (tile, intermediate) of a backward pass: 6,000 tokens of Llama-2-7B in
# 16 bits, more than a matrix product needs for full speed.
TILE_BYTES = 128 << 20
# oneDNN compiles a kernel for each shape, 0.6 MiB, in 0.3 ms: 20 for a number of tokens. It would
# keep 1024, and torch's interface to it as many.
KERNELS = 64


class Dropout(NamedTuple):
    """One draw of dropout (arXiv:1207.0580): a value is 0 with probability p, else x / (1 - p).

    The mask is not saved but drawn again from its seed: the seven masks of a decoder layer, a byte
    per value, would take as much memory as 3.5 of its inputs in 16 bits. Seeds come from torch's
    CPU generator, whose state gradient checkpointing restores; no draw waits for the GPU.
    """

    p: float  # 0 <= p < 1
    seed: int

    @classmethod
    def drawn(cls, p: float) -> Self:
        return cls(p, int(torch.randint(2**62, ())))

    @property
    def gain(self) -> float:
        return 1 / (1 - self.p)

    def mask(self, x: Tensor, tile: int = 0) -> Tensor:
        """Bool in x's shape, False where x is dropped; each tile has a draw of its own."""
        generator = torch.Generator(x.device).manual_seed(self.seed + tile)
        mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        return mask.bernoulli_(1 - self.p, generator=generator)

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.mask(x) * self.gain


class LayerSpec(NamedTuple):
    """A linear layer with an adapter, except A and B."""

    layer: nn.Module  # a frozen Linear4bit or nn.Linear
    scaling: float
    dropout: Dropout | None = None
    slot: int = 0  # where a forward pass that is run again keeps its weight for dx; 0: nowhere


Specs = Sequence[LayerSpec]
Factors = Sequence[tuple[Tensor, Tensor]]  # A (r, in) and B (out, r) of each, in any float dtype


def lora_linear(x: Tensor, specs: Specs, factors: Factors) -> tuple[Tensor, ...]:
    """The outputs (..., out) of layers with adapters that share the input x (..., in).

    x is in the dtype that the layers compute in, which is that of the outputs.
    """
    matrices = itertools.chain(*factors)  # A, B, A, B, …
    return _LoRALinear.apply(x, tuple(specs), *matrices)  # type: ignore[no-any-return, no-untyped-call]


def lora_mlp(
    x: Tensor, specs: Specs, factors: Factors, *, activation: str, recompute: bool = False
) -> Tensor:
    """The output (..., in) of a gated MLP; x, and specs and factors of gate, up and down.

    Args:
        activation: one of qlora.ops.gated.ACTS.
        recompute: save x alone, and compute gate(x) and up(x) again in the backward pass.
    """
    matrices = list(itertools.chain(*factors))
    input_node = None
    if recompute and torch.is_grad_enabled() and x.requires_grad:
        x = _SaveInput.apply(x)  # type: ignore[no-untyped-call]
        input_node = x.grad_fn
    settings = tuple(specs), activation, recompute, input_node
    return _LoRAMLP.apply(x, settings, *matrices)  # type: ignore[no-any-return, no-untyped-call]


class _Held:
    """Factors that a function holds for its backward pass: as many tensors in save_for_backward
    would cost host time, of checkpointing's hooks, and are parameters in any case."""

    def __init__(self, matrices: tuple[Tensor, ...]) -> None:
        self.matrices, self.versions = matrices, [matrix._version for matrix in matrices]

    def unchanged(self) -> tuple[Tensor, ...]:
        """They; raises RuntimeError, as autograd does, if one was changed in place since."""
        if self.versions != [matrix._version for matrix in self.matrices]:
            raise RuntimeError("a LoRA factor has been modified by an inplace operation")
        return self.matrices


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, specs: Any, *matrices: Tensor) -> tuple[Tensor, ...]:
        low, *ys = _outputs(x, _layers(specs, matrices, x.dtype))
        ctx.save_for_backward(x, low)
        ctx.specs, ctx.factors = specs, _Held(matrices)
        ctx.set_materialize_grads(False)  # None for an output that the loss does not use
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        x, low = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])  # (..., in) -> (n, in)
        layers = _layers(ctx.specs, ctx.factors.unchanged(), x.dtype)
        dx, gradients = _gradients(rows, low, layers, dys, ctx.needs_input_grad[0])
        return None if dx is None else dx.view(x.shape), None, *gradients


class _SaveInput(torch.autograd.Function):
    """The identity; it saves the MLP's input on the MLP's behalf.

    torch's checkpointing runs a layer's forward again in the backward pass, and stops when all that
    the first run saved is there. A function's save_for_backward takes effect at its end, so the
    whole MLP would run for its input alone. Saved by a separate node, the input is there before the
    MLP begins: the down projection, a fifth of a layer's products, is not computed twice.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> Any:
        return dx


class _LoRAMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: Any, *matrices: Tensor) -> Tensor:
        ctx.specs, ctx.activation, ctx.recompute, ctx.input_node = settings
        rows = x.reshape(-1, x.shape[-1])  # (..., in) -> (n, in)
        tiles = _tiles(ctx, rows, matrices)
        y = x.new_empty(*x.shape[:-1], len(matrices[-1]))
        out = y.view(len(rows), y.shape[-1])
        saved: tuple[Tensor, ...] = ()
        for tile, (*gate_up, down) in tiles:
            saved = _outputs(rows[tile], gate_up)  # x A', gate(x) and up(x)
            h = gated_forward(saved[1], saved[2], ctx.activation)
            down.forward(h, down.project(h, down.mask(h)), out[tile])
            del h
            if ctx.recompute:
                saved = ()  # freed before the next tile is computed
        if ctx.input_node is None:
            ctx.save_for_backward(x, *saved)
        ctx.factors = _Held(matrices)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        # first, because under checkpointing this runs the forward pass up to _SaveInput again
        x, *saved = (ctx.input_node or ctx).saved_tensors
        matrices = ctx.factors.unchanged()
        rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        tiles = _tiles(ctx, rows, matrices)
        if len(tiles) == 1:
            dx, gradients = _mlp_gradients(ctx, rows, dy_rows, saved, tiles[0][1])
        else:
            dx = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
            gradients = []
            for tile, layers in tiles:
                out = None if dx is None else dx[tile]
                _, of_tile = _mlp_gradients(ctx, rows[tile], dy_rows[tile], (), layers, out)
                of_tile = [g.float() for g in of_tile]  # their sums are rounded once
                pairs = zip(gradients, of_tile, strict=True)
                gradients = [total.add_(g) for total, g in pairs] if gradients else of_tile
        return None if dx is None else dx.view(x.shape), None, *gradients


class _Layer(NamedTuple):
    """A LayerSpec and its factors in the dtype of x. Inputs are flat: x (n, in), dy (n, out)."""

    layer: Any
    scaling: float
    dropout: Dropout | None
    slot: int
    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    dense: Tensor | None = None  # W (out, in), if it was decoded for more than one product
    tile: int = 0

    def weight(self, slot: int = 0) -> Tensor:
        """W (out, in), valid until the next weight is decoded into that slot."""
        return decoded(self.layer, self.A.dtype, slot) if self.dense is None else self.dense

    def mask(self, x: Tensor) -> Tensor | None:
        """Dropout's mask of this tile's x (n, in), drawn again; None without dropout."""
        return None if self.dropout is None else self.dropout.mask(x, self.tile)

    def project(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x A', with dropout: (n, in) @ (in, r) -> (n, r)."""
        if self.dropout is None or mask is None:
            return linear(x, self.A)
        return linear(x * mask, self.A).mul_(self.dropout.gain)

    def forward(self, x: Tensor, low: Tensor, out: Tensor | None = None) -> Tensor:
        """y (..., out), of x (..., in) and low = x A' (n, r), in `out` if it is given."""
        bias = None if self.layer.bias is None else self.layer.bias.to(x.dtype)
        weight = keep(self.layer, x.dtype, self.slot) if self.slot else self.weight()
        y = linear(x, weight, bias, out)
        # (n, r) @ (r, out) -> (n, out)
        y.view(-1, y.shape[-1]).addmm_(low, self.B.T, alpha=self.scaling)
        return y

    def low_gradient(self, dy: Tensor, out: Tensor) -> Tensor:
        """s dy B, the gradient of x A': (n, out) @ (out, r) -> (n, r), into `out`."""
        gain = 1.0 if self.dropout is None else self.dropout.gain
        return product(dy, self.B, self.scaling * gain, out)

    def add_input_gradient(self, dx: Tensor, dlow: Tensor, mask: Tensor | None) -> Tensor:
        """dx += dlow A, the gradient through A: (n, r) @ (r, in) -> (n, in)."""
        if mask is None:
            return dx.addmm_(dlow, self.A)
        return dx.add_((dlow @ self.A).mul_(mask))

    def A_gradient(self, x: Tensor, dlow: Tensor, mask: Tensor | None) -> Tensor:
        """dA = dlow' x: (r, n) @ (n, in) -> (r, in)."""
        return inner(dlow, x if mask is None else x * mask)

    def B_gradient(self, dy: Tensor, low: Tensor) -> Tensor:
        """dB = s dy' (x A'): (out, n) @ (n, r) -> (out, r)."""
        return inner(dy, low, self.scaling)


def _layers(specs: Specs, matrices: Sequence[Tensor], dtype: torch.dtype) -> list[_Layer]:
    triples = zip(specs, matrices[::2], matrices[1::2], strict=True)
    return [_Layer(*spec, A.to(dtype), B.to(dtype)) for spec, A, B in triples]


def _with_dense_weights(layers: Sequence[_Layer]) -> list[_Layer]:
    """The layers with their weights decoded, each in a slot of its own, for several products."""
    return [layer._replace(dense=layer.weight(slot)) for slot, layer in enumerate(layers)]


def _stacked_A(layers: Sequence[_Layer]) -> Tensor:
    """All A, (sum of r, in)."""
    return torch.cat([layer.A for layer in layers]) if len(layers) > 1 else layers[0].A


def _outputs(x: Tensor, layers: Sequence[_Layer]) -> tuple[Tensor, ...]:
    """x A' (n, sum of r), and y (..., out) of each layer."""
    rows = x.reshape(-1, x.shape[-1])  # (..., in) -> (n, in)
    if any(layer.dropout for layer in layers):  # each layer has its own
        low = torch.cat([layer.project(rows, layer.mask(rows)) for layer in layers], dim=1)
    else:
        low = linear(rows, _stacked_A(layers))  # (n, in) @ (in, sum of r) -> (n, sum of r)
    del rows  # a copy, where x is not contiguous
    pairs = zip(layers, low.split([len(layer.A) for layer in layers], dim=1), strict=True)
    return low, *(layer.forward(x, own_low) for layer, own_low in pairs)


def _gradients(
    x: Tensor, low: Tensor, layers: Sequence[_Layer], dys: Any, needs_dx: bool, out: Any = None
) -> tuple[Tensor | None, list[Any]]:
    """dx (n, in), in `out` if it is given, and dA, dB of each layer, None where its dy is None."""
    dx: Tensor | None = None
    gradients: list[Any] = [None] * (2 * len(layers))  # dA, dB, dA, dB, …
    is_stacked = not any(layer.dropout for layer in layers)
    dlow = torch.empty_like(low)  # (n, sum of r)
    ranks = [len(layer.A) for layer in layers]
    parts = zip(layers, dys, low.split(ranks, dim=1), dlow.split(ranks, dim=1), strict=True)
    for i, (layer, dy, own_low, own_dlow) in enumerate(parts):
        if dy is None:
            own_dlow.zero_()
            continue
        dy = dy.reshape(-1, dy.shape[-1])  # (..., out) -> (n, out)
        layer.low_gradient(dy, own_dlow)
        gradients[2 * i + 1] = layer.B_gradient(dy, own_low)
        mask = layer.mask(x)
        if not is_stacked:
            gradients[2 * i] = layer.A_gradient(x, own_dlow, mask)
        if needs_dx:
            weight = kept(layer.layer, x.dtype, layer.slot) if layer.slot else layer.weight()
            weight = weight.T  # (n, out) @ (out, in) -> (n, in)
            dx = linear(dy, weight, out=out) if dx is None else add_linear(dx, dy, weight)
            if not is_stacked:
                layer.add_input_gradient(dx, own_dlow, mask)
    if is_stacked:  # one read of x for all dA: (sum of r, n) @ (n, in) -> (sum of r, in)
        every_dA = inner(dlow, x).split(ranks)
        gradients[::2] = [None if dy is None else dA for dA, dy in zip(every_dA, dys, strict=True)]
    if needs_dx and dx is None:
        dx = torch.zeros_like(x) if out is None else out.zero_()
    if dx is not None and is_stacked:
        dx.addmm_(dlow, _stacked_A(layers))  # (n, sum of r) @ (sum of r, in) -> (n, in)
    return dx, gradients


def _mlp_gradients(
    ctx: Any, x: Tensor, dy: Tensor, saved: Any, layers: Sequence[_Layer], out: Any = None
) -> tuple[Tensor | None, list[Any]]:
    """dx (n, in), in `out` if it is given, and the gradients of the six factors, of dy (n, out)."""
    *gate_up, down = layers
    down_dlow = down.low_gradient(dy, dy.new_empty(len(dy), len(down.A)))
    dh = linear(dy, down.weight().T)  # (n, out) @ (out, intermediate) -> (n, intermediate)
    mask = down.mask(dh)
    dh = down.add_input_gradient(dh, down_dlow, mask)
    if ctx.recompute and gate_up[0].dense is None:  # used twice: in _outputs, and for dx
        gate_up = _with_dense_weights(gate_up)
    low, gate, up = saved or _outputs(x, gate_up)
    h, dgate, dup = gated_backward(gate, up, dh, ctx.activation, in_place=ctx.recompute)
    dx, gradients = _gradients(x, low, gate_up, [dgate, dup], ctx.needs_input_grad[0], out)
    down_dA, down_low = down.A_gradient(h, down_dlow, mask), down.project(h, mask)
    return dx, [*gradients, down_dA, down.B_gradient(dy, down_low)]


def _tiles(ctx: Any, x: Tensor, matrices: Sequence[Tensor]) -> list[tuple[slice, list[_Layer]]]:
    """Slices of the tokens of x (n, in), of equal lengths to within one, and the layers of each."""
    layers = _layers(ctx.specs, matrices, x.dtype)
    count = 1
    if ctx.recompute:
        intermediate = layers[2].A.shape[1]
        count = max(1, math.ceil(len(x) * intermediate * x.element_size() / TILE_BYTES))
    if count > 1:
        layers = _with_dense_weights(layers)
    bounds = [len(x) * i // count for i in range(count + 1)]
    return [
        (slice(*pair), [layer._replace(tile=i) for layer in layers])
        for i, pair in enumerate(itertools.pairwise(bounds))
    ]


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x W' + bias, (..., in) @ (in, out) -> (..., out), all in x's dtype, into `out` (contiguous).

    The result has no gradient, and is no view, so that it may be changed in place.
    """
    is_onednn = by_onednn(x)
    # autocast would cast its arguments where this runs in a backward pass
    if out is None and bias is None and not (is_onednn or torch.is_autocast_enabled(x.device.type)):
        return F.linear(x, weight)
    rows, shape = x.reshape(-1, x.shape[-1]), [*x.shape[:-1], len(weight)]
    if is_onednn:
        y = _onednn_linear(rows, weight, bias)
        if out is not None:
            return out.copy_(y.view(shape))
        # private; `view`, except that autograd does not treat the result as a view
        return torch.ops.aten._unsafe_view(y, shape)  # type: ignore[no-any-return]
    out = x.new_empty(shape) if out is None else out
    flat_out = out.view(-1, len(weight))  # (n, in) @ (in, out) -> (n, out)
    if bias is None:
        torch.mm(rows, weight.T, out=flat_out)
    else:
        torch.addmm(bias, rows, weight.T, out=flat_out)
    return out


def add_linear(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """total (n, out) += x W', of x (n, in) and weight (out, in)."""
    if by_onednn(x):
        return total.add_(linear(x, weight))
    return total.addmm_(x, weight.T)


def inner(x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    """scale x' y: (p, n) @ (n, q) -> (p, q)."""
    if not by_onednn(x):
        return product(x.T, y, scale, x.new_empty(x.shape[1], y.shape[1]))
    if x.shape[1] > y.shape[1]:  # oneDNN has a tenth of the speed this way round if y is narrow
        return inner(y, x, scale).T.contiguous()
    return linear(x.T, y.T).mul_(scale)


def product(x: Tensor, y: Tensor, scale: float, out: Tensor) -> Tensor:
    """scale x y, (p, n) @ (n, q) -> (p, q), into `out`, of which only the rows need be dense."""
    if by_onednn(x):
        return out.copy_(linear(x, y.T).mul_(scale))
    return out.addmm_(x, y, beta=0, alpha=scale)


def by_onednn(x: Tensor) -> bool:
    """Whether `linear` computes products of this tensor by oneDNN.

    On a CPU torch computes fp32 products by MKL, which uses AVX-512 on Intel's chips only: 186
    GFLOP/s on two cores of an AMD EPYC, where oneDNN reaches 400 (benchmarks/products.py).
    torch.backends.mkldnn.enabled = False turns it off.
    """
    if computing_device(x.device).type != "cpu" or x.dtype != torch.float32 or x.numel() == 0:
        return False
    return bool(torch.backends.mkldnn.enabled) and _onednn_is_faster()


@cache
def _onednn_is_faster() -> bool:
    """Whether oneDNN's product is right, and torch's is MKL's without AVX-512.

    By the processor, not by a measurement: beside other processes a measurement varies, and with it
    the last digits of a resumed run.
    """
    cpu: Any = torch.backends
    if not (cpu.mkldnn.is_available() and cpu.mkl.is_available()):
        return False
    if cpu.cpu.get_cpu_capability() != "AVX512" or is_intels():
        return False
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS))  # read at the first product
    x, weight = torch.linspace(-1, 1, 64).view(4, 16), torch.linspace(-1, 2, 128).view(8, 16)
    log_as = "oneDNN's fp32 product"
    return agrees(_onednn_linear, F.linear, x, weight, tolerance=1e-5, log_as=log_as)


def is_intels() -> bool:
    """Whether the processor is made by Intel."""
    listed = Path("/proc/cpuinfo")
    names = listed.read_text(errors="replace") if listed.is_file() else platform.processor()
    return "GenuineIntel" in names


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + bias by a private operator of torch, which torch.compile uses for linear layers."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
