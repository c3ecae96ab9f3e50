"""The layers, modules and parameters of a model that a LoraConfig names, by PEFT's rules.

    target_modules           a list matches whole endings of the dotted name; one string is a
                             regular expression over the full name; "all-linear" is every linear
                             layer but the output head, or a classifier's
    exclude_modules          the same, for those to leave out
    layers_to_transform      of what a list matches, the layers with these numbers: the first in the
                             name, or the first after one of layers_pattern
    modules_to_save          any ending: norm also means input_layernorm
    bias                     the biases of all modules, or of the adapted layers
    trainable_token_indices  rows of the vocabulary, or of embeddings by an ending of their name
    target_parameters        an ending of a parameter's full name

Unlike in PEFT, each entry must match something.
"""

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import product
from typing import NamedTuple

from torch import nn

from qlora.adapters.layers import lora_class
from qlora.adapters.wrappers import base_modules, plain
from qlora.base.modules import (
    heads,
    is_conv,
    is_in,
    is_linear,
    is_quantized,
    read_directly,
    vocabulary,
)
from qlora.config.lora import LoraConfig, pattern_key
from qlora.errors import UserError, did_you_mean, require, some

Modules = Mapping[str, nn.Module]
Rows = dict[str, tuple[int, ...]]


class Targets(NamedTuple):
    """What an adapter changes, by the names of modules, in the model's order."""

    layers: list[str]  # that get A and B
    parameters: dict[str, list[str]]  # of modules that are no layers: those that get A and B
    full_params: dict[str, list[str]]  # trained in full: all of a module's, or its bias
    rows: Rows  # of embeddings: the ids whose rows are trained


def targets(model: nn.Module, config: LoraConfig) -> Targets:
    """All that `config` names; each entry must match something that it can be used for."""
    saved, modules = saved_modules(model, config), base_modules(model)
    layers = [name for name in target_layers(model, config) if not is_in(name, saved)]
    has_any = layers or config.target_parameters
    require(bool(has_any), "modules_to_save leaves none of the layers that target_modules matches")
    embeddings = [name for name in layers if isinstance(plain(modules[name]), nn.Embedding)]
    why = f"{', '.join(embeddings)} is an embedding, which has no lora_bias"
    require(not (config.lora_bias and embeddings), f"{why}: leave one of them out")
    full = {n: _leaves(modules[n]) for n in modules if is_in(n, saved) and _leaves(modules[n])}
    if config.bias != "none":
        adapted_only = config.bias == "lora_only"
        candidates = layers if adapted_only else modules
        biased = [name for name in candidates if "bias" in _leaves(modules[name])]
        none = "no layer of target_modules" if adapted_only else "no module"
        require(biased != [], f"bias={config.bias} has nothing to train: {none} has a bias")
        full |= {name: ["bias"] for name in biased if name not in full}
    full = {name: full[name] for name in modules if name in full}
    rows = _token_rows(model, modules, config)
    twice = ", ".join(name for name in rows if name in layers or name in full)
    where = "adapted or trained in full, and in trainable_token_indices"
    require(not twice, f"{twice} is {where}: choose one")
    parameters = _target_parameters(modules, config)
    adapted = layers + [f"{name}.{leaf}" for name, own in parameters.items() for leaf in own]
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, field)
        used = [key for name in adapted if (key := pattern_key(pattern, name))]
        _hits(field, pattern, used, operator.eq, "adapted layer", adapted)
    return Targets(layers, parameters, full, rows)


def matches(name: str, target: str, *, is_regex: bool = False) -> bool:
    """Whether `target` is a whole ending of a name, or an expression that matches all of it."""
    return bool(re.fullmatch(target, name)) if is_regex else f".{name}".endswith(f".{target}")


def _hits(
    field: str,
    entries: Iterable[str],
    names: Iterable[str],
    is_hit: Callable[[str, str], bool],
    kind: str,
    known: Iterable[str],
) -> dict[str, list[str]]:
    """Those of `names` that each entry of a config's field matches: is_hit(name, entry). An entry
    without any is an error, which lists the last components of `known`."""
    hits = {entry: [name for name in names if is_hit(name, entry)] for entry in entries}
    if idle := [entry for entry, found in hits.items() if not found]:
        leaves = sorted({name.rpartition(".")[2] for name in known} - {""})
        near = did_you_mean(idle[0], [*leaves, *known])
        if re.fullmatch(r"[\w.]+([,;\s]+[\w.]+)+", idle[0]):
            near = " Put spaces between names, outside of quotes; in Python, give a list."
        matched = f"{field} {', '.join(map(repr, idle))} matches no {kind}.{near}"
        raise UserError(f"{matched} Choose from: {', '.join(leaves)}.")
    return hits


def target_layers(model: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the layers that get A and B, in the model's order."""
    modules = base_modules(model)
    own = {name: plain(module) for name, module in modules.items()}
    direct = read_directly(own)
    linear = [name for name, module in own.items() if is_linear(module) and name not in direct]

    def named(field: str) -> set[str]:
        entries = getattr(config, field)
        is_regex = isinstance(entries, str)
        entries = (entries,) if is_regex else entries
        is_hit = partial(matches, is_regex=is_regex)
        return set().union(*_hits(field, entries, modules, is_hit, "layer", linear).values())

    if config.targets_all_linear:
        excluded = heads(model)
        chosen = {name for name in linear if not is_in(name, excluded)}
        require(chosen != set(), "all-linear found no linear layer: name layers as target_modules")
    else:
        chosen = named("target_modules")
    if config.layers_to_transform:
        chosen = _in_layers(chosen, config)
    if config.exclude_modules:
        chosen -= named("exclude_modules")
        require(chosen != set(), "exclude_modules leaves none of the layers of target_modules")
    unused = some(sorted(direct & chosen))
    why = f"{unused}, whose weight the model reads past the layer: an adapter there has no effect"
    require(not unused, f"target_modules matches {why}. Leave it out with exclude_modules")
    layers = {name: module for name, module in own.items() if name in chosen}
    unfit = sorted(name for name, layer in layers.items() if lora_class(layer) is None)
    grouped = [name for name in unfit if is_conv(layers[name])]
    why = f"grouped convolutions, into which B A cannot be fused: {some(grouped)}"
    require(not grouped, f"target_modules matches {why}. Leave them out with exclude_modules")
    leaves = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
    why = f"modules that are no linear layer, convolution or embedding: {some(unfit)}"
    require(not unfit, f"target_modules matches {why}. This model's linear layers: {leaves}.")
    return list(layers)


def _in_layers(names: set[str], config: LoraConfig) -> set[str]:
    """Those of `names` in the layers of layers_to_transform, and those that are given in full."""
    patterns = [rf"(?:^|.*?\.){pattern}" for pattern in config.layers_pattern] or [r".*?\.[^.]*"]
    numbers: dict[str, int] = {}  # the first in a name, or the first after a pattern
    for pattern, name in product(patterns, names):
        if found := re.match(rf"{pattern}\.(?P<number>\d+)\.", name):
            numbers.setdefault(name, int(found["number"]))
    present = sorted({*numbers.values()})
    missing = ", ".join(str(n) for n in config.layers_to_transform if n not in present)
    known = f"{present[0]} to {present[-1]}" if present else "no numbers"
    known += f" after {' or '.join(config.layers_pattern)}" if config.layers_pattern else ""
    message = f"layers_to_transform {missing} matches no layer: the targets have {known}"
    require(not missing, message)
    chosen = {name for name, number in numbers.items() if number in config.layers_to_transform}
    return chosen | names.intersection(config.target_modules)


def saved_modules(model: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the modules that modules_to_save matches, without those inside another."""
    modules = base_modules(model)
    entries = config.modules_to_save
    hits = _hits("modules_to_save", entries, modules, str.endswith, "module", modules)
    matching = set().union(*hits.values())
    saved: list[str] = []
    for name, module in modules.items():
        if name in matching and not is_in(name, saved) and list(plain(module).parameters()):
            saved.append(name)
    asked = config.target_modules if isinstance(config.target_modules, tuple) else ()
    twice = ", ".join(t for t in asked if any(matches(name, t) for name in saved))
    require(not twice, f"{twice} is in target_modules and in modules_to_save: choose one")
    return saved


def _leaves(module: nn.Module) -> list[str]:
    """The names of a module's own parameters."""
    return [leaf for leaf, _ in plain(module).named_parameters(recurse=False)]


def _token_rows(model: nn.Module, modules: Modules, config: LoraConfig) -> Rows:
    """The ids of trainable_token_indices, by the names of embeddings."""
    asked = config.trainable_token_indices
    if not isinstance(asked, Mapping):
        name = vocabulary(model)[0]
        is_known = not asked or name is not None
        require(is_known, "trainable_token_indices: which embedding is meant? Give {NAME: ids}")
        asked = {str(name): asked} if asked else {}
    embeddings = [name for name, module in modules.items() if has_rows(plain(module))]
    kind = "embedding and no head in 16 or 32 bits"
    hits = _hits("trainable_token_indices", asked, embeddings, matches, kind, embeddings)
    rows = {name: tuple(asked[entry]) for entry, names in hits.items() for name in names}
    for name, ids in rows.items():
        size, most = len(plain(modules[name]).weight), max(ids)
        fix = "resize the embedding first, or drop it"
        require(most < size, f"trainable_token_indices {most}: {name} has {size} rows; {fix}")
    return rows


def has_rows(module: nn.Module) -> bool:
    """Whether a module's weight has a row for each token: an embedding's, or an output head's."""
    return isinstance(module, nn.Embedding | nn.Linear) and not is_quantized(module)


def _target_parameters(modules: Modules, config: LoraConfig) -> dict[str, list[str]]:
    """The parameters that target_parameters matches, by the names of their modules."""
    owned = [(name, leaf) for name, module in modules.items() for leaf in _leaves(module)]
    every = {f"{name}.{leaf}".lstrip("."): (name, leaf) for name, leaf in owned}
    hits = _hits("target_parameters", config.target_parameters, every, matches, "parameter", every)
    parameters: dict[str, list[str]] = {}
    for full in (full for names in hits.values() for full in names):
        name, leaf = every[full]
        module = plain(modules[name])
        is_matrix = not is_quantized(module) and getattr(module, leaf).ndim in (2, 3)
        why = "which is no matrix in 16 or 32 bits: adapt its layer with target_modules"
        require(is_matrix, f"target_parameters matches {full}, {why}")
        parameters.setdefault(name, []).append(leaf)
    return parameters
