"""Add adapters to a model in place, choose the active ones, disable them, mix them in one batch.

The model keeps its class: `apply_lora` wraps each targeted layer, so Trainer, generate() and
everything else go on working. An error leaves the model as it was.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qlora.adapters import rebase, wrappers
from qlora.adapters.layers import LoRAExperts, LoRATiedHead, lora_class
from qlora.adapters.lora import LoRALayer, LoRALinear
from qlora.adapters.starts import eva_start
from qlora.adapters.targets import Targets, targets
from qlora.adapters.trained import TokenRows, TrainedModule
from qlora.base.modules import (
    followers,
    heads,
    state_of,
    task_of,
    tied_modules,
    use_codes_as_stored,
    vocabulary,
    was_conv1d,
)
from qlora.cli import Progress
from qlora.config import LoraConfig
from qlora.errors import did_you_mean, require
from qlora.ops.nf4 import DTYPES

Model = TypeVar("Model", bound=nn.Module)
WrapperKind = TypeVar("WrapperKind", bound=wrappers.AdapterModule)


def apply_lora(
    model: Model,
    config: LoraConfig | None = None,
    *,
    adapter_name: str = "default",
    generator: torch.Generator | None = None,
    data: Sequence[Any] | None = None,
) -> Model:
    """Freeze `model` and add a trainable, active adapter to its targeted layers, in place.

    The head of a classifier of texts or tokens is always trained in full as well. PiSSA, OLoRA and
    LoftQ read the weights from before quantization, and may change the base (adapters.rebase).

    Args:
        generator: of A's first values; by default torch's global one.
        data: for EVA, batches of input_ids and attention_mask (rows, length).

    Raises UserError if the config does not fit the model, the name is taken, or init_lora_weights
    needs something that is missing.
    """
    config, task = config or LoraConfig(), task_of(model)
    wrappers.separate_embeddings(model)
    if task is not None and task.trains_head:
        saved = dict.fromkeys([*config.modules_to_save, *heads(model)])  # as in PEFT
        config = replace(config, modules_to_save=tuple(saved))
    require_new_name(model, adapter_name)
    use_codes_as_stored(model)
    chosen = targets(model, config)
    state, asked = state_of(model), config.revision
    message = f"revision={asked!r}, and the base was loaded at {state.revision or 'its default'}"
    require(not state.quant or asked in (None, state.revision), f"{message}: leave it out")
    modules = [wrappers.plain(model.get_submodule(name)) for name in chosen.layers]
    is_transposed = any(map(was_conv1d, modules))
    order = "(in, out)" if is_transposed else "(out, in)"
    message = f"fan_in_fan_out={config.fan_in_fan_out}, and the targeted layers store {order}"
    require(config.fan_in_fan_out in (None, is_transposed), f"{message}: leave it out")
    require_only_biases(model, config.bias)
    layers = {name: config.of(name) for name in chosen.layers}
    rebase.check_start(model, layers)
    directions: dict[str, Tensor] = {}
    if config.init_lora_weights == "eva":
        with disable_adapter(model):
            config, directions = eva_start(model, config, layers, data)
        chosen = chosen._replace(layers=list(directions))
    with all_or_nothing(model, adapter_name):
        _add(model, config, chosen, adapter_name, generator)
        for name, lora_A in directions.items():
            wrap_layer(model, name).lora_A[adapter_name].data.copy_(lora_A)
        state.lora_configs[adapter_name] = config
        model.requires_grad_(False)
        set_adapter(model, adapter_name)
    return model


def _add(
    model: nn.Module,
    config: LoraConfig,
    chosen: Targets,
    adapter_name: str,
    generator: torch.Generator | None,
) -> None:
    dtype = torch.float32 if config.adapter_dtype == "auto" else DTYPES[config.adapter_dtype]
    for name, leaves in chosen.full_params.items():
        wrap(model, name, TrainedModule).add_adapter(adapter_name, leaves, dtype=dtype)
    slow = config.starts_from_weights  # a decomposition for each layer
    for name in Progress(chosen.layers, desc="Starting", disable=not slow):
        layer, own = wrap_layer(model, name), config.of(name)
        layer.add_adapter(adapter_name, own, generator=generator)
        if own.starts_from_weights:
            assert isinstance(layer, LoRALinear)  # check_start refuses others
            weight = rebase.original_weight(model, name)
            rebase.start_from_weights(layer, weight, adapter_name, own, generator)
    for name, leaves in chosen.parameters.items():
        configs = {leaf: config.of(f"{name}.{leaf}") for leaf in leaves}
        wrap(model, name, LoRAExperts).add_adapter(adapter_name, configs, generator=generator)
    for name, ids in chosen.rows.items():
        wrap(model, name, TokenRows).add_adapter(adapter_name, ids, dtype=dtype)
    wrap_followers(model, adapter_name)


@contextmanager
def all_or_nothing(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """If the block raises, the adapter is removed and the model is as it was."""
    trained = {p for p in model.parameters() if p.requires_grad}
    active = active_adapters(model)
    try:
        yield
    except BaseException:
        rebase.restore(model)
        wrappers.remove_adapter(model, adapter_name)
        adapter_configs(model).pop(adapter_name, None)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in trained)
        activate(model, active)
        raise


# ---- wrappers ----


def wrap_layer(model: nn.Module, name: str) -> LoRALayer:
    """The low-rank wrapper of the layer at `name`; a new one if there is none."""
    kind = lora_class(wrappers.plain(model.get_submodule(name)))
    assert kind is not None  # targets are layers that have one
    return wrap(model, name, kind)


def wrap_followers(model: nn.Module, adapter_name: str) -> None:
    """Wrap the modules that share the weight of an embedding of the adapter and follow it; but for
    token rows not those that it changes in another way."""
    adapted = [(n, w) for n, w in wrappers.adapted(model) if adapter_name in w.adapters]
    changed = {name for name, _ in adapted}
    modules = {name: wrappers.plain(m) for name, m in wrappers.base_modules(model).items()}
    tied = tied_modules(modules)
    for name, source in adapted:
        has_rows = isinstance(source, TokenRows)
        for peer in followers(model, modules, tied, name, rows=has_rows):
            if has_rows or peer not in changed:
                is_head = isinstance(source, LoRALayer) and lora_class(modules[peer]) is LoRALinear
                kind: Any = LoRATiedHead if is_head else type(source)
                wrap(model, peer, kind).follow(source, adapter_name)


def wrap(model: nn.Module, name: str, kind: type[WrapperKind]) -> WrapperKind:
    """The wrapper of that kind at `name`, or a new one: outermost; a TrainedModule innermost."""
    outermost = model.get_submodule(name)
    present = list(wrappers.wrappers(outermost))
    for wrapper in present:
        if isinstance(wrapper, kind):
            return wrapper
    is_innermost = kind is TrainedModule and present
    wrapper = kind(wrappers.plain(outermost) if is_innermost else outermost)
    wrapper.train(outermost.training)
    if is_innermost:
        present[-1].base_layer = wrapper
    else:
        wrappers.put_module(model, name, wrapper)
    model.resize_token_embeddings = MethodType(resize_token_embeddings, model)  # type: ignore[assignment]
    return wrapper


def resize_token_embeddings(model: Any, new_num_tokens: int | None = None, **options: Any) -> Any:
    """transformers' method for a model with adapters. It cannot replace a wrapped head, and would
    raise after it has replaced the embedding: UserError before."""
    modules = {name: model.get_submodule(name) for name in vocabulary(model) if name}
    wrapped = [name for name, module in modules.items() if isinstance(module, wrappers.Wrapper)]
    fix = "resize the vocabulary after load_base, before apply_lora and prepare_for_training"
    fault = f"{' and '.join(wrapped)} cannot be resized, as an adapter or the fast path wraps it"
    require(not wrapped or (new_num_tokens is None and not options), f"{fault}: {fix}")
    return type(model).resize_token_embeddings(model, new_num_tokens, **options)


# ---- names and configs ----


def require_new_name(model: nn.Module, adapter_name: str) -> None:
    """Refuse a name that is taken, or that cannot be a key of a ParameterDict and a folder."""
    is_key = re.fullmatch(r"[\w-]+", adapter_name) and not hasattr(nn.ParameterDict(), adapter_name)
    rule = "letters, digits, - and _, and no attribute of torch's ParameterDict"
    require(bool(is_key), f"adapter_name must be {rule}, got {adapter_name!r}")
    taken = f"the model already has an adapter {adapter_name!r}: choose another name"
    require(adapter_name not in adapter_configs(model), taken)
    rebase.require_unchanged_base(model, f"adapter {adapter_name!r}")


def adapter_configs(model: nn.Module) -> dict[str, LoraConfig]:
    """The LoraConfig of each adapter on `model`, by name."""
    return state_of(model).lora_configs


def known_adapters(model: nn.Module, adapter_name: str | Iterable[str]) -> tuple[str, ...]:
    """The names given, all of which must be adapters on the model."""
    names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
    known = adapter_configs(model)
    for name in names:
        present = f"{', '.join(known) or 'none'}.{did_you_mean(name, known)}"
        require(name in known, f"no adapter {name!r} on the model, which has: {present}")
    return names


def require_only_biases(model: nn.Module, bias: str) -> None:
    """Refuse a second adapter that trains biases."""
    for name, config in adapter_configs(model).items():
        message = f"adapter {name!r} trains biases already, and only one can: give bias='none', or"
        require("none" in (bias, config.bias), f"{message} delete that one")


# ---- which are active ----


def set_adapter(model: nn.Module, adapter_name: str | list[str]) -> None:
    """Make one adapter, or several whose changes add up, active and trainable, and no others.

    Raises UserError if one is unknown or named twice, or two train the same part in full.
    """
    names = known_adapters(model, adapter_name)
    require_one_owner(model, names)
    activate(model, names)
    for _, wrapper in wrappers.adapted(model):
        for name in wrapper.adapters:
            for parameter in wrapper.parameters_of(name).values():
                parameter.requires_grad_(name in names)


def activate(model: nn.Module, names: Sequence[str]) -> None:
    """Make these adapters active, and no others; in the order in which the model got them, as the
    last bits of a sum depend on it."""
    names = [name for name in adapter_configs(model) if name in names]
    for _, wrapper in wrappers.adapted(model):
        wrapper.active_adapters = tuple(name for name in names if name in wrapper.adapters)
    set_vocab_size(model)


def set_vocab_size(model: nn.Module) -> None:
    """Set config.vocab_size, by which a loss is computed, to the rows of the head with those that
    the active embedding has more than the base's."""
    (embedding, head), config = vocabulary(model), getattr(model, "config", None)
    if embedding is None or config is None:
        return
    for wrapper in wrappers.wrappers(model.get_submodule(embedding)):
        if isinstance(wrapper, TrainedModule):
            active = [wrapper.copies[name] for name in wrapper.active_adapters]
            weight = next((c["weight"] for c in active if "weight" in c), wrapper.plain.weight)
            rows = len(wrappers.plain(model.get_submodule(head or embedding)).weight)
            config.get_text_config().vocab_size = rows + len(weight) - len(wrapper.plain.weight)


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that are active, each once."""
    names = (name for _, wrapper in wrappers.adapted(model) for name in wrapper.active_adapters)
    return tuple(dict.fromkeys(names))


def require_one_owner(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse an adapter that is named twice, and two that change a part that one trains in full."""
    twice = ", ".join(repr(name) for name, count in Counter(names).items() if count > 1)
    require(not twice, f"{twice} is named twice: name each adapter once")
    for name, module in wrappers.base_modules(model).items():
        held = list(wrappers.adapter_modules(module))
        present = [(a, w) for a in names for w in held if a in w.adapters]
        owned = [(a, w) for a, w in present if isinstance(w, TrainedModule | TokenRows)]
        in_full = any(isinstance(w, TokenRows) or "weight" in w.copies[a] for a, w in owned)
        owners, users = {a for a, _ in owned}, dict.fromkeys(a for a, _ in present)
        both = f"adapters {' and '.join(map(repr, users))} cannot be active together"
        clash = len(owners) > 1 or (in_full and len(users) > 1)
        require(not clash, f"{both}: each has its own {name}")


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is its frozen base. One that was changed for its adapter has the
    subtracted part added back, in 16 bits."""
    active = active_adapters(model)
    try:
        activate(model, ())
        yield
    finally:
        activate(model, active)  # by name: the block may have added or deleted adapters


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str | None]) -> Iterator[None]:
    """Inside the block each row of a batch goes through its own adapter, or the base for None.

    The base computes all rows at once. The active adapters are ignored meanwhile. Raises UserError
    if an adapter is unknown or cannot be mixed by rows, or a batch has another number of rows.
    """
    names = known_adapters(model, [name for name in adapter_names if name is not None])
    rebase.require_unchanged_base(model, "mixed_batch")
    present = [wrapper for _, wrapper in wrappers.adapted(model)]
    for name in names:
        is_dora = adapter_configs(model)[name].use_dora
        require(not is_dora, f"adapter {name!r} is DoRA's, which cannot be mixed by rows")
        has_experts = any(isinstance(w, LoRAExperts) and name in w.adapters for w in present)
        require(not has_experts, f"adapter {name!r} changes experts, which cannot be mixed by rows")
    before = [wrapper.adapter_of_row for wrapper in present]
    try:
        for wrapper in present:
            wrapper.adapter_of_row = tuple(name or "" for name in adapter_names)
        yield
    finally:
        for wrapper, rows in zip(present, before, strict=True):
            wrapper.adapter_of_row = rows


# ---- how much is trained ----


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a 4-bit weight counts all of its values, not its bytes."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    states = [(p, getattr(p, "quant_state", None)) for p in model.parameters()]
    return trainable, sum(p.numel() if s is None else s.shape.numel() for p, s in states)


def print_trainable_parameters(model: nn.Module) -> None:
    """Print the trainable adapters by kind of layer, and in all, like

        layer        layers       out x in  rank    trainable
        q_proj           30      576 x 576    16      552,960
        norm              1             64     -           64

    and `trainable 4,884,480 of 139,399,488 parameters (3.50%)`. Without a rank: the shape of the
    first parameter.
    """
    rows: Counter[tuple[str, str, str, int]] = Counter()
    for name, wrapper in wrappers.adapted(model):
        for adapter in wrapper.active_adapters:
            parameters = [p for p in wrapper.parameters_of(adapter).values() if p.requires_grad]
            if parameters:
                is_lora = isinstance(wrapper, LoRALayer)
                rank = str(len(wrapper.lora_A[adapter])) if is_lora else "-"
                shape = " x ".join(map(str, wrapper.shape if is_lora else parameters[0].shape))
                size = sum(p.numel() for p in parameters)
                rows[name.rpartition(".")[2], shape, rank, size] += 1
    if rows:
        print(f"{'layer':24}{'layers':>7}{'out x in':>15}{'rank':>10}{'trainable':>14}")
    for (leaf, shape, rank, size), count in rows.items():
        print(f"{leaf:24}{count:7}{shape:>15}{rank:>10}{count * size:14,}")
    trainable, total = trainable_parameters(model)
    print(f"trainable {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
