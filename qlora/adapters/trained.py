"""Parts of the base that an adapter trains themselves: whole modules, biases, rows of embeddings.

Each adapter has its own copy of what it trains, so that the base stays what it is, for the other
adapters and when they are disabled. (PEFT trains biases in place: with them the base is gone.)
Copies are kept in fp32 and cast for use: one step of bf16 is 0.4 % of a value, more than most
updates, which would be lost.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from qlora.adapters.layers import scaled_as
from qlora.adapters.wrappers import AdapterModule
from qlora.base.modules import (
    as_dense,
    computes_in,
    dense_weight,
    is_quantized,
    shallow_copy,
    was_conv1d,
)


class TrainedModule(AdapterModule):
    """A module of which each adapter has some parameters, or all, as its own: what PEFT calls
    modules_to_save, and biases. It stands innermost."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.own = nn.ModuleDict()
        self._dense: nn.Module | None = None
        self._merged: dict[str, dict[str, Tensor]] = {}

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self.own)

    def add_adapter(
        self, name: str, parameters: Iterable[str], *, dtype: torch.dtype = torch.float32
    ) -> None:
        """Its own of these parameters, with the base's values, not yet active."""
        values = {leaf: self._base_value(leaf).to(dtype) for leaf in parameters}
        self.own[name] = nn.ParameterDict({n: nn.Parameter(t) for n, t in values.items()})

    def put_adapter(self, name: str, values: dict[str, Tensor]) -> None:
        """These values, frozen and not yet active; a vocabulary may have more rows."""
        moved = {
            leaf: value.to(getattr(self.plain, leaf).device, copy=True)
            for leaf, value in values.items()
        }
        parameters = {leaf: nn.Parameter(t, requires_grad=False) for leaf, t in moved.items()}
        self.own[name] = nn.ParameterDict(parameters)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        if name not in self.own:
            return {}
        held: Any = self.own[name]
        return dict(held.items())

    def remove_adapter(self, name: str) -> None:
        if name in self.own:
            del self.own[name]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base module, with the active adapter's own parameters."""
        if self.adapter_of_row is not None:
            return self._by_rows(*args)
        for name in self.active_adapters:
            return self._through(name, *args, **kwargs)
        return self.base_layer(*args, **kwargs)

    def _through(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self._module(name), self._cast(name), args, kwargs)

    def _by_rows(self, x: Tensor, *args: Any) -> Tensor:
        y: Tensor = self.base_layer(x, *args)
        for name, rows in self._rows_of(x, self.adapter_of_row or ()).items():
            y = y.index_copy(0, rows, self._through(name, x[rows], *args))
        return y

    def _module(self, name: str) -> nn.Module:
        """Whose parameters are replaced: the base module's, or in a 4-bit layer's place a dense
        one's."""
        if not (is_quantized(self.plain) and "weight" in self.parameters_of(name)):
            return self.plain  # type: ignore[no-any-return]
        if self._dense is None:
            self._dense = as_dense(self.plain, torch.empty(self.plain.weight.quant_state.shape))
        return self._dense

    def _base_value(self, leaf: str) -> Tensor:
        if leaf == "weight" and is_quantized(self.plain):
            weight = dense_weight(self.plain)
            return weight.T.contiguous() if was_conv1d(self.plain) else weight
        value: Tensor = getattr(self.plain, leaf).detach()
        return value.clone()

    def _cast(self, name: str) -> dict[str, Tensor]:
        """The adapter's own parameters in the dtype that the base has."""
        if name in self._merged:
            return self._merged[name]
        own = self.parameters_of(name).items()
        return {leaf: value.to(self._dtype_of(leaf)) for leaf, value in own}

    def _dtype_of(self, leaf: str) -> torch.dtype:
        if is_quantized(self.plain):
            return computes_in(self.plain)
        dtype: torch.dtype = getattr(self.plain, leaf).dtype
        return dtype

    def merge(self, names: Iterable[str]) -> None:
        """Keep them cast."""
        self.merged_adapters = tuple(name for name in names if name in self.own)
        self._merged = {name: self._cast(name) for name in self.merged_adapters}

    def unmerge(self) -> None:
        self.merged_adapters, self._merged = (), {}

    @property
    def bias(self) -> Tensor | None:
        """The one in use."""
        for name in self.active_adapters:
            if "bias" in self.parameters_of(name):
                return self._cast(name)["bias"]
        bias: Tensor | None = self.base_layer.bias
        return bias

    def fold(self, below: nn.Module, names: Iterable[str]) -> nn.Module:
        for name in names:
            if name in self.own:
                module = self._module(name)
                made = shallow_copy(below if module is self.plain else module)
                for leaf, value in self._cast(name).items():
                    _set(made, leaf, value.detach())
                return made.train(below.training)
        return below


class TokenRows(AdapterModule):
    """An embedding of which each adapter has some rows of its own; or an output head, maybe tied,
    whose logits of these tokens they make.

    Args:
        tied_to: the embedding's wrapper, if this is the head's.
    """

    def __init__(self, base_layer: nn.Module, tied_to: "TokenRows | None" = None) -> None:
        super().__init__(base_layer)
        self.rows: nn.ParameterDict = nn.ParameterDict() if tied_to is None else tied_to.rows
        self.ids: dict[str, list[int]] = {} if tied_to is None else tied_to.ids
        self.is_tied = tied_to is not None
        self.is_head = not isinstance(self.plain, nn.Embedding)

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self.rows)

    def add_adapter(
        self, name: str, ids: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> None:
        """Its own rows (n, dim) with these ids, not yet active."""
        rows = self.plain.weight.detach()[list(ids)].to(dtype, copy=True)
        self.ids[name], self.rows[name] = list(ids), nn.Parameter(rows)

    def put_adapter(self, name: str, ids: Sequence[int], rows: Tensor) -> None:
        """These rows, frozen and not yet active."""
        device = self.plain.weight.device
        self.ids[name] = list(ids)
        self.rows[name] = nn.Parameter(rows.to(device, copy=True), requires_grad=False)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        if self.is_tied or name not in self.rows:  # those of a tied head are the embedding's
            return {}
        return {"token_adapter.trainable_tokens_delta": self.rows[name]}

    def remove_adapter(self, name: str) -> None:
        if name in self.rows:
            del self.rows[name], self.ids[name]

    def forward(self, x: Tensor) -> Tensor:
        """ids (...) -> (..., dim); or of a head x (..., dim) -> logits (..., vocab)."""
        y: Tensor = self.base_layer(x)
        if self.adapter_of_row is None:
            for name in self.active_adapters:
                y = self._with_rows(y, x, name)
            return y
        for name, rows in self._rows_of(x, self.adapter_of_row).items():
            y = y.index_copy(0, rows, self._with_rows(y[rows], x[rows], name))
        return y

    def _with_rows(self, y: Tensor, x: Tensor, name: str) -> Tensor:
        own = self.rows[name].to(self.plain.weight.dtype)
        ids = torch.tensor(self.ids[name], device=x.device)
        if self.is_head:
            bias = getattr(self.plain, "bias", None)
            logits = F.linear(x, own, bias if bias is None else bias[ids])
            return y.index_copy(-1, ids, logits.to(y.dtype))
        place = x.new_full((len(self.plain.weight),), -1)  # of a token among the rows
        place = place.index_copy(0, ids, torch.arange(len(ids), device=x.device).to(place.dtype))
        found = place[x]
        rows = scaled_as(self.plain, F.embedding(found.clamp_min(0), own))
        return torch.where((found >= 0)[..., None], rows.to(y.dtype), y)

    def fold(self, below: nn.Module, names: Iterable[str]) -> nn.Module:
        made: Any = below
        for name in names:
            if name in self.rows:
                made = shallow_copy(made)
                ids = torch.tensor(self.ids[name], device=made.weight.device)
                rows = self.rows[name].detach().to(made.weight)
                weight = made.weight.detach().index_copy(0, ids, rows)
                made.weight = nn.Parameter(weight, requires_grad=False)
        return made  # type: ignore[no-any-return]


def _set(module: Any, leaf: str, value: Tensor) -> None:
    """Another value for a parameter; an embedding or head may have more rows with it."""
    setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    if leaf == "weight" and isinstance(module, nn.Embedding):
        module.num_embeddings = len(value)
    if leaf == "weight" and isinstance(module, nn.Linear):
        module.out_features = len(value)
