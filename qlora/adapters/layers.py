"""LoRA over what is no linear layer: embeddings, convolutions, and the 3-D weights of experts.

    embedding    y = W[ids] + scaling * B A[:, ids]           A (r, vocab), B (dim, r)
    convolution  A is one with r channels out, B one of kernel size 1 from there:
                 A (r, in, *kernel), B (out, r, 1, …)
    experts      of each expert e, W_e + scaling * B_e A_e    A (E * r, in), B (out, r * E)

As PEFT has them. Experts are one parameter (E, out, in), which their module multiplies with as it
likes; so their sum with B A is formed in every forward pass, which costs its memory. Grouped
convolutions are left out: their change cannot be folded into the grouped weight.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from qlora.adapters.lora import LoRALayer, LoRALinear, adapter_dtype
from qlora.adapters.wrappers import AdapterModule, plain
from qlora.base.modules import is_conv, shallow_copy
from qlora.config import LoraConfig


class LoRAEmbedding(LoRALayer):
    """LoRA over an nn.Embedding: A is zero at first and B normal, as in PEFT. No dropout: on ids
    there is none."""

    ENDINGS = ("lora_embedding_A", "lora_embedding_B")

    def _initialise(
        self,
        lora_A: Tensor,
        lora_B: Tensor,
        config: LoraConfig,
        generator: torch.Generator | None,
    ) -> None:
        lora_A.zero_()
        lora_B.normal_(generator=generator)

    def _change(self, x: Tensor, name: str) -> Tensor:
        low = F.embedding(x, self.lora_A[name].T, padding_idx=self.plain.padding_idx)
        return self._scaled(F.linear(low, self.lora_B[name]).to(self.plain.weight.dtype))

    def _with_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._scaled(F.embedding(x, weight.T))

    def _scaled(self, y: Tensor) -> Tensor:
        """As Gemma's embedding does with its rows."""
        return scaled_as(self.plain, y)

    def _drop(self, x: Tensor, name: str) -> Tensor:
        return x


def scaled_as(embedding: nn.Module, rows: Tensor) -> Tensor:
    """Rows of an embedding as it would give them: some multiply them with a constant."""
    scale: Any = getattr(embedding, "embed_scale", None)
    return rows if scale is None else rows * torch.as_tensor(scale, device=rows.device).to(rows)


class LoRAConv(LoRALayer):
    """LoRA over an nn.Conv1d, nn.Conv2d or nn.Conv3d that is not grouped."""

    def _put(self, name: str, lora_A: Tensor, lora_B: Tensor) -> None:
        kernel = self.plain.weight.shape[1:]
        ones = [1] * len(self.plain.kernel_size)
        super()._put(name, lora_A.view(-1, *kernel), lora_B.view(*lora_B.shape[:2], *ones))

    def _change(self, x: Tensor, name: str) -> Tensor:
        conv = self.plain
        low = conv._conv_forward(x, self.lora_A[name].to(x.dtype), None)  # stride, padding and all
        up = (F.conv1d, F.conv2d, F.conv3d)[len(conv.kernel_size) - 1]
        changed: Tensor = up(low, self.lora_B[name].to(x.dtype))
        return changed

    def _with_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        conv = self.plain
        made: Tensor = conv._conv_forward(x, weight.view_as(conv.weight), self._bias)
        return made

    def _spread(self, features: Tensor) -> Tensor:
        return features.view(-1, *[1] * len(self.plain.kernel_size))

    @property
    def _magnitude_shape(self) -> tuple[int, ...]:
        return (1, self.shape[0], *[1] * len(self.plain.kernel_size))


class LoRAExperts(AdapterModule):
    """LoRA over parameters (E, out, in) of a module; or (out, in), as routers have."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.scaling: dict[str, dict[str, float]] = {}  # of an adapter's change of a parameter
        self.merged_adapters = ()
        self._merged: dict[str, Tensor] = {}

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self.lora_A)

    def add_adapter(
        self,
        name: str,
        configs: Mapping[str, LoraConfig],
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        """A new adapter of some of the module's parameters, not yet active.

        Args:
            configs: what each of these parameters gets.
        """
        lora_A, lora_B = {}, {}
        for leaf, config in configs.items():
            weight = getattr(self.plain, leaf)
            (experts, out_features, in_features) = expert_sizes(self.plain, leaf)
            dtype = adapter_dtype(config, _Weight(weight))
            drawn = torch.empty(config.r * experts, in_features)
            bound = in_features**-0.5
            lora_A[leaf] = drawn.uniform_(-bound, bound, generator=generator).to(dtype)
            lora_B[leaf] = torch.zeros(out_features, config.r * experts, dtype=dtype)
        self.put_adapter(name, lora_A, lora_B, {n: own.scaling for n, own in configs.items()})

    def put_adapter(
        self,
        name: str,
        lora_A: Mapping[str, Tensor],
        lora_B: Mapping[str, Tensor],
        scaling: Mapping[str, float],
    ) -> None:
        """An adapter with these values, frozen and not yet active, by the names of the module's
        parameters."""
        for held, values in ((self.lora_A, lora_A), (self.lora_B, lora_B)):
            moved = {n: t.to(getattr(self.plain, n).device, copy=True) for n, t in values.items()}
            parameters = {n: nn.Parameter(t, requires_grad=False) for n, t in moved.items()}
            held[name] = nn.ParameterDict(parameters)
        self.scaling[name] = dict(scaling)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """As PEFT, which wraps a module once for each parameter, names them: the first stands
        innermost."""
        if name not in self.lora_A:
            return {}
        found, leaves = {}, self.leaves_of(name)
        for depth, leaf in enumerate(reversed(leaves)):
            prefix = "base_layer." * depth
            found[f"{prefix}lora_A.weight"] = self.lora_A[name][leaf]  # type: ignore[index]
            found[f"{prefix}lora_B.weight"] = self.lora_B[name][leaf]  # type: ignore[index]
        return found

    def rank(self, name: str) -> int:
        """The rank of each expert's change."""
        leaf = self.leaves_of(name)[0]
        held: Any = self.lora_A[name]
        return len(held[leaf]) // expert_sizes(self.plain, leaf)[0]

    def leaves_of(self, name: str) -> list[str]:
        """Which of the module's parameters adapter `name` changes, in the module's order."""
        held: Any = self.lora_A[name]
        return [leaf for leaf, _ in self.plain.named_parameters(recurse=False) if leaf in held]

    def remove_adapter(self, name: str) -> None:
        if name in self.lora_A:
            del self.lora_A[name], self.lora_B[name], self.scaling[name]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base module, with its changed parameters."""
        if self._merged and set(self.merged_adapters) <= set(self.active_adapters):
            rest = [n for n in self.active_adapters if n not in self.merged_adapters]
            changed = self._summed(rest, self._merged)
        else:
            changed = self._summed(self.active_adapters, {})
        return functional_call(self.plain, changed, args, kwargs)

    def _summed(self, names: Iterable[str], found: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parameters that these adapters change, changed."""
        found = dict(found)
        for name in names:
            for leaf in self.leaves_of(name):
                weight = found.get(leaf, getattr(self.plain, leaf))
                found[leaf] = weight + self.delta_weight(name, leaf).to(weight.dtype)
        return found

    def delta_weight(self, name: str, leaf: str) -> Tensor:
        """What adapter `name` adds to a parameter, in its shape."""
        (experts, out_features, in_features) = expert_sizes(self.plain, leaf)
        held_A: Any = self.lora_A[name]
        held_B: Any = self.lora_B[name]
        lora_A = held_A[leaf].view(experts, -1, in_features)
        lora_B = held_B[leaf].view(out_features, -1, experts).permute(2, 0, 1)
        delta = self.scaling[name][leaf] * torch.bmm(lora_B, lora_A)  # (E, out, in)
        weight = getattr(self.plain, leaf)
        if weight.ndim == 3 and _is_transposed(self.plain):
            delta = delta.transpose(1, 2)
        return delta.reshape(weight.shape)

    def merge(self, names: Iterable[str]) -> None:
        self.merged_adapters = tuple(name for name in names if name in self.lora_A)
        with torch.no_grad():
            self._merged = self._summed(self.merged_adapters, {})

    def unmerge(self) -> None:
        self.merged_adapters, self._merged = (), {}

    def fold(self, below: nn.Module, names: Iterable[str]) -> nn.Module:
        made = shallow_copy(below)
        with torch.no_grad():
            changed = self._summed([name for name in names if name in self.lora_A], {})
        for leaf, weight in changed.items():
            setattr(made, leaf, nn.Parameter(weight, requires_grad=False))
        return made


def expert_sizes(module: nn.Module, leaf: str) -> tuple[int, int, int]:
    """(experts, out, in) of one of a module's parameters."""
    shape = getattr(module, leaf).shape
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    experts, out_features, in_features = shape
    if _is_transposed(module):
        return experts, in_features, out_features
    return experts, out_features, in_features


def _is_transposed(module: nn.Module) -> bool:
    return bool(getattr(module, "is_transposed", False))


class _Weight(nn.Module):
    """A parameter as the weight of a layer, whose dtype it tells."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


def lora_layer(layer: nn.Module) -> LoRALayer:
    """The low-rank wrapper for a layer of the base, or what stands in front of it."""
    below = plain(layer)
    if isinstance(below, nn.Embedding):
        return LoRAEmbedding(layer)
    return LoRAConv(layer) if is_conv(below) else LoRALinear(layer)
