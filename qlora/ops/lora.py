"""LoRA's forward and backward as autograd functions that keep one tensor: the layer's input.

Of layers i that share their input x (n, in), with frozen W_i (out_i, in), A_i, B_i and scaling s_i:

    y_i  = x W_i' + s_i (x A_i') B_i'
    dx   = sum_i dy_i W_i + s_i (dy_i B_i) A_i          added up in one buffer, product by product
    dA_i = s_i (dy_i B_i)' x        dB_i = s_i dy_i' (x A_i')

Every product with A or B is one of rank r: B A is never formed. The A of a group are stacked, so
that x and dx are read once for all of them. For the backward pass there stay x, which its producer
holds anyhow, x A' (n, r), and the packed weight by reference; plain autograd keeps the same x, but
makes a tensor of dx's size for each term, and one of y's for each sum.

A gated MLP, y = down(act(gate(x)) * up(x)), is one function too. It keeps x, gate(x) and up(x) and
makes the rest again, or with `recompute` x alone. The latter is for models with gradient
checkpointing, which makes a layer's activations again when its backward pass comes: what the block
keeps is then kept before it computes, so that this second forward pass ends there, and the down
projection, a fifth of a layer's products, is not computed twice. Its tokens go in tiles, since
nothing but their sums leaves them: however long a row is, a few tiles (tokens, intermediate) exist.

With lora_dropout each A reads an x of its own, of which nothing is kept either: the mask is made
again from its seed, and its product with A stands alone.

Plain twins: LoRALinear's own forward, and the model's own MLP. Left out: DoRA, a bias of B, several
adapters at once, which take the plain way.

Dropout that keeps no mask: of one, the seed alone, from which it is made again.

Each number of x is zero with probability p, and else x / (1 - p) (arXiv:1207.0580). LoRA drops on
its way to A, in each layer for itself. The masks of a layer's seven projections, a byte a number,
would be as much as three and a half inputs in 16 bits, all of which there is but one of.

Seeds come from torch's generator on the CPU: gradient checkpointing puts that one's state back, so
that a layer computed again drops the same, and no GPU is waited for.

x W' in the fastest of the ways that torch has on board.

On a CPU torch gives fp32 products to MKL, which keeps its AVX-512 code to Intel's chips: on two
cores of an AMD EPYC it does 186 GFLOP/s. oneDNN, which comes with torch too, and which torch uses
for bf16, does 400 there, in the same precision (benchmarks/products.py). It is reached by the
operator that torch's compiler puts in the place of a linear layer.

Plain twin: torch.nn.functional.linear, which computes everything else, and this too with
torch.backends.mkldnn.enabled = False.
"""

import itertools
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora.ops.gated import gated_backward, gated_forward
from qlora.ops.nf4 import decoded

# Of the four tensors (tokens, intermediate) that a tile has in its backward pass, each. 6,000
# tokens of Llama-2-7B in 16 bits: more than a matrix product needs to be at full speed.
TILE_BYTES = 128 << 20


class Frozen(NamedTuple):
    """What a layer is made of beside A and B."""

    layer: nn.Module
    """a Linear4bit or an nn.Linear"""
    scaling: float
    dropout: "Dropout | None" = None
    """of what A reads"""


def lora_linear(
    x: Tensor, layers: Sequence[Frozen], factors: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, ...]:
    """What layers with adapters give for one input.

    Args:
        x: (..., in), in the dtype that the layers compute in.
        factors: A (r, in) and B (out, r) of each layer, in any float dtype.

    Returns:
        (..., out) of each, in x's dtype.
    """
    matrices = [matrix for pair in factors for matrix in pair]
    return _LoRALinear.apply(x, tuple(layers), *matrices)  # type: ignore[no-any-return, no-untyped-call]


def lora_mlp(
    x: Tensor,
    layers: Sequence[Frozen],
    factors: Sequence[tuple[Tensor, Tensor]],
    *,
    activation: str,
    recompute: bool = False,
) -> Tensor:
    """down(activation(gate(x)) * up(x)) of gate, up and down projections with adapters.

    Args:
        x: (..., in), in the dtype that the layers compute in.
        factors: A and B of gate, up and down.
        activation: one of qlora.ops.gated's.
        recompute: keep x alone, and make gate(x) and up(x) again for the backward pass.
    """
    matrices = [matrix for pair in factors for matrix in pair]
    keeper = None
    if recompute and torch.is_grad_enabled() and x.requires_grad:
        x = _Keep.apply(x, *matrices)  # type: ignore[no-untyped-call]
        keeper = x.grad_fn
    return _LoRAMLP.apply(x, tuple(layers), activation, recompute, keeper, *matrices)  # type: ignore[no-any-return, no-untyped-call]


# ---- products


class _Product(NamedTuple):
    """A layer's part of the arithmetic, in the dtype of x."""

    frozen: Frozen
    lora_A: Tensor
    """(r, in)"""
    lora_B: Tensor
    """(out, r)"""
    dense: Tensor | None = None
    """its weight (out, in), where it was decoded for more than one product"""

    def weight(self) -> Tensor:
        """(out, in), to be used at once."""
        return self.decoded(0) if self.dense is None else self.dense

    def decoded(self, slot: int) -> Tensor:
        return decoded(self.frozen.layer, self.lora_A.dtype, slot)

    def kept(self, x: Tensor, part: int) -> Tensor | None:
        """Dropout's mask of x (n, in), the part of that number of all tokens; None without."""
        dropout = self.frozen.dropout
        return None if dropout is None else dropout.kept(x, part)

    def low(self, x: Tensor, kept: Tensor | None) -> Tensor:
        """x A' (n, r), of what is kept of x (n, in)."""
        low = linear(_only(x, kept), self.lora_A)
        return low if kept is None else low.mul_(self.gain)

    @property
    def gain(self) -> float:
        """What dropout multiplies with what it keeps."""
        return 1.0 if self.frozen.dropout is None else self.frozen.dropout.gain

    def forward(self, x: Tensor, low: Tensor, out: Tensor | None = None) -> Tensor:
        """y (..., out), of x (..., in) and low = x A' (n, r), in `out` if it is given."""
        bias: Tensor | None = self.frozen.layer.bias  # type: ignore[assignment]
        y = linear(x, self.weight(), None if bias is None else bias.to(x.dtype), out)
        y.view(-1, y.shape[-1]).addmm_(low, self.lora_B.T, alpha=self.frozen.scaling)
        return y

    def to_low(self, dy: Tensor) -> Tensor:
        """The gradient of x A', s dy B (n, r)."""
        return linear(dy, self.lora_B.T).mul_(self.frozen.scaling * self.gain)

    def add_low(self, dx: Tensor, dlow: Tensor, kept: Tensor | None) -> Tensor:
        """dx (n, in), with what comes to it by way of A in it."""
        if kept is None:
            return dx.addmm_(dlow, self.lora_A)
        return dx.add_((dlow @ self.lora_A).mul_(kept))

    def dA(self, dlow: Tensor, x: Tensor, kept: Tensor | None) -> Tensor:
        """dlow' x (r, in)."""
        return inner(dlow, _only(x, kept))

    def dB(self, dy: Tensor, low: Tensor) -> Tensor:
        """s dy' (x A') (out, r)."""
        return inner(dy, low).mul_(self.frozen.scaling)


def _only(x: Tensor, kept: Tensor | None) -> Tensor:
    """x, with zeros where it is not kept."""
    return x if kept is None else x * kept


def _products(layers: Sequence[Frozen], matrices: Sequence[Tensor], dtype: Any) -> list[_Product]:
    pairs = zip(matrices[::2], matrices[1::2], strict=True)
    return [
        _Product(layer, lora_A.to(dtype), lora_B.to(dtype))
        for layer, (lora_A, lora_B) in zip(layers, pairs, strict=True)
    ]


def _stacked(products: Sequence[_Product]) -> Tensor:
    """Their A, (sum of r, in)."""
    return torch.cat([p.lora_A for p in products]) if len(products) > 1 else products[0].lora_A


def _low(x: Tensor, products: Sequence[_Product], part: int = 0) -> Tensor:
    """x A' of all (n, sum of r)."""
    if _drop_out(products):
        return torch.cat([p.low(x, p.kept(x, part)) for p in products], dim=1)
    return linear(x, _stacked(products))


def _drop_out(products: Sequence[_Product]) -> bool:
    return any(p.frozen.dropout is not None for p in products)


def _lows(low: Tensor, products: Sequence[_Product]) -> tuple[Tensor, ...]:
    """Each one's columns of x A' (n, sum of r)."""
    return torch.split(low, [len(p.lora_A) for p in products], dim=1)


def _gradients(
    x: Tensor,
    low: Tensor,
    products: Sequence[_Product],
    dys: Sequence[Tensor | None],
    part: int = 0,
    *,
    needs_dx: bool,
    out: Tensor | None = None,
) -> tuple[Tensor | None, list[Any]]:
    """dx (n, in), in `out` if it is given, and dA and dB of each layer, one after another; None
    for those of a layer whose output nobody asked for."""
    dx: Tensor | None = None
    found: list[Any] = []
    is_one_input = not _drop_out(products)
    dlow = torch.zeros_like(low)
    parts = zip(products, dys, _lows(low, products), _lows(dlow, products), strict=True)
    for product, dy, own_low, own_dlow in parts:
        if dy is None:
            found += [None, None]
            continue
        own_dlow.copy_(product.to_low(dy))
        kept = product.kept(x, part)
        found += [product.dA(own_dlow, x, kept), product.dB(dy, own_low)]
        if needs_dx:
            weight = product.weight().T
            dx = linear(dy, weight, out=out) if dx is None else add_linear(dx, dy, weight)
            if not is_one_input:
                product.add_low(dx, own_dlow, kept)
    if needs_dx and dx is None:
        dx = torch.zeros_like(x) if out is None else out.zero_()
    if dx is not None and is_one_input:
        dx.addmm_(dlow, _stacked(products))
    return dx, found


def _like(found: Sequence[Tensor | None], matrices: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients in the dtypes of what they are gradients of."""
    pairs = zip(found, matrices, strict=True)
    return [None if g is None else g.to(matrix.dtype) for g, matrix in pairs]


# ---- layers that share an input


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Any, *matrices: Tensor) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        products = _products(layers, matrices, x.dtype)
        low = _low(flat, products)
        pairs = zip(products, _lows(low, products), strict=True)
        ys = tuple(product.forward(x, own) for product, own in pairs)
        ctx.save_for_backward(x, low, *matrices)
        ctx.layers = layers
        ctx.set_materialize_grads(False)
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        x, low, *matrices = ctx.saved_tensors
        flat = x.reshape(-1, x.shape[-1])
        products = _products(ctx.layers, matrices, x.dtype)
        rows = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in dys]
        dx, found = _gradients(flat, low, products, rows, needs_dx=ctx.needs_input_grad[0])
        return None if dx is None else dx.view(x.shape), None, *_like(found, matrices)


# ---- the gated MLP


class _Keep(torch.autograd.Function):
    """x itself; what this keeps for the backward pass is for the function after it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *matrices: Tensor) -> Tensor:
        ctx.save_for_backward(x, *matrices)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> Any:
        return dx, *[None for _ in ctx.needs_input_grad[1:]]


class _LoRAMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layers: Any,
        activation: str,
        recompute: bool,
        keeper: Any,
        *matrices: Tensor,
    ) -> Tensor:
        ctx.layers, ctx.activation, ctx.recompute, ctx.keeper = (
            layers,
            activation,
            recompute,
            keeper,
        )
        flat = x.reshape(-1, x.shape[-1])
        *both, down = _products(layers, matrices, x.dtype)
        tiles = _tiles(flat, down) if recompute else [slice(None)]
        if len(tiles) > 1:
            *both, down = [p._replace(dense=p.decoded(i)) for i, p in enumerate((*both, down))]
        y = x.new_empty(*x.shape[:-1], len(down.lora_B))
        rows = y.view(len(flat), y.shape[-1])
        for part, tile in enumerate(tiles):
            kept = _mlp(flat[tile], both, down, activation, part, out=rows[tile])
            kept = () if recompute else kept  # before the next tile is there
        if keeper is None:
            ctx.save_for_backward(x, *matrices, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        # before all else: under checkpointing, this is what makes the layer's activations again
        x, *held = (ctx.keeper or ctx).saved_tensors
        matrices, kept = held[:6], held[6:]
        flat, rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        *both, down = _products(ctx.layers, matrices, x.dtype)
        tiles = _tiles(flat, down) if ctx.recompute else [slice(None)]
        if len(tiles) == 1:
            dx, found = _mlp_gradients(ctx, flat, rows, kept, both, down)
        else:
            *both, down = [p._replace(dense=p.decoded(i)) for i, p in enumerate((*both, down))]
            dx, found = torch.empty_like(flat) if ctx.needs_input_grad[0] else None, []
            for part, tile in enumerate(tiles):
                out = None if dx is None else dx[tile]
                _, own = _mlp_gradients(ctx, flat[tile], rows[tile], kept, both, down, part, out)
                wide = [g.float() for g in own]  # their sums are rounded once
                found = [f.add_(g) for f, g in zip(found, wide, strict=True)] if found else wide
        no = None, None, None, None
        return None if dx is None else dx.view(x.shape), *no, *_like(found, matrices)


def _mlp(
    x: Tensor,
    both: Sequence[_Product],
    down: _Product,
    activation: str,
    part: int,
    out: Tensor,
) -> tuple[Tensor, ...]:
    """The block's y (n, out) of x (n, in), into `out`; what _gate_and_up made."""
    made = _gate_and_up(x, both, part)
    h = gated_forward(*made[1:], activation)
    down.forward(h, down.low(h, down.kept(h, part)), out)
    return made


def _mlp_gradients(
    ctx: Any,
    x: Tensor,
    dy: Tensor,
    kept: Sequence[Tensor],
    both: Sequence[_Product],
    down: _Product,
    part: int = 0,
    out: Tensor | None = None,
) -> tuple[Tensor | None, list[Any]]:
    """dx (n, in), in `out` if it is given, and the gradients of the six A and B, of dy (n, out)."""
    ddown, dh = down.to_low(dy), linear(dy, down.weight().T)
    of_h = down.kept(dh, part)
    dh = down.add_low(dh, ddown, of_h)
    if ctx.recompute and both[0].dense is None:  # for what is made again and for dx
        both = [p._replace(dense=p.decoded(slot)) for slot, p in enumerate(both)]
    low, gate, up = kept or _gate_and_up(x, both, part)
    h, dgate, dup = gated_backward(gate, up, dh, ctx.activation, in_place=ctx.recompute)
    needs_dx = ctx.needs_input_grad[0]
    dx, found = _gradients(x, low, both, [dgate, dup], part, needs_dx=needs_dx, out=out)
    return dx, [*found, down.dA(ddown, h, of_h), down.dB(dy, down.low(h, of_h))]


def _gate_and_up(x: Tensor, both: Sequence[_Product], part: int) -> tuple[Tensor, Tensor, Tensor]:
    """x A' (n, 2 r) of gate and up, gate(x) and up(x) (n, intermediate)."""
    low = _low(x, both, part)
    gate, up = (p.forward(x, own) for p, own in zip(both, _lows(low, both), strict=True))
    return low, gate, up


def _tiles(x: Tensor, down: _Product) -> list[slice]:
    """Slices of the tokens of x (n, in), as even as can be."""
    intermediate = down.lora_A.shape[1]
    count = max(1, math.ceil(len(x) * intermediate * x.element_size() / TILE_BYTES))
    bounds = [len(x) * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


class Dropout(NamedTuple):
    """One draw of it."""

    p: float
    """the share that is dropped, at least 0 and below 1"""
    seed: int

    @classmethod
    def drawn(cls, p: float) -> "Dropout":
        return cls(p, int(torch.randint(2**62, ())))

    @property
    def gain(self) -> float:
        """What the numbers that are kept are multiplied with."""
        return 1 / (1 - self.p)

    def kept(self, x: Tensor, part: int = 0) -> Tensor:
        """Which numbers of x are kept, bool in x's shape; another draw for each part of an x."""
        generator = torch.Generator(x.device).manual_seed(self.seed + part)
        mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        return mask.bernoulli_(1 - self.p, generator=generator)

    def __call__(self, x: Tensor) -> Tensor:
        """x with the rest dropped."""
        return x * self.kept(x) * self.gain


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x W' + bias (..., out), which is no view, so that anybody may add to it in place.

    It has no gradient: this is for autograd functions, which make their own.

    Args:
        x: (..., in).
        weight: (out, in), in x's dtype.
        bias: (out,), in x's dtype.
        out: (..., out), contiguous, where the result is to lie.
    """
    flat, shape = x.reshape(-1, x.shape[-1]), [*x.shape[:-1], len(weight)]
    if by_onednn(x):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(flat, weight, bias, "none", [], "")
        if out is not None:
            return out.copy_(y.view(shape))
        y = torch.ops.aten._unsafe_view(y, shape)  # a view that autograd does not take for one
        return y
    if out is None:
        out = x.new_empty(shape)
    rows = out.view(-1, len(weight))
    if bias is None:
        torch.mm(flat, weight.T, out=rows)
    else:
        torch.addmm(bias, flat, weight.T, out=rows)
    return out


def add_linear(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """total (n, out) += x W', of x (n, in) and weight (out, in)."""
    if by_onednn(x):
        return total.add_(linear(x, weight))
    return total.addmm_(x, weight.T)


def inner(x: Tensor, y: Tensor) -> Tensor:
    """x' y (p, q), of x (n, p) and y (n, q)."""
    if not by_onednn(x):
        return x.T @ y
    if x.shape[1] > y.shape[1]:  # a tenth as fast this way round, where y is narrow
        return inner(y, x).T.contiguous()
    return linear(x.T, y.T)


def by_onednn(x: Tensor) -> bool:
    """Whether oneDNN is what computes products of this tensor."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.numel() == 0:
        return False
    return bool(torch.backends.mkldnn.enabled) and _has_onednn()


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
    )
