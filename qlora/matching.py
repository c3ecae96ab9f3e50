"""Which layers a LoraConfig means, by PEFT's rules.

    target_modules       a list matches whole endings of the dotted name; one string is a regular
                         expression over the full name; "all-linear" is every linear layer but the
                         output head, or a classifier's
    exclude_modules      the same, for those to leave out
    layers_to_transform  of what a list matches, only the layers with these numbers, the first in
                         the name (after one of layers_pattern, where that is given)

Unlike in PEFT, each entry must match something.
"""

import re
from collections.abc import Collection, Iterable, Mapping

from torch import nn

from qlora.adapter_module import base_modules, plain
from qlora.errors import UserError, did_you_mean
from qlora.frozen import is_conv, is_linear
from qlora.lora_config import LoraConfig, pattern_key
from qlora.tasks import heads, is_in


def target_layers(model: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the layers that `config` means, in the model's order.

    Raises:
        UserError: an entry matches nothing, or only what is no layer that has an adapter.
    """
    modules = base_modules(model)
    linear = {n: m for n, m in modules.items() if is_linear(plain(m))}
    fitting = [n for n, m in modules.items() if takes_adapter(plain(m))]
    if config.targets_all_linear:
        left_out = heads(model)
        chosen = {name for name in linear if not is_in(name, left_out)}
        if not chosen:
            raise UserError(
                "all-linear found no linear layer in this model: name its layers as target_modules"
            )
    else:
        chosen = _hits("target_modules", config.target_modules, modules, linear)
    if config.layers_to_transform:
        chosen = _in_layers(chosen, config)
    if config.exclude_modules:
        chosen -= _hits("exclude_modules", config.exclude_modules, modules, linear)
        if not chosen:
            raise UserError("exclude_modules leaves none of the layers that target_modules means")
    _require_fitting(chosen, modules, linear)
    return [name for name in fitting if name in chosen]


def matches(name: str, target: str, *, is_regex: bool) -> bool:
    """A regular expression over the full name, or a whole ending of it."""
    if is_regex:
        return re.fullmatch(target, name) is not None
    return name == target or name.endswith(f".{target}")


def layer_number(name: str, patterns: Iterable[str]) -> int | None:
    """The number of the layer that `name` is in: the first, or the first after a pattern."""
    places = [rf"(?:^|.*?\.){pattern}" for pattern in patterns] or [r".*?\.[^.]*"]
    found = (re.match(rf"{place}\.(?P<number>\d+)\.", name) for place in places)
    first = next(filter(None, found), None)
    return int(first["number"]) if first else None


def _hits(
    field: str, targets: str | tuple[str, ...], names: Collection[str], linear: Collection[str]
) -> set[str]:
    """Which of `names` are meant; every target must mean some."""
    is_regex = isinstance(targets, str)
    entries = (targets,) if isinstance(targets, str) else targets
    if is_regex:
        _require_regex(field, entries[0])
    hits = {t: {n for n in names if matches(n, t, is_regex=is_regex)} for t in entries}
    missing = [target for target, found in hits.items() if not found]
    if missing:
        raise UserError(
            f"{field} {', '.join(map(repr, missing))} matches no layer."
            f"{did_you_mean(missing[0], leaves_of(linear))} This model has: "
            f"{', '.join(leaves_of(linear))}."
        )
    return set().union(*hits.values())


def _in_layers(names: set[str], config: LoraConfig) -> set[str]:
    """Those in the layers asked for, and those that are named in full."""
    in_full = names.intersection(config.target_modules)
    numbers = {name: layer_number(name, config.layers_pattern) for name in names}
    there = sorted({number for number in numbers.values() if number is not None})
    missing = [str(n) for n in config.layers_to_transform if n not in there]
    if missing:
        after = f" after {' or '.join(config.layers_pattern)}" if config.layers_pattern else ""
        known = f"numbers {there[0]} to {there[-1]}" if there else "no numbered layer"
        raise UserError(
            f"layers_to_transform {', '.join(missing)} matches no layer: among its targets this "
            f"model has {known}{after}"
        )
    chosen = {name for name, number in numbers.items() if number in config.layers_to_transform}
    return chosen | in_full


def _require_regex(field: str, target: str) -> None:
    try:
        re.compile(target)
    except re.error as error:
        raise UserError(
            f"{field} {target!r} is no regular expression ({error}); for name endings give a list"
        ) from error


def takes_adapter(layer: nn.Module) -> bool:
    """Whether a low-rank adapter fits a layer of the base."""
    if is_conv(layer):
        return int(layer.groups) == 1  # type: ignore[arg-type]
    return is_linear(layer) or isinstance(layer, nn.Embedding)


def _require_fitting(
    chosen: set[str], modules: Mapping[str, nn.Module], linear: Collection[str]
) -> None:
    other = sorted(name for name in chosen if not takes_adapter(plain(modules[name])))
    grouped = [name for name in other if is_conv(plain(modules[name]))]
    if grouped:
        raise UserError(
            f"target_modules matches grouped convolutions, whose change B A cannot be folded into "
            f"them: {', '.join(grouped[:5])}{' …' if len(grouped) > 5 else ''}. Leave them out "
            "with exclude_modules"
        )
    if other:
        raise UserError(
            f"target_modules matches what is no linear layer, convolution or embedding: "
            f"{', '.join(other[:5])}{' …' if len(other) > 5 else ''}. This model's linear layers: "
            f"{', '.join(leaves_of(linear))}."
        )


def require_patterns(config: LoraConfig, chosen: Collection[str]) -> None:
    """Every entry of rank_pattern and alpha_pattern must be that of some layer, or parameter."""
    for field, pattern in (("rank", config.rank_pattern), ("alpha", config.alpha_pattern)):
        used = {pattern_key(pattern, name) for name in chosen}
        idle = [key for key in pattern if key not in used]
        if idle:
            raise UserError(
                f"{field}_pattern {', '.join(map(repr, idle))} is that of no adapted layer."
                f"{did_you_mean(idle[0], leaves_of(chosen))} Adapted are: "
                f"{', '.join(leaves_of(chosen))}."
            )


def leaves_of(names: Iterable[str]) -> list[str]:
    """The last parts of these names, each once."""
    return sorted({name.rpartition(".")[2] for name in names})
