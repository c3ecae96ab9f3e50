"""Wrappers around base-model modules: named adapters, or a faster equivalent implementation.

A wrapper has the attributes of the module behind it, so other modules see no difference. Wrappers
can be nested; the base's own module is the innermost `base_layer`, `plain`.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlora.base.modules import shallow_copy
from qlora.base.sharding import device_of
from qlora.errors import require


class Wrapper(nn.Module):
    """A module around one of the base, or around another wrapper.

    Attributes that it lacks, such as `weight`, are the base layer's: some models read them.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer: Any = base_layer

    @property
    def plain(self) -> Any:
        """The base model's own module."""
        return plain(self.base_layer)

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:  # as torch would find it, in half the time: layers read many in a call
            return modules[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)


class AdapterModule(Wrapper):
    """A frozen module with named adapters, of which the active ones change its output."""

    BY_ADAPTER: tuple[str, ...]  # attributes: dicts by adapter, of which the first has all

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.active_adapters: tuple[str, ...] = ()
        self.fused_adapters: tuple[str, ...] = ()
        self._fused: dict[str, Any] = {}  # what a subclass computes once for them
        self.followed: set[str] = set()  # adapters whose parameters are another module's
        self.adapter_of_row: tuple[str, ...] | None = None

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that change this module."""
        return tuple(getattr(self, self.BY_ADAPTER[0]))

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of adapter `name`, by the endings of their names in adapter files; none of
        an adapter that it follows."""
        raise NotImplementedError

    def follow(self, source: "AdapterModule", name: str) -> None:
        """Share adapter `name` of `source`, whose base layer has the same weight."""
        for attribute in self.BY_ADAPTER:
            if name in (held := getattr(source, attribute)):
                getattr(self, attribute)[name] = held[name]
        self.followed.add(name)

    def remove_adapter(self, name: str) -> None:
        """Delete adapter `name`, if the module has it."""
        self.followed.discard(name)
        for attribute in self.BY_ADAPTER:
            if name in (held := getattr(self, attribute)):
                del held[name]

    def fuse(self, names: Iterable[str]) -> None:
        """Compute as fast as without these adapters while all of them are active, if possible."""
        self.fused_adapters = tuple(name for name in names if name in self.adapters)

    def unfuse(self) -> None:
        """Undo `fuse`."""
        self.fused_adapters, self._fused = (), {}

    def fused(self, below: nn.Module, names: Iterable[str]) -> nn.Module:
        """`below`, the base layer or one already fused, with these adapters in its weights."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "AdapterModule":
        """Training unfuses, as parameters are about to change."""
        if mode:
            self.unfuse()
        super().train(mode)
        return self

    def _rows_of(self, x: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        """The indices of the rows of a batch x (rows, ...) for each of this module's adapters."""
        counts = f"{len(names)} adapter names for a batch whose layers see {len(x)} rows"
        require(len(x) == len(names), f"{counts}: give one name a row (experts reorder tokens)")
        present = [name for name in dict.fromkeys(names) if name in self.adapters]
        rows = {name: [i for i, n in enumerate(names) if n == name] for name in present}
        return {name: torch.tensor(own, device=x.device) for name, own in rows.items()}


def frozen_copy(value: Tensor, like: Tensor) -> nn.Parameter:
    """`value` as a frozen parameter where `like` computes; a copy, as tensors of a file may be
    aligned so that kernels round otherwise."""
    return nn.Parameter(value.to(device_of(like), copy=True), requires_grad=False)


def plain(module: nn.Module) -> Any:
    """The base's own module behind any wrappers."""
    while isinstance(module, Wrapper):
        module = module.base_layer
    return module


def wrappers(module: nn.Module) -> Iterator[Wrapper]:
    """The wrappers around a module of the base, the outermost first."""
    while isinstance(module, Wrapper):
        yield module
        module = module.base_layer


def adapter_modules(module: nn.Module) -> Iterator[AdapterModule]:
    """Those of `wrappers` that hold adapters."""
    return (wrapper for wrapper in wrappers(module) if isinstance(wrapper, AdapterModule))


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the base, by its name there: itself, or its outermost wrapper."""
    names: dict[nn.Module, str] = {}

    def walk(name: str, module: nn.Module) -> None:
        if module not in names:
            names[module] = name
            for leaf, child in plain(module).named_children():
                walk(f"{name}.{leaf}".lstrip("."), child)

    walk("", model)
    return {name: module for module, name in names.items()}


def adapted(model: nn.Module) -> list[tuple[str, AdapterModule]]:
    """Every module of adapters on `model`, with the name of the base module behind it."""
    modules = base_modules(model).items()
    return [(name, wrapper) for name, module in modules for wrapper in adapter_modules(module)]


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the base module of that name, and its wrappers, by `module`."""
    parent, _, leaf = name.rpartition(".")
    setattr(plain(model.get_submodule(parent)), leaf, module)


def separate_embeddings(model: nn.Module) -> None:
    """Give each name of an embedding that stands in `model` under several a module of its own, with
    the same weight: resize_token_embeddings puts T5's `shared` in place of its stacks' own."""
    seen = set()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, nn.Embedding) and module in seen:
            put_module(model, name, shallow_copy(module))
        seen.add(module)


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Delete an adapter everywhere, and wrappers without another."""
    for _, wrapper in adapted(model):
        wrapper.remove_adapter(adapter_name)
    remove_wrappers(model, lambda w: isinstance(w, AdapterModule) and not w.adapters)


def remove_wrappers(model: nn.Module, is_unwanted: Callable[[Wrapper], bool]) -> None:
    """Remove some wrappers; the others keep their order."""
    for name, module in base_modules(model).items():
        present = list(wrappers(module))
        kept = [wrapper for wrapper in present if not is_unwanted(wrapper)]
        if len(kept) < len(present):
            outermost = plain(module)
            for wrapper in reversed(kept):
                wrapper.base_layer = outermost
                outermost = wrapper
            put_module(model, name, outermost)
