"""Which layers a LoraConfig means, by PEFT's rules.

    target_modules       a list matches whole endings of the dotted name; one string is a regular
                         expression over the full name; "all-linear" is every linear layer but the
                         output head, or a classifier's
    exclude_modules      the same, for those to leave out
    layers_to_transform  of what a list matches, only the layers with these numbers, the first in
                         the name (after one of layers_pattern, where that is given)

Unlike in PEFT, each entry must match something.

All that a LoraConfig changes of a model: layers (qlora.adapters.targets), and what else it names.

    modules_to_save          an ending of a module's name, be it of a word: norm is input_layernorm,
                             too
    bias                     the biases of all modules, or of the adapted layers
    trainable_token_indices  rows of the vocabulary, or of embeddings by an ending of their name
    target_parameters        an ending of a parameter's full name

By PEFT's rules; unlike in PEFT, each entry must mean something.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from torch import nn

from qlora.adapters.wrappers import base_modules, plain
from qlora.base.modules import heads, is_conv, is_in, is_linear, is_quantized, vocabulary
from qlora.config.lora import LoraConfig, pattern_key
from qlora.errors import UserError, did_you_mean


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


class Targets(NamedTuple):
    """What an adapter changes, by the names of modules, in the model's order."""

    layers: list[str]
    """that get A and B"""
    parameters: dict[str, list[str]]
    """of modules that are no layers: those that get A and B"""
    own: dict[str, list[str]]
    """parameters trained themselves: all of a module's, or its bias"""
    rows: dict[str, tuple[int, ...]]
    """of embeddings: the ids whose rows are trained"""


def targets(model: nn.Module, config: LoraConfig) -> Targets:
    """All that `config` means.

    Raises:
        UserError: an entry matches nothing, or nothing that it could mean.
    """
    saved = saved_modules(model, config)
    modules = base_modules(model)
    layers = [name for name in target_layers(model, config) if not is_in(name, saved)]
    if not layers and not config.target_parameters:
        raise UserError("modules_to_save leaves none of the layers that target_modules means")
    embeddings = [name for name in layers if isinstance(plain(modules[name]), nn.Embedding)]
    if config.lora_bias and embeddings:
        raise UserError(
            f"lora_bias is a bias of B, and {', '.join(embeddings)} is an embedding, whose B has "
            "none: leave one of them out"
        )
    own = {
        name: leaves
        for name in modules
        if is_in(name, saved) and (leaves := _parameters_of(modules[name]))
    }
    for name in _with_bias(modules, layers, config):
        own.setdefault(name, ["bias"])
    own = {name: own[name] for name in modules if name in own}
    rows = _rows(model, modules, config)
    twice = [name for name in rows if name in layers or name in own]
    if twice:
        raise UserError(
            f"{', '.join(twice)} is adapted or trained as a whole, and in trainable_token_indices: "
            "choose one"
        )
    parameters = _parameters(modules, config)
    require_patterns(
        config, [*layers, *(f"{n}.{leaf}" for n in parameters for leaf in parameters[n])]
    )
    return Targets(layers, parameters, own, rows)


def saved_modules(model: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the modules that modules_to_save means, without those inside another."""
    modules = base_modules(model)
    found: list[str] = []
    for name, module in modules.items():
        hit = any(name.endswith(entry) for entry in config.modules_to_save)
        if hit and not is_in(name, found) and any(True for _ in plain(module).parameters()):
            found.append(name)
    idle = [e for e in config.modules_to_save if not any(n.endswith(e) for n in modules)]
    if idle:
        names = leaves_of(modules)
        raise UserError(
            f"modules_to_save {', '.join(map(repr, idle))} matches no module."
            f"{did_you_mean(idle[0], names)} This model has: {', '.join(filter(None, names))}."
        )
    asked = config.target_modules if isinstance(config.target_modules, tuple) else ()
    twice = [t for t in asked if any(matches(name, t, is_regex=False) for name in found)]
    if twice:
        raise UserError(
            f"{', '.join(twice)} is in target_modules and in modules_to_save: choose one of the two"
        )
    return found


def _parameters_of(module: nn.Module) -> list[str]:
    return [leaf for leaf, _ in plain(module).named_parameters(recurse=False)]


def _with_bias(
    modules: Mapping[str, nn.Module], layers: Collection[str], config: LoraConfig
) -> list[str]:
    """The modules whose bias is trained."""
    if config.bias == "none":
        return []
    asked = layers if config.bias == "lora_only" else modules
    found = [name for name in asked if "bias" in _parameters_of(modules[name])]
    if not found:
        of = "layers that target_modules means" if config.bias == "lora_only" else "model"
        raise UserError(f"bias={config.bias} has nothing to train: the {of} has no bias")
    return found


def _rows(
    model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig
) -> dict[str, tuple[int, ...]]:
    """The rows that trainable_token_indices means, by the names of embeddings."""
    asked = config.trainable_token_indices
    if not isinstance(asked, Mapping):
        name = vocabulary(model)[0]
        if asked and name is None:
            raise UserError(
                "trainable_token_indices is a list, and this model does not say which embedding is "
                "its vocabulary: give {NAME: ids}"
            )
        asked = {str(name): asked} if asked else {}
    found: dict[str, tuple[int, ...]] = {}
    embeddings = [name for name, m in modules.items() if has_rows(plain(m))]
    for entry, ids in asked.items():
        names = [name for name in embeddings if matches(name, entry, is_regex=False)]
        if not names:
            raise UserError(
                f"trainable_token_indices {entry!r} matches no embedding and no head in 16 or 32 "
                f"bits. This model has: {', '.join(embeddings)}."
            )
        for name in names:
            size = len(plain(modules[name]).weight)
            if max(ids) >= size:
                raise UserError(
                    f"trainable_token_indices has {max(ids)}, and {name} has {size} rows: resize "
                    "the model's embedding first, or drop it"
                )
            found[name] = tuple(ids)
    return found


def has_rows(module: nn.Module) -> bool:
    """Whether a module's weight has a row for each token: an embedding's, or an output head's."""
    is_plain = isinstance(module, nn.Linear) and not is_quantized(module)
    return isinstance(module, nn.Embedding) or is_plain


def _parameters(modules: Mapping[str, nn.Module], config: LoraConfig) -> dict[str, list[str]]:
    """The parameters that target_parameters means, by the names of their modules."""
    every = {
        f"{name}.{leaf}".lstrip("."): (name, leaf)
        for name, module in modules.items()
        for leaf in _parameters_of(module)
    }
    found: dict[str, list[str]] = {}
    for entry in config.target_parameters:
        hits = [full for full in every if matches(full, entry, is_regex=False)]
        if not hits:
            raise UserError(
                f"target_parameters {entry!r} matches no parameter."
                f"{did_you_mean(entry, [*every, *leaves_of(every)])} They are named like "
                f"{', '.join(list(every)[-2:])}."
            )
        for full in hits:
            name, leaf = every[full]
            module = plain(modules[name])
            if is_quantized(module) or getattr(module, leaf).ndim not in (2, 3):
                raise UserError(
                    f"target_parameters {entry!r} means {full}, which is no matrix in 16 or 32 "
                    "bits: adapt its layer with target_modules"
                )
            found.setdefault(name, []).append(leaf)
    return found
