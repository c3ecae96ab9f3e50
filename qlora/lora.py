"""LoRA over a frozen linear layer: y = W x + scaling * B A x (arXiv:2106.09685).

A is (r, in), Kaiming-uniform with a = sqrt(5), that is uniform in ±1/sqrt(in); B is (out, r) and
zero, so that a new adapter changes nothing; scaling is lora_alpha / r. The base layer W is a
bitsandbytes Linear4bit or a plain nn.Linear and stays frozen.

A layer holds any number of adapters by name and adds up the active ones. A and B are kept in the
adapter's dtype and cast to the input's for the products, which are small: x is never cast up.

DoRA (arXiv:2402.09353) multiplies each output with magnitude / |row of W + scaling * B A|, where
the row's length is a constant of the backward pass. Its square is, row by row,
|W|^2 + 2 scaling (W A') B + scaling^2 B A A' B', and W A' is the base layer's output for the r rows
of A: neither B A nor a dequantized W is formed.

An adapter that starts from the weights (qlora.rebase) takes a part of them out of the base. That
part, scaling * B' A', stands in for the adapter where it is not active.

Merging makes a second, dense weight, W + scaling * B A in 16 bits, and leaves W and its codes
alone: nothing is quantized again, and unmerging is exact.

`delta_weight` is the only place that computes scaling * B A as a matrix; the merge and every
function that folds an adapter into a weight call it.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.config import LoraConfig
from qlora.errors import UserError
from qlora.nf4 import DTYPES, Quantized, dequantize


def delta_weight(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """scaling * B A in fp32, (out, in), from A (r, in) and B (out, r) of any float dtype."""
    return torch.mm(lora_B.float(), lora_A.float()).mul_(scaling)


class Factors(NamedTuple):
    """An adapter's part of one layer (out, in)."""

    lora_A: Tensor
    """(r, in)"""
    lora_B: Tensor
    """(out, r)"""
    scaling: float
    magnitude: Tensor | None = None
    """DoRA's length of each row (out,), arXiv:2402.09353"""

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

    def change(self, weight: Tensor) -> Tensor:
        """What the adapter adds to `weight` (out, in), in fp32."""
        delta = delta_weight(self.lora_A, self.lora_B, self.scaling)
        if self.magnitude is None:
            return delta
        summed = delta.add_(weight)
        gain = self.magnitude.float() / summed.norm(dim=1)
        return summed.mul_(gain[:, None]).sub_(weight)


class LoRALinear(nn.Module):
    """A frozen linear layer with named adapters beside it.

    Args:
        base_layer: Linear4bit or nn.Linear, (in_features) -> (out_features).
    """

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.lora_magnitude_vector = nn.ParameterDict()
        """of DoRA's adapters, (out,)"""
        self.row_norm: Tensor | None
        self.register_buffer("row_norm", None, persistent=False)  # of W, (out,), fp32
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.active_adapters: tuple[str, ...] = ()
        self.adapter_of_row: tuple[str, ...] | None = None
        self.merged_adapters: tuple[str, ...] = ()
        self.merged_weight: Tensor | None
        self.register_buffer("merged_weight", None, persistent=False)
        self.taken_A: Tensor | None
        self.register_buffer("taken_A", None, persistent=False)
        self.taken_B: Tensor | None
        self.register_buffer("taken_B", None, persistent=False)
        self.taken_scaling = 1.0

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features

    @property
    def weight(self) -> Tensor:
        """The base weight: some models look at a layer's dtype or device through it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def add_adapter(
        self, name: str, config: LoraConfig, *, generator: torch.Generator | None = None
    ) -> None:
        """A new adapter, not yet active. Drawn on the CPU, so a seed means the same everywhere."""
        device = self.base_layer.weight.device
        dtype = adapter_dtype(config, self.base_layer)
        lora_A = torch.empty(config.r, self.in_features)
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(lora_A, std=1 / config.r, generator=generator)
        else:
            nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5), generator=generator)
        self.lora_A[name] = nn.Parameter(lora_A.to(device, dtype))
        lora_B = torch.zeros(self.out_features, config.r, device=device, dtype=dtype)
        self.lora_B[name] = nn.Parameter(lora_B)
        if config.use_dora:
            # in fp32: steps of bf16 are 0.4 % of a length, more than one update
            self.lora_magnitude_vector[name] = nn.Parameter(self._row_norm().clone())
        self.scaling[name] = config.scaling
        self.dropout[name] = config.lora_dropout

    def put_adapter(self, name: str, factors: Factors, dropout: float = 0.0) -> None:
        """An adapter with these values, frozen and not yet active."""
        device = self.base_layer.weight.device
        held = (self.lora_A, self.lora_B, self.lora_magnitude_vector)
        values = (factors.lora_A, factors.lora_B, factors.magnitude)
        for parameters, value in zip(held, values, strict=True):
            if value is not None:  # a copy: what a file gives may lie where kernels round otherwise
                parameters[name] = nn.Parameter(value.to(device, copy=True), requires_grad=False)
        self.scaling[name] = factors.scaling
        self.dropout[name] = dropout

    @property
    def taken(self) -> Factors | None:
        """What was taken out of the base weight for the adapter; None for a base as it was."""
        if self.taken_A is None or self.taken_B is None:
            return None
        return Factors(self.taken_A, self.taken_B, self.taken_scaling)

    @taken.setter
    def taken(self, taken: Factors | None) -> None:
        own = (None, None) if taken is None else (t.detach().clone() for t in taken[:2])
        self.taken_A, self.taken_B = own
        self.taken_scaling = 1.0 if taken is None else taken.scaling

    def factors(self, name: str) -> Factors:
        """What adapter `name` is here."""
        magnitude = self._magnitude(name)
        return Factors(self.lora_A[name], self.lora_B[name], self.scaling[name], magnitude)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of adapter `name`, by the name of their kind; none if it is not here."""
        kinds = ("lora_A", "lora_B", "lora_magnitude_vector")
        held = {kind: getattr(self, kind) for kind in kinds}
        return {kind: parameters[name] for kind, parameters in held.items() if name in parameters}

    def _magnitude(self, name: str) -> Tensor | None:
        has_one = name in self.lora_magnitude_vector
        return self.lora_magnitude_vector[name] if has_one else None

    def remove_adapter(self, name: str) -> None:
        """Forget adapter `name`, if the layer has it."""
        for kind in self.parameters_of(name):
            del getattr(self, kind)[name]
        self.scaling.pop(name, None)
        self.dropout.pop(name, None)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in x's dtype."""
        if self.adapter_of_row is not None:
            return self._by_rows(x, self.adapter_of_row)
        names = self.active_adapters
        base: Tensor | None = None
        if self.merged_weight is not None and set(self.merged_adapters) <= set(names):
            y = _linear(x, self.merged_weight, self.bias)
            names = tuple(name for name in names if name not in self.merged_adapters)
        else:
            y = base = self.base_layer(x)
            if not names and (taken := self.taken):
                y = torch.add(y, _low_rank(x, *taken[:2]), alpha=taken.scaling)
        for name in names:
            dropped = F.dropout(x, self.dropout[name], self.training)
            change = self._change(dropped, name)
            if name not in self.lora_magnitude_vector:
                y = torch.add(y, change, alpha=self.scaling[name])
                continue
            # gain * (W x + scaling * B A x), of which W x is in y already
            own = base if base is not None and dropped is x else self.base_layer(dropped)
            own = own if self.bias is None else own - self.bias
            gain = self._gain(name)
            y = y + (gain - 1).to(y.dtype) * own + (gain * self.scaling[name]).to(y.dtype) * change
        return y

    def _change(self, x: Tensor, name: str) -> Tensor:
        """B A x (..., out), in x's dtype."""
        return _low_rank(x, self.lora_A[name], self.lora_B[name])

    def _gain(self, name: str) -> Tensor:
        """What DoRA multiplies each output with, fp32 (out,)."""
        with torch.no_grad():
            scaling = self.scaling[name]
            lora_A, lora_B = self.lora_A[name].float(), self.lora_B[name].float()
            seen = self.base_layer(lora_A.to(computes_in(self.base_layer)))  # A W' (r, out)
            seen = (seen if self.bias is None else seen - self.bias).float()
            gram = lora_A @ lora_A.T
            cross = (2 * scaling * seen.T + scaling**2 * lora_B @ gram).mul_(lora_B).sum(1)
            norm = self._row_norm().square().add_(cross).clamp_min_(0).sqrt_()
        return torch.div(self.lora_magnitude_vector[name].float(), norm)

    def _row_norm(self) -> Tensor:
        """|row of W|, fp32 (out,), made once."""
        if self.row_norm is None:
            self.row_norm = dense_weight(self.base_layer).norm(dim=1)
        return self.row_norm.float()

    def _by_rows(self, x: Tensor, names: tuple[str, ...]) -> Tensor:
        """Each row of x (rows, ..., in) through its own adapter; the base sees them together."""
        if len(x) != len(names):
            raise UserError(
                f"{len(names)} adapter names for a batch whose layers see {len(x)} rows: give one "
                "name a row (a layer that sees tokens in another order, as experts do, cannot tell)"
            )
        y: Tensor = self.base_layer(x)
        for name in dict.fromkeys(name for name in names if name in self.lora_A):
            rows = torch.tensor([i for i, n in enumerate(names) if n == name], device=x.device)
            dropped = F.dropout(x[rows], self.dropout[name], self.training)
            y = y.index_add(0, rows, self._change(dropped, name), alpha=self.scaling[name])
        return y

    def merged(self, names: Iterable[str]) -> Tensor:
        """The base weight with these adapters folded in, (out, in), in the layer's dtype."""
        weight = dense_weight(self.base_layer)
        for change in [self.factors(name).change(weight) for name in names]:
            weight = weight.add_(change)
        return weight.to(computes_in(self.base_layer))

    def merge(self, names: Iterable[str]) -> None:
        """Compute with these adapters' `merged` weight from now on, as long as all are active."""
        self.merged_adapters = tuple(name for name in names if name in self.lora_A)
        if self.merged_adapters:
            self.merged_weight = self.merged(self.merged_adapters)

    def unmerge(self) -> None:
        """Forget the merged weight."""
        self.merged_adapters, self.merged_weight = (), None

    def train(self, mode: bool = True) -> "LoRALinear":
        """In training adapters are apart from the base, as A and B are about to change."""
        if mode:
            self.unmerge()
        super().train(mode)
        return self

    def delta_weight(self, name: str) -> Tensor:
        """What adapter `name` adds to the base weight, fp32 (out, in)."""
        if name not in self.lora_magnitude_vector:
            return delta_weight(self.lora_A[name], self.lora_B[name], self.scaling[name])
        return self.factors(name).change(dense_weight(self.base_layer))

    def extra_repr(self) -> str:
        ranks = {name: matrix.shape[0] for name, matrix in self.lora_A.items()}
        return f"r={ranks}, active={self.active_adapters}"


def adapter_dtype(config: LoraConfig, base_layer: nn.Linear) -> torch.dtype:
    """bf16 on a GPU that computes in it, else fp32, unless the config says which.

    Under fp16 compute it must be fp32: loss scaling has no kernel for bf16 gradients.
    """
    if config.adapter_dtype != "auto":
        return DTYPES[config.adapter_dtype]
    in_bf16 = base_layer.weight.is_cuda and computes_in(base_layer) == torch.bfloat16
    return torch.bfloat16 if in_bf16 else torch.float32


def computes_in(layer: nn.Linear) -> torch.dtype:
    """The dtype a Linear4bit or nn.Linear computes in."""
    dtype: torch.dtype = getattr(layer, "compute_dtype", layer.weight.dtype)
    return dtype


def dense_weight(layer: nn.Linear) -> Tensor:
    """A new tensor with the weight of a Linear4bit or nn.Linear, fp32 (out, in)."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.detach().to(torch.float32, copy=True)
    return dequantize(Quantized(layer.weight.detach(), state))


def as_dense(layer: nn.Linear, weight: Tensor) -> nn.Module:
    """A plain frozen layer with `layer`'s bias and that weight (out, in), as the model's own class
    had it: an nn.Linear, or GPT-2's Conv1D."""
    if was_conv1d(layer):
        dense: Any = layer.source_cls(layer.out_features, layer.in_features)  # type: ignore[operator]
        weight = weight.T.contiguous()
    else:
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    dense.bias = layer.bias
    return dense.train(layer.training)  # type: ignore[no-any-return]


def was_conv1d(layer: nn.Module) -> bool:
    """Whether the checkpoint stores this layer's weight as (in, out), as GPT-2's Conv1D does."""
    return getattr(getattr(layer, "source_cls", None), "__name__", None) == "Conv1D"


def _low_rank(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """B A x (..., out), in x's dtype."""
    low = F.linear(x, lora_A.to(x.dtype))  # (..., r)
    return F.linear(low, lora_B.to(x.dtype))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As a Linear4bit does: in the weight's dtype, and back to x's."""
    bias = bias if bias is None else bias.to(weight.dtype)
    return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every adapted layer of `model`, by its name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def output_head(model: nn.Module) -> Any:
    """The layer that makes logits, which is neither quantized nor adapted, or None."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if get else None


def vocabulary(model: nn.Module) -> tuple[str | None, str | None]:
    """The names of `model`'s embedding and of its output head."""
    names = {module: name for name, module in model.named_modules()}
    get = getattr(model, "get_input_embeddings", None)
    return names.get(get() if get else None), names.get(output_head(model))


def is_tied(model: nn.Module) -> bool:
    """Whether `model`'s output head is its embedding."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if config else None
    return bool(getattr(text, "tie_word_embeddings", False) and output_head(model) is not None)
