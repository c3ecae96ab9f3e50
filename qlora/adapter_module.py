"""What every adapted module has: a frozen one of the base below it, and adapters by name.

The model keeps its class, and its other modules do not notice: a wrapper answers for the module
that it stands in front of. Wrappers stand on each other where a module is adapted in several ways.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlora.errors import UserError


class AdapterModule(nn.Module):
    """A frozen module and, beside it, what named adapters change about it.

    It can stand on another one (`plain` is below them all). What it does not have itself, like
    `weight` or `embedding_dim`, is the base layer's: some models look.
    """

    merged_adapters: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
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

    @property
    def plain(self) -> Any:
        """The base model's own module."""
        below = self.base_layer
        return below.plain if isinstance(below, AdapterModule) else below

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

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
    return module.plain if isinstance(module, AdapterModule) else module


def wrappers(module: nn.Module) -> Iterator[AdapterModule]:
    """Those that stand in front of a module of the base, the outermost first."""
    while isinstance(module, AdapterModule):
        yield module
        module = module.base_layer


def adapted(model: nn.Module) -> list[tuple[str, AdapterModule]]:
    """Every wrapper on `model`, by the name of the module behind it."""
    modules = base_modules(model).items()
    return [(name, wrapper) for name, module in modules for wrapper in wrappers(module)]


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """`module` in the place of the base's one of that name and whatever stands in front of it."""
    parent, _, leaf = name.rpartition(".")
    setattr(plain(model.get_submodule(parent)), leaf, module)


def take_off(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter everywhere, and wrappers that have none left."""
    for _, wrapper in adapted(model):
        wrapper.remove_adapter(adapter_name)
    for name, module in base_modules(model).items():
        left = [wrapper for wrapper in wrappers(module) if wrapper.adapters]
        if len(left) < len(list(wrappers(module))):
            below = plain(module)
            for wrapper in reversed(left):
                wrapper.base_layer = below
                below = wrapper
            put_module(model, name, below)
