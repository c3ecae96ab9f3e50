"""LoRA over a frozen layer: y = W x + scaling * B A x (arXiv:2106.09685).

    lora_A (r, in)   Kaiming-uniform with a = sqrt(5), that is uniform in ±1/sqrt(in)
    lora_B (out, r)  zero, so that a new adapter changes nothing
    scaling          lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora
    W (out, in)      frozen: of a bitsandbytes Linear4bit, an nn.Linear or GPT-2's Conv1D
                     (qlora.adapters.layers: of embeddings, convolutions and experts)

A layer holds any number of adapters by name and adds up the active ones. A and B are cast to the
dtype of x for the products, which are small: x is never cast up.

DoRA (arXiv:2402.09353) multiplies each output with magnitude / |row of W + scaling * B A|; the norm
is a constant of the backward pass. A row of norm 0, as dead outputs have, has the factor 1 (PEFT
divides by 0). The norm's square is, row by row,
|W|^2 + 2 scaling (W A') B + scaling^2 B A A' B', and W A' is the base layer's output for the r rows
of A: neither B A nor a dequantized W is formed.

Fusing computes a second, dense weight, W + scaling * B A in 16 bits, beside W and its codes:
nothing is quantized again, and unfusing is exact.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from qlora.adapters.wrappers import AdapterModule, adapted, frozen_copy
from qlora.base.modules import as_dense, computes_in, dense_weight, matrix_shape
from qlora.base.sharding import device_of
from qlora.config import LoraConfig
from qlora.ops.lora import Dropout
from qlora.ops.nf4 import DTYPES

Matrices = tuple[Tensor, Tensor]
LEAST_NORM = torch.finfo(torch.float32).tiny ** 0.5  # the square of a smaller one underflows


class LoRALayer(AdapterModule):
    """A frozen layer with named low-rank adapters; a subclass for each type of layer."""

    BY_ADAPTER = ("lora_A", "lora_B", "lora_bias", "lora_magnitude_vector", "scaling", "dropout")
    ENDINGS = ("lora_A.weight", "lora_B.weight")  # of the names of A and B in adapter files

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.lora_bias = nn.ParameterDict()  # B's own (out,), of adapters with lora_bias
        self.lora_magnitude_vector = nn.ParameterDict()  # (out,), of adapters with use_dora
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.row_norm: Tensor | None
        self.register_buffer("row_norm", None, persistent=False)  # of W, (out,), fp32
        self.fused_weight: Tensor | None
        self.register_buffer("fused_weight", None, persistent=False)  # (out, in)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in x's dtype."""
        if self.adapter_of_row is not None:
            y: Tensor = self.base_layer(x)  # of all rows together
            for name, rows in self._rows_of(x, self.adapter_of_row).items():
                change = self._change(self._drop(x[rows], name), name)
                if name in self.lora_bias:
                    change = change + self._as_output(self.lora_bias[name])
                y = y.index_add(0, rows, (self.scaling[name] * change).to(y.dtype))
            return y
        names = self.active_adapters
        base: Tensor | None = None
        if self.fused_weight is not None and set(self.fused_adapters) <= set(names):
            y = self._with_weight(x, self.fused_weight)
            names = tuple(name for name in names if name not in self.fused_adapters)
        else:
            y = base = self.base_layer(x)  # W x
        for name in names:
            dropped = self._drop(x, name)
            change = self._change(dropped, name)  # B A x
            if name in self.lora_magnitude_vector:
                own = base if base is not None and dropped is x else self.base_layer(dropped)
                y = self._add_dora(y, own, change, name)
            else:
                y = torch.add(y, change, alpha=self.scaling[name])
        for name in self.active_adapters:
            if name in self.lora_bias:
                y = y + self._as_output(self.scaling[name] * self.lora_bias[name]).to(y.dtype)
        return y

    # ---- what each type of layer defines ----

    def _change(self, x: Tensor, name: str) -> Tensor:
        """B A x (..., out), in the dtype of the layer's output."""
        raise NotImplementedError

    def _with_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """The base layer's output with another weight (out, in)."""
        raise NotImplementedError

    def _first_values(self, config: LoraConfig, generator: torch.Generator | None) -> Matrices:
        """A (r, in) and B (out, r) of a new adapter. On the CPU: a seed means the same anywhere."""
        out_features, in_features = self.shape
        lora_A = torch.empty(config.r, in_features)
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(lora_A, std=1 / config.r, generator=generator)  # as PEFT
        else:
            nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5), generator=generator)
        return lora_A, torch.zeros(out_features, config.r)

    def _as_stored(self, factors: "Factors") -> "Factors":
        """`factors` in the shapes that parameters and files have."""
        return factors

    def _drop(self, x: Tensor, name: str) -> Tensor:
        return x if (dropout := self.drawn_dropout(name)) is None else dropout(x)

    def _as_output(self, features: Tensor) -> Tensor:
        """Values (out,) in a shape that broadcasts over an output."""
        return features

    def _project_A(self, lora_A: Tensor) -> Tensor:
        """A W' (r, out) in fp32, of A (r, in)."""
        return lora_A.float() @ dense_weight(self.plain).T

    # ---- adapters by name ----

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight as a matrix."""
        return matrix_shape(self.plain)

    def add_adapter(
        self, name: str, config: LoraConfig, *, generator: torch.Generator | None = None
    ) -> None:
        """A new adapter, trainable and not yet active."""
        dtype = adapter_dtype(config, device_of(self.plain.weight), computes_in(self.plain))
        lora_A, lora_B = (matrix.to(dtype) for matrix in self._first_values(config, generator))
        # in fp32: steps of bf16 are 0.4 % of a norm, more than one update
        magnitude = self._row_norm() if config.use_dora else None
        bias = torch.zeros(self.shape[0]) if config.lora_bias else None
        factors = Factors(lora_A, lora_B, config.scaling, magnitude)
        self.put_adapter(name, factors, config.lora_dropout, bias)
        for parameter in self.parameters_of(name).values():
            parameter.requires_grad_(True)

    def put_adapter(
        self, name: str, factors: "Factors", dropout: float = 0.0, bias: Tensor | None = None
    ) -> None:
        """An adapter with these values, frozen and not yet active."""
        lora_A, lora_B, scaling, magnitude = self._as_stored(factors)
        parts = (self.lora_A, self.lora_B, self.lora_magnitude_vector, self.lora_bias)
        for part, value in zip(parts, (lora_A, lora_B, magnitude, bias), strict=True):
            if value is not None:
                part[name] = frozen_copy(value, self.plain.weight)
        self.scaling[name], self.dropout[name] = scaling, dropout

    def factors(self, name: str) -> "Factors":
        """Adapter `name` of this layer, as matrices."""
        lora_A, lora_B = self.lora_A[name].flatten(1), self.lora_B[name].flatten(1)
        magnitude = self.lora_magnitude_vector.get(name)
        magnitude = None if magnitude is None else magnitude.flatten()
        return Factors(lora_A, lora_B, self.scaling[name], magnitude)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        if name in self.followed:
            return {}
        endings = (*self.ENDINGS, "lora_magnitude_vector", "lora_B.bias")
        parts = (self.lora_A, self.lora_B, self.lora_magnitude_vector, self.lora_bias)
        return {end: part[name] for end, part in zip(endings, parts, strict=True) if name in part}

    def drawn_dropout(self, name: str) -> Dropout | None:
        """The dropout of A's input in one call; None where nothing is dropped."""
        p = self.dropout[name]
        return Dropout.drawn(p) if self.training and p > 0 else None

    def get_delta_weight(self, name: str) -> Tensor:
        """What adapter `name` adds to the base weight, fp32 (out, in)."""
        return self.factors(name).change(dense_weight(self.plain))

    def extra_repr(self) -> str:
        ranks = {name: len(lora_A) for name, lora_A in self.lora_A.items()}
        return f"r={ranks}, active={self.active_adapters}"

    # ---- DoRA ----

    def _add_dora(self, y: Tensor, own: Tensor, change: Tensor, name: str) -> Tensor:
        """y + gain * (W x + scaling * B A x) - W x, of own = W x + bias and change = B A x."""
        own = own if (bias := self._bias) is None else own - self._as_output(bias)
        gain = self._as_output(self._gain(name))
        return y + (gain - 1).to(y.dtype) * own + (gain * self.scaling[name]).to(y.dtype) * change

    @property
    def _bias(self) -> Tensor | None:
        return getattr(self.base_layer, "bias", None)

    def _gain(self, name: str) -> Tensor:
        """DoRA's factor for each output, fp32 (out,)."""
        with torch.no_grad():
            factors, scaling = self.factors(name), self.scaling[name]
            lora_A, lora_B = factors.lora_A.float(), factors.lora_B.float()
            gram = lora_A @ lora_A.T  # (r, r)
            # (out, r) + (out, r) @ (r, r) -> (out, r)
            cross = 2 * scaling * self._project_A(lora_A).T + scaling**2 * lora_B @ gram
            square = self._row_norm().square().add_(cross.mul_(lora_B).sum(1))
            norm = square.clamp_min_(0).sqrt_()
        return dora_factor(self.lora_magnitude_vector[name].flatten(), norm)

    def _row_norm(self) -> Tensor:
        """|row of W|, fp32 (out,), computed once."""
        if self.row_norm is None:
            self.row_norm = dense_weight(self.plain).norm(dim=1)
        return self.row_norm.float()

    # ---- fused ----

    def fuse(self, names: Iterable[str]) -> None:
        """Compute with the weight that includes these adapters while all of them are active."""
        super().fuse(names)
        if self.fused_adapters:
            self.fused_weight = self._weight_with(self.plain, self.fused_adapters)

    def unfuse(self) -> None:
        super().unfuse()
        self.fused_weight = None

    def fused(self, below: nn.Module, names: Iterable[str]) -> nn.Module:
        names = [name for name in names if name in self.lora_A]
        if not names:
            return below
        layer: Any = as_dense(below, self._weight_with(below, names))
        for name in names:
            if name in self.lora_bias:
                bias = layer.bias.float() + self.scaling[name] * self.lora_bias[name].detach()
                layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=False)
        return layer  # type: ignore[no-any-return]

    def _weight_with(self, below: nn.Module, names: Iterable[str]) -> Tensor:
        """W of `below` (out, in) with these adapters added in fp32, in its compute dtype."""
        weight = dense_weight(below)
        for change in [self.factors(name).change(weight) for name in names]:
            weight.add_(change)
        return weight.to(computes_in(below))


class LoRALinear(LoRALayer):
    """LoRA over a Linear4bit, an nn.Linear or GPT-2's Conv1D."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.rebased: Rebased | None = None  # None: the base is as it was loaded
        # set by qlora.fast.layers: the same output, or None where it does not support this call
        self.fast: Callable[[LoRALinear, Tensor], Tensor | None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.fast(self, x) if self.fast else None
        y = super().forward(x) if y is None else y
        if self.active_adapters or self.rebased is None:
            return y
        lora_A, lora_B, scaling, _ = self.rebased.subtracted.to(x.device)
        return torch.add(y, _low_rank(x, lora_A, lora_B), alpha=scaling)

    def _change(self, x: Tensor, name: str) -> Tensor:
        return _low_rank(x, self.lora_A[name], self.lora_B[name])

    def _project_A(self, lora_A: Tensor) -> Tensor:
        plain, rows = self.plain, lora_A.to(computes_in(self.plain))
        # without the bias, which cannot be subtracted afterwards: of 16 bits it would leave few
        zero = {} if plain.bias is None else {"bias": torch.zeros_like(plain.bias)}
        return functional_call(plain, zero, (rows,)).float()  # type: ignore[no-any-return]

    def _with_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        # as a Linear4bit does: in the weight's dtype, and back to x's
        bias = None if self._bias is None else self._bias.to(weight.dtype)
        return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


def _low_rank(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """B A x, in x's dtype."""
    low = F.linear(x, lora_A.to(x.dtype))  # (..., in) @ (in, r) -> (..., r)
    return F.linear(low, lora_B.to(x.dtype))  # (..., r) @ (r, out) -> (..., out)


# ---- an adapter of one layer as matrices ----


def delta_weight(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """scaling * B A in fp32, (out, in), from A (r, in) and B (out, r) of any float dtype."""
    return torch.mm(lora_B.float(), lora_A.float()).mul_(scaling)


def dora_factor(magnitude: Tensor, norm: Tensor) -> Tensor:
    """DoRA's factor for each row, fp32 (out,); 1 for a row of zeros, with a gradient of zero."""
    is_zero = norm < LEAST_NORM
    return (magnitude.float() / norm.masked_fill(is_zero, 1)).masked_fill(is_zero, 1)


class Factors(NamedTuple):
    """An adapter's part of one layer (out, in)."""

    lora_A: Tensor  # (r, in)
    lora_B: Tensor  # (out, r)
    scaling: float
    magnitude: Tensor | None = None  # of DoRA: the norm of each row (out,)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.lora_B.shape[0], self.lora_A.shape[1]

    def to(self, device: torch.device | str) -> "Factors":
        moved = (t if t is None or isinstance(t, float) else t.to(device) for t in self)
        return Factors(*moved)  # type: ignore[arg-type]

    def rows(self, rows: slice) -> "Factors":
        """Its part of some rows of the layer."""
        magnitude = None if self.magnitude is None else self.magnitude[rows]
        return self._replace(lora_B=self.lora_B[rows], magnitude=magnitude)

    def padded(self, r: int) -> "Factors":
        """The same change with zeros as further rows of A and columns of B, up to rank `r`."""
        zeros = r - len(self.lora_A)
        lora_A, lora_B = F.pad(self.lora_A, (0, 0, 0, zeros)), F.pad(self.lora_B, (0, zeros))
        return self._replace(lora_A=lora_A, lora_B=lora_B) if zeros else self

    @staticmethod
    def cat(parts: Sequence[tuple["Factors", float]]) -> "Factors":
        """The weighted sum of changes, exactly: A stacked, B side by side, so the ranks add up. In
        fp32 and of scaling 1: B takes each part's weight and scaling."""
        lora_A = torch.cat([f.lora_A.float() for f, _ in parts])  # (sum of r, in)
        lora_B = torch.cat([weight * f.scaling * f.lora_B.float() for f, weight in parts], dim=1)
        return Factors(lora_A, lora_B, 1.0)

    def change(self, weight: Tensor) -> Tensor:
        """What the adapter adds to `weight` (out, in), in fp32."""
        delta = delta_weight(self.lora_A, self.lora_B, self.scaling)
        if self.magnitude is None:
            return delta
        total = delta.add_(weight)
        gain = dora_factor(self.magnitude, total.norm(dim=1))
        return total.mul_(gain[:, None]).sub_(weight)


class Rebased(NamedTuple):
    """How an adapter that starts from the weights changed its base (qlora.adapters.rebase)."""

    subtracted: Factors  # from the base weight; added back while no adapter is active
    original: Tensor | None  # the weight from before; None for a 4-bit layer: it is read again


def adapter_dtype(config: LoraConfig, device: torch.device, compute: torch.dtype) -> torch.dtype:
    """Of A and B: by default bf16 on a GPU for a layer that computes in bf16, else fp32, as under
    fp16, whose loss scaling has no kernel for bf16."""
    if config.adapter_dtype != "auto":
        return DTYPES[config.adapter_dtype]
    in_bf16 = (device.type, compute) == ("cuda", torch.bfloat16)
    return compute if in_bf16 else torch.float32


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Every layer with a low-rank adapter, by its name."""
    return {name: module for name, module in adapted(model) if isinstance(module, LoRALayer)}
