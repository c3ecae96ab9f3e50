"""All that a LoraConfig changes of a model: layers (qlora.matching), and what else it names.

    modules_to_save          an ending of a module's name, be it of a word: norm is input_layernorm,
                             too
    bias                     the biases of all modules, or of the adapted layers
    trainable_token_indices  rows of the vocabulary, or of embeddings by an ending of their name
    target_parameters        an ending of a parameter's full name

By PEFT's rules; unlike in PEFT, each entry must mean something.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import nn

from qlora.adapter_module import base_modules, plain
from qlora.config import LoraConfig
from qlora.errors import UserError, did_you_mean
from qlora.frozen import is_quantized, vocabulary
from qlora.matching import leaves_of, matches, require_patterns, target_layers
from qlora.tasks import is_in


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
