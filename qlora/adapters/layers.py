"""LoRA over embeddings, convolutions, and the 3-D weights of experts.

    embedding    y = W[ids] + scaling * B A[:, ids]           A (r, vocab), B (dim, r)
    convolution  A is one with r channels out, B one of kernel size 1 from there:
                 A (r, in, *kernel), B (out, r, 1, …)
    experts      of each expert e, W_e + scaling * B_e A_e    A (E * r, in), B (out, r * E)

As in PEFT. Experts are one parameter (E, out, in), and their module multiplies with it in its own
way; so the sum with B A is formed in every forward pass, which costs its memory. Grouped
convolutions are left out: their change cannot be fused into the grouped weight.

A new type of layer is a subclass of LoRALayer with `_change` and `_with_weight`, and a line in
`lora_class` (CONTRIBUTING.md has the rest). By need: `_as_stored` for other shapes in files,
`ENDINGS` (and `PARTS` in tensors.py) for other names there, `_first_values` for another start, and
`_as_output` for DoRA.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from qlora.adapters.lora import Factors, LoRALayer, LoRALinear, Matrices, adapter_dtype
from qlora.adapters.wrappers import AdapterModule, frozen_copy
from qlora.base.modules import (
    as_dense,
    computes_in,
    dense_weight,
    is_conv,
    is_linear,
    shallow_copy,
)
from qlora.config import LoraConfig


def lora_class(layer: nn.Module) -> type[LoRALayer] | None:
    """The low-rank wrapper for a layer of the base; None where A and B do not fit."""
    if isinstance(layer, nn.Embedding):
        return LoRAEmbedding
    if is_conv(layer):
        return LoRAConv if layer.groups == 1 else None
    return LoRALinear if is_linear(layer) else None


class LoRAEmbedding(LoRALayer):
    """LoRA over an nn.Embedding: A starts as zero and B normal, as in PEFT; ids have no dropout."""

    ENDINGS = ("lora_embedding_A", "lora_embedding_B")

    def _first_values(self, config: LoraConfig, generator: torch.Generator | None) -> Matrices:
        dim, vocab = self.shape
        lora_B = torch.empty(dim, config.r).normal_(generator=generator)
        return torch.zeros(config.r, vocab), lora_B

    def _change(self, x: Tensor, name: str) -> Tensor:
        low = F.embedding(x, self.lora_A[name].T, padding_idx=self.plain.padding_idx)  # (..., r)
        change = F.linear(low, self.lora_B[name])  # (..., r) @ (r, dim) -> (..., dim)
        return scaled_as(self.plain, change.to(self.plain.weight.dtype))

    def _with_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return scaled_as(self.plain, F.embedding(x, weight.T))

    def _drop(self, x: Tensor, name: str) -> Tensor:
        return x


class LoRATiedHead(AdapterModule):
    """An output head (vocab, dim) whose weight is that of an embedding with A and B, which follows
    them: y = (W' + scaling * A' B') x, with DoRA's factors of the embedding's dim on x."""

    BY_ADAPTER = ("sources",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.sources: dict[str, list[LoRAEmbedding]] = {}  # lists: they are no submodules

    def follow(self, source: AdapterModule, name: str) -> None:
        assert isinstance(source, LoRAEmbedding)
        self.sources[name] = [source]
        self.followed.add(name)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        return {}

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> (..., vocab)"""
        y: Tensor = self.base_layer(x)
        if self.adapter_of_row is None:
            for name in self.active_adapters:
                y = y + self._change(x, name)
            return y
        for name, rows in self._rows_of(x, self.adapter_of_row).items():
            y = y.index_add(0, rows, self._change(x[rows], name))
        return y

    def _change(self, x: Tensor, name: str) -> Tensor:
        (source,) = self.sources[name]
        lora_A, lora_B, scaling, magnitude = source.factors(name)
        dora: Tensor | float = 0.0
        if magnitude is not None:
            scaled = x * source._gain(name).to(x.dtype)
            dora, x = F.linear(scaled - x, self.plain.weight), scaled
        low = F.linear(x, lora_B.T.to(x.dtype))  # (..., dim) @ (dim, r) -> (..., r)
        return scaling * F.linear(low, lora_A.T.to(x.dtype)) + dora  # @ (r, vocab) -> (..., vocab)

    def fused(self, below: nn.Module, names: Iterable[str]) -> nn.Module:
        sources = {name: self.sources[name][0] for name in names if name in self.sources}
        if not sources:
            return below
        weight = dense_weight(below).T.contiguous()  # (dim, vocab)
        for change in [source.factors(name).change(weight) for name, source in sources.items()]:
            weight.add_(change)
        return as_dense(below, weight.T.contiguous().to(computes_in(below)))


def scaled_as(embedding: nn.Module, rows: Tensor) -> Tensor:
    """Rows of an embedding times the constant that some (Gemma's) multiply theirs with."""
    scale: Any = getattr(embedding, "embed_scale", None)
    return rows if scale is None else rows * torch.as_tensor(scale, device=rows.device).to(rows)


class LoRAConv(LoRALayer):
    """LoRA over an nn.Conv1d, nn.Conv2d or nn.Conv3d that is not grouped."""

    @property
    def _ones(self) -> tuple[int, ...]:
        return (1,) * len(self.plain.kernel_size)  # a kernel of size 1

    def _as_stored(self, factors: Factors) -> Factors:
        lora_A, lora_B, scaling, magnitude = factors
        lora_A = lora_A.view(-1, *self.plain.weight.shape[1:])  # (r, in, *kernel)
        magnitude = None if magnitude is None else self._as_output(magnitude)[None]
        return Factors(lora_A, lora_B.view(*lora_B.shape, *self._ones), scaling, magnitude)

    def _change(self, x: Tensor, name: str) -> Tensor:
        conv = self.plain
        # (N, in, *size) -> (N, r, *size') with the layer's own stride and padding
        low = conv._conv_forward(x, self.lora_A[name].to(x.dtype), None)
        up = (F.conv1d, F.conv2d, F.conv3d)[len(conv.kernel_size) - 1]
        return up(low, self.lora_B[name].to(x.dtype))  # -> (N, out, *size')

    def _with_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        weight = weight.view_as(self.plain.weight)
        return self.plain._conv_forward(x, weight, self._bias)  # type: ignore[no-any-return]

    def _as_output(self, features: Tensor) -> Tensor:
        return features.view(-1, *self._ones)


ByLeaf = Mapping[str, Tensor]


class LoRAExperts(AdapterModule):
    """LoRA over parameters (E, out, in) of a module; or (out, in), as routers have."""

    BY_ADAPTER = ("lora_A", "lora_B", "scaling")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.lora_A: Any = nn.ModuleDict()  # by adapter, then by parameter
        self.lora_B: Any = nn.ModuleDict()
        self.scaling: dict[str, dict[str, float]] = {}

    def add_adapter(
        self, name: str, configs: dict[str, LoraConfig], *, generator: torch.Generator | None = None
    ) -> None:
        """A new adapter of some of the module's parameters, by name; not yet active."""
        lora_A, lora_B = {}, {}
        for leaf, config in configs.items():
            weight = getattr(self.plain, leaf)
            experts, out_features, in_features = expert_sizes(self.plain, leaf)
            dtype = adapter_dtype(config, weight.device, weight.dtype)
            drawn, bound = torch.empty(config.r * experts, in_features), in_features**-0.5
            lora_A[leaf] = drawn.uniform_(-bound, bound, generator=generator).to(dtype)
            lora_B[leaf] = torch.zeros(out_features, config.r * experts, dtype=dtype)
        self.put_adapter(name, lora_A, lora_B, {n: own.scaling for n, own in configs.items()})

    def put_adapter(
        self, name: str, lora_A: ByLeaf, lora_B: ByLeaf, scaling: Mapping[str, float]
    ) -> None:
        """An adapter with these values of some parameters, frozen and not yet active."""
        for held, values in ((self.lora_A, lora_A), (self.lora_B, lora_B)):
            copies = {n: frozen_copy(t, getattr(self.plain, n)) for n, t in values.items()}
            held[name] = nn.ParameterDict(copies)
        self.scaling[name] = dict(scaling)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """Under PEFT's names: it wraps a module once for each parameter, the first innermost."""
        if name not in self.lora_A:
            return {}
        parameters = {}
        for depth, leaf in enumerate(reversed(self.leaves_of(name))):
            prefix = "base_layer." * depth
            parameters[f"{prefix}lora_A.weight"] = self.lora_A[name][leaf]
            parameters[f"{prefix}lora_B.weight"] = self.lora_B[name][leaf]
        return parameters

    def leaves_of(self, name: str) -> list[str]:
        """The module's parameters that adapter `name` changes, in the module's order."""
        leaves = (leaf for leaf, _ in self.plain.named_parameters(recurse=False))
        return [leaf for leaf in leaves if leaf in self.lora_A[name]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base module, with its changed parameters."""
        names, fused = self.active_adapters, {}
        if self._fused and set(self.fused_adapters) <= set(names):
            names = tuple(name for name in names if name not in self.fused_adapters)
            fused = self._fused
        return functional_call(self.plain, self._changed(names, fused), args, kwargs)

    def _changed(self, names: Iterable[str], start: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parameters that these adapters change, changed; from `start`, or the base's own."""
        changed = dict(start)
        for name in names:
            for leaf in self.leaves_of(name):
                weight = changed.get(leaf, getattr(self.plain, leaf))
                changed[leaf] = weight + self.get_delta_weight(name, leaf).to(weight.dtype)
        return changed

    def get_delta_weight(self, name: str, leaf: str) -> Tensor:
        """What adapter `name` adds to a parameter, in its shape."""
        experts, out_features, in_features = expert_sizes(self.plain, leaf)
        lora_A = self.lora_A[name][leaf].view(experts, -1, in_features)  # (E, r, in)
        lora_B = self.lora_B[name][leaf].view(out_features, -1, experts)  # (out, r, E)
        # (E, out, r) @ (E, r, in) -> (E, out, in)
        delta = self.scaling[name][leaf] * torch.bmm(lora_B.permute(2, 0, 1), lora_A)
        delta = delta.transpose(1, 2) if _is_transposed(self.plain, leaf) else delta
        return delta.reshape(getattr(self.plain, leaf).shape)

    def fuse(self, names: Iterable[str]) -> None:
        super().fuse(names)
        with torch.no_grad():
            self._fused = self._changed(self.fused_adapters, {})

    def fused(self, below: nn.Module, names: Iterable[str]) -> nn.Module:
        module = shallow_copy(below)
        with torch.no_grad():
            changed = self._changed([name for name in names if name in self.lora_A], {})
        for leaf, weight in changed.items():
            setattr(module, leaf, nn.Parameter(weight, requires_grad=False))
        return module


def expert_sizes(module: nn.Module, leaf: str) -> tuple[int, int, int]:
    """(experts, out, in) of one of a module's parameters."""
    *experts, out_features, in_features = getattr(module, leaf).shape
    if _is_transposed(module, leaf):
        out_features, in_features = in_features, out_features
    return experts[0] if experts else 1, out_features, in_features


def _is_transposed(module: nn.Module, leaf: str) -> bool:
    """Whether a weight of experts is stored as (E, in, out), as gpt-oss does."""
    return getattr(module, leaf).ndim == 3 and bool(getattr(module, "is_transposed", False))
