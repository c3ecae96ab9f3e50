"""What stands in front of a module of the base: adapters by name, or a faster way to do the same.

The model keeps its class, and its other modules do not notice: a wrapper answers for the module
that it stands in front of. Wrappers stand on each other where a module is adapted in several ways.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlora.errors import UserError


class Wrapper(nn.Module):
    """A module that stands in front of one of the base, or of another wrapper.

    What it does not have itself, like `weight` or `embedding_dim`, is the base layer's: some models
    look.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer: Any = base_layer

    @property
    def plain(self) -> Any:
        """The base model's own module."""
        return plain(self.base_layer)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)


class AdapterModule(Wrapper):
    """A frozen module and, beside it, what named adapters change about it."""

    merged_adapters: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.active_adapters: tuple[str, ...] = ()
        self.adapter_of_row: tuple[str, ...] | None = None

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of those that change this module."""
        raise NotImplementedError

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of adapter `name`, by the ending of their names in adapter files."""
        raise NotImplementedError

    def remove_adapter(self, name: str) -> None:
        """Forget adapter `name`, if the module has it."""
        raise NotImplementedError

    def merge(self, names: Iterable[str]) -> None:
        """Be as fast as without these adapters, if that is to be had."""

    def unmerge(self) -> None:
        """Undo `merge`."""

    def fold(self, below: nn.Module, names: Iterable[str]) -> nn.Module:
        """`below`, a plain module that stands for the base layer, with these adapters in it."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "AdapterModule":
        """In training nothing is merged, as parameters are about to change."""
        if mode:
            self.unmerge()
        super().train(mode)
        return self

    def _rows_of(self, x: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Which rows of a batch x (rows, ...) go through which of its adapters."""
        if len(x) != len(names):
            raise UserError(
                f"{len(names)} adapter names for a batch whose layers see {len(x)} rows: give one "
                "name a row (a layer that sees tokens in another order, as experts do, cannot tell)"
            )
        return {
            name: torch.tensor([i for i, n in enumerate(names) if n == name], device=x.device)
            for name in dict.fromkeys(names)
            if name in self.adapters
        }


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the base, by the name it has there: itself, or the wrapper in front of it."""
    found: dict[str, nn.Module] = {}
    seen = set()

    def walk(name: str, module: nn.Module) -> None:
        if module in seen:
            return
        seen.add(module)
        found[name] = module
        for leaf, child in plain(module).named_children():
            walk(f"{name}.{leaf}".lstrip("."), child)

    walk("", model)
    return found


def plain(module: nn.Module) -> Any:
    """The base's own module behind any wrappers."""
    while isinstance(module, Wrapper):
        module = module.base_layer
    return module


def wrappers(module: nn.Module) -> Iterator[Wrapper]:
    """Those that stand in front of a module of the base, the outermost first."""
    while isinstance(module, Wrapper):
        yield module
        module = module.base_layer


def adapter_modules(module: nn.Module) -> Iterator[AdapterModule]:
    """Those of `wrappers` that hold adapters."""
    return (wrapper for wrapper in wrappers(module) if isinstance(wrapper, AdapterModule))


def adapted(model: nn.Module) -> list[tuple[str, AdapterModule]]:
    """Every module on `model` that holds adapters, by the name of the one behind it."""
    modules = base_modules(model).items()
    return [(name, found) for name, module in modules for found in adapter_modules(module)]


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """`module` in the place of the base's one of that name and whatever stands in front of it."""
    parent, _, leaf = name.rpartition(".")
    setattr(plain(model.get_submodule(parent)), leaf, module)


def take_off(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter everywhere, and the modules of adapters that have none left."""
    for _, wrapper in adapted(model):
        wrapper.remove_adapter(adapter_name)
    take_wrappers_off(model, lambda w: isinstance(w, AdapterModule) and not w.adapters)


def take_wrappers_off(model: nn.Module, is_unwanted: Callable[[Wrapper], bool]) -> None:
    """Leave the other wrappers, in their order."""
    for name, module in base_modules(model).items():
        there = list(wrappers(module))
        left = [w for w in there if not is_unwanted(w)]
        if len(left) < len(there):
            outermost = plain(module)
            for stays in reversed(left):
                stays.base_layer = outermost
                outermost = stays
            put_module(model, name, outermost)


def take_all_off(model: nn.Module) -> None:
    """Leave the base's own modules and nothing in front of them."""
    for name, module in base_modules(model).items():
        if isinstance(module, Wrapper):
            put_module(model, name, plain(module))
