"""Parameters of the base that an adapter trains themselves, not through A and B.

    TrainedModule   modules_to_save and biases: some parameters of a module, or all
    TokenRows       trainable_token_indices: rows of an embedding, and of a head that is tied to it

Each adapter has its own copy of what it trains, so the base stays as it is. (PEFT trains biases in
place.) Copies are in fp32 and cast for use: one step of bf16 is 0.4 % of a value, so most updates
would be lost.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from qlora.adapters.layers import scaled_as
from qlora.adapters.wrappers import AdapterModule, frozen_copy
from qlora.base.modules import as_dense, computes_in, dense_weight, is_quantized, shallow_copy


class TrainedModule(AdapterModule):
    """A module of which each adapter has a copy of some parameters, or all; innermost."""

    BY_ADAPTER = ("copies",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.copies: Any = nn.ModuleDict()
        self._dense: nn.Module | None = None

    def add_adapter(self, name: str, parameters: Iterable[str], *, dtype: torch.dtype) -> None:
        """Copies of these parameters, with the base's values; not yet active."""
        values = {leaf: getattr(self.plain, leaf).detach() for leaf in parameters}
        if "weight" in values and is_quantized(self.plain):
            values["weight"] = as_dense(self.plain, dense_weight(self.plain)).weight
        self.put_adapter(name, {leaf: value.to(dtype) for leaf, value in values.items()})

    def put_adapter(self, name: str, values: dict[str, Tensor]) -> None:
        """These values, frozen and not yet active; a vocabulary may have more rows."""
        copies = {leaf: frozen_copy(t, getattr(self.plain, leaf)) for leaf, t in values.items()}
        self.copies[name] = nn.ParameterDict(copies)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        return {} if name in self.followed else self._copies_of(name)

    def _copies_of(self, name: str) -> dict[str, nn.Parameter]:
        return dict(self.copies[name].items()) if name in self.copies else {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base module, with the active adapter's copies."""
        if self.adapter_of_row is None:
            for name in self.active_adapters:  # at most one has copies
                return functional_call(self._module(name), self._cast(name), args, kwargs)
            return self.base_layer(*args, **kwargs)
        x, *more = args
        y: Tensor = self.base_layer(*args)
        for name, rows in self._rows_of(x, self.adapter_of_row).items():
            own = functional_call(self._module(name), self._cast(name), (x[rows], *more))
            y = y.index_copy(0, rows, own)
        return y

    def _module(self, name: str) -> nn.Module:
        """The module to call with the copies: the base's own, or a dense one for a 4-bit layer."""
        if not (is_quantized(self.plain) and "weight" in self._copies_of(name)):
            return self.plain  # type: ignore[no-any-return]
        if self._dense is None:
            self._dense = as_dense(self.plain, torch.empty(self.plain.weight.quant_state.shape))
        return self._dense

    def _cast(self, name: str) -> dict[str, Tensor]:
        """The adapter's copies, in the dtype that the base computes in."""
        if name in self._fused:
            return self._fused[name]  # type: ignore[no-any-return]
        own = computes_in(self.plain) if is_quantized(self.plain) else None
        leaves = self._copies_of(name).items()
        return {leaf: value.to(own or getattr(self.plain, leaf).dtype) for leaf, value in leaves}

    def fuse(self, names: Iterable[str]) -> None:
        """Keep these adapters' copies cast."""
        super().fuse(names)
        self._fused = {name: self._cast(name) for name in self.fused_adapters}

    @property
    def bias(self) -> Tensor | None:
        """The active adapter's, or the base's."""
        for name in self.active_adapters:
            if "bias" in self._copies_of(name):
                return self._cast(name)["bias"]
        return self.base_layer.bias  # type: ignore[no-any-return]

    def fused(self, below: nn.Module, names: Iterable[str]) -> nn.Module:
        for name in names:
            if name in self.copies:
                own = self._module(name)
                module: Any = shallow_copy(below if own is self.plain else own)
                for leaf, value in self._cast(name).items():
                    setattr(module, leaf, nn.Parameter(value.detach(), requires_grad=False))
                    if leaf == "weight" and isinstance(module, nn.Embedding):
                        module.num_embeddings = len(value)  # a vocabulary may have grown
                    elif leaf == "weight" and isinstance(module, nn.Linear):
                        module.out_features = len(value)
                return module.train(below.training)  # type: ignore[no-any-return]
        return below


class TokenRows(AdapterModule):
    """An embedding of which each adapter has a copy of some rows; or an output head, whose logits
    of these tokens they give."""

    BY_ADAPTER = ("rows", "ids")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.rows = nn.ParameterDict()
        self.ids: dict[str, list[int]] = {}
        self.is_head = not isinstance(self.plain, nn.Embedding)

    def add_adapter(self, name: str, ids: Sequence[int], *, dtype: torch.dtype) -> None:
        """Copies (n, dim) of the rows with these ids; not yet active."""
        self.put_adapter(name, ids, self.plain.weight.detach()[list(ids)].to(dtype))

    def put_adapter(self, name: str, ids: Sequence[int], rows: Tensor) -> None:
        """These rows, frozen and not yet active."""
        self.ids[name], self.rows[name] = list(ids), frozen_copy(rows, self.plain.weight)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        if name in self.followed or name not in self.rows:
            return {}
        return {"token_adapter.trainable_tokens_delta": self.rows[name]}

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
            logits = F.linear(x, own, bias if bias is None else bias[ids])  # (..., n)
            return y.index_copy(-1, ids, logits.to(y.dtype))
        # (n,): of a token's row in `own`; the last is that of tokens beyond, of a grown vocabulary
        index = x.new_full((max(len(self.plain.weight), int(ids.max()) + 1) + 1,), -1)
        index = index.index_copy(0, ids, torch.arange(len(ids), device=x.device).to(index.dtype))
        row = index[x.clamp_max(len(index) - 1)]
        values = scaled_as(self.plain, F.embedding(row.clamp_min(0), own))  # (..., dim)
        return torch.where((row >= 0)[..., None], values.to(y.dtype), y)

    def fused(self, below: nn.Module, names: Iterable[str]) -> nn.Module:
        module: Any = below
        for name in names:
            if name in self.rows:
                module = shallow_copy(module)
                ids = torch.tensor(self.ids[name], device=module.weight.device)
                rows = self.rows[name].detach().to(module.weight)
                weight = module.weight.detach().index_copy(0, ids, rows)
                module.weight = nn.Parameter(weight, requires_grad=False)
        return module  # type: ignore[no-any-return]
