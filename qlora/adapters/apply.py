"""What is done to a model: put an adapter on, choose which are active, look without it.

The model keeps its class: `apply_lora` puts a wrapper in front of each targeted layer in place, so
Trainer, generate() and everything else go on working. An error leaves the model as it was. Which
parts a config means is in qlora.adapters.targets.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from qlora.adapters.layers import LoRAExperts, lora_layer
from qlora.adapters.lora import LoRALayer, LoRALinear
from qlora.adapters.rebase import (
    check_start,
    original_weight,
    require_own_base,
    restore,
    start_from_weights,
)
from qlora.adapters.starts import eva_start
from qlora.adapters.targets import Targets, targets
from qlora.adapters.trained import TokenRows, TrainedModule
from qlora.adapters.wrappers import (
    AdapterModule,
    adapted,
    adapter_modules,
    base_modules,
    plain,
    put_module,
    take_off,
    wrappers,
)
from qlora.base.modules import heads, is_tied, state_of, task_of, vocabulary, was_conv1d
from qlora.config import LoraConfig
from qlora.errors import UserError, did_you_mean
from qlora.ops.nf4 import DTYPES

Model = TypeVar("Model", bound=nn.Module)
Kind = TypeVar("Kind", bound=AdapterModule)


def apply_lora(
    model: Model,
    config: LoraConfig | None = None,
    *,
    adapter_name: str = "default",
    generator: torch.Generator | None = None,
    data: Sequence[Any] | None = None,
) -> Model:
    """Freeze `model` and add a trainable, active adapter to its targeted layers, in place.

    The head of a classifier of texts or tokens is always trained in full beside it.

    PiSSA, OLoRA and LoftQ read the weights from before quantization, one at a time, from where
    load_base found them, and all but LoftQ of one round change the base: see qlora.adapters.rebase.

    Args:
        generator: of A's first values; by default torch's global one.
        data: what EVA looks at, batches of input_ids and attention_mask (rows, length).

    Raises:
        UserError: an entry of the config matches nothing or what it cannot mean, or contradicts
            the model, or the name is taken, or what init_lora_weights wants is not to be had.
    """
    config = _with_head(model, config or LoraConfig())
    require_new_name(model, adapter_name)
    found = targets(model, config)
    _require_agreement(model, config, found)
    require_only_biases(model, config.bias)
    layers = {name: config.of(name) for name in found.layers}
    check_start(model, layers)
    directions: dict[str, Tensor] = {}
    if config.init_lora_weights == "eva":
        with disable_adapter(model):
            config, directions = eva_start(model, config, layers, data)
        found = found._replace(layers=list(directions))
    with all_or_nothing(model, adapter_name):
        _add(model, config, found, adapter_name, generator)
        for name, lora_A in directions.items():
            wrap_layer(model, name).lora_A[adapter_name].data.copy_(lora_A)
        adapter_configs(model)[adapter_name] = config
        model.requires_grad_(False)
        set_adapter(model, adapter_name)
    return model


def _with_head(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The same with a classifier's head among what is trained in full, as in PEFT."""
    task = task_of(model)
    if task is None or not task.trains_head:
        return config
    return replace(
        config, modules_to_save=tuple({**dict.fromkeys(config.modules_to_save), **heads(model)})
    )


def _add(
    model: nn.Module,
    config: LoraConfig,
    found: Targets,
    adapter_name: str,
    generator: torch.Generator | None,
) -> None:
    dtype = torch.float32 if config.adapter_dtype == "auto" else DTYPES[config.adapter_dtype]
    for name, leaves in found.own.items():
        wrap(model, name, TrainedModule).add_adapter(adapter_name, leaves, dtype=dtype)
    slow = config.starts_from_weights  # a decomposition a layer
    for name in tqdm(found.layers, desc="Starting", leave=False, disable=not slow):
        layer, own = wrap_layer(model, name), config.of(name)
        layer.add_adapter(adapter_name, own, generator=generator)
        if own.starts_from_weights:
            assert isinstance(layer, LoRALinear)  # check_start saw to it
            weight = original_weight(model, name)
            start_from_weights(layer, weight, adapter_name, own, generator)
    for name, leaves in found.parameters.items():
        experts = wrap(model, name, LoRAExperts)
        configs = {leaf: config.of(f"{name}.{leaf}") for leaf in leaves}
        experts.add_adapter(adapter_name, configs, generator=generator)
    for name, ids in found.rows.items():
        wrap_rows(model, name).add_adapter(adapter_name, ids, dtype)


@contextmanager
def all_or_nothing(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """An error in the block leaves the model without the adapter, and else as it was."""
    trained = {p for p in model.parameters() if p.requires_grad}
    active = active_adapters(model)
    try:
        yield
    except BaseException:
        restore(model)
        take_off(model, adapter_name)
        adapter_configs(model).pop(adapter_name, None)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in trained)
        activate(model, active)
        raise


# ---- wrappers ----


def wrap_layer(model: nn.Module, name: str) -> LoRALayer:
    """The low-rank wrapper of the layer at `name`, put there if there is none."""
    return wrap(model, name, LoRALayer, lora_layer)


def wrap_rows(model: nn.Module, name: str) -> TokenRows:
    """The rows' wrapper of the embedding at `name`; a head that is tied to it gets one, too."""
    rows = wrap(model, name, TokenRows)
    embedding, head = vocabulary(model)
    if is_tied(model) and head and name == embedding:
        wrap(model, head, TokenRows, lambda below: TokenRows(below, tied_to=rows))
    return rows


def wrap(
    model: nn.Module,
    name: str,
    kind: type[Kind],
    make: Callable[[nn.Module], Kind] | None = None,
) -> Kind:
    """The wrapper of that kind at `name`, put there if there is none: a TrainedModule innermost,
    any other in front of those that stand there."""
    outermost = model.get_submodule(name)
    there = list(wrappers(outermost))
    for wrapper in there:
        if isinstance(wrapper, kind):
            return wrapper
    inside = kind is TrainedModule and there
    made = (make or kind)(plain(outermost) if inside else outermost)
    made.train(outermost.training)
    if inside:
        there[-1].base_layer = made
    else:
        put_module(model, name, made)
    return made


# ---- names and configs ----


def require_new_name(model: nn.Module, adapter_name: str) -> None:
    """Refuse a name that is taken, or cannot be a key of a ParameterDict and a folder's name."""
    if not re.fullmatch(r"[\w-]+", adapter_name) or hasattr(nn.ParameterDict(), adapter_name):
        raise UserError(
            f"adapter_name must be letters, digits, - and _, and no word that torch keeps for "
            f"itself, got {adapter_name!r}"
        )
    if adapter_name in adapter_configs(model):
        raise UserError(f"the model already has an adapter {adapter_name!r}: choose another name")
    require_own_base(model, f"adapter {adapter_name!r}")


def adapter_configs(model: nn.Module) -> dict[str, LoraConfig]:
    """The LoraConfig of each adapter on `model`, by name."""
    return state_of(model).lora_configs


def _require_agreement(model: nn.Module, config: LoraConfig, found: Targets) -> None:
    """Refuse what the config says of the base, if it is not so."""
    state = state_of(model)
    if config.revision is not None and state.quant and config.revision != state.revision:
        raise UserError(
            f"revision={config.revision!r}, and the base was loaded at "
            f"{state.revision or 'its default'}: leave it out, or load that one"
        )
    modules = base_modules(model)
    transposed = {name for name in found.layers if was_conv1d(plain(modules[name]))}
    if config.fan_in_fan_out is not None and config.fan_in_fan_out != bool(transposed):
        raise UserError(
            f"fan_in_fan_out={config.fan_in_fan_out}, and the targeted layers store "
            f"{'(in, out)' if transposed else '(out, in)'}: leave it out, it is seen from them"
        )


def require_only_biases(model: nn.Module, bias: str) -> None:
    """Refuse a second adapter that trains biases."""
    others = [name for name, config in adapter_configs(model).items() if config.bias != "none"]
    if bias != "none" and others:
        raise UserError(
            f"adapter {others[0]!r} trains biases already, and only one on a model can: give "
            "bias='none', or take that one off"
        )


# ---- which are active ----


def set_adapter(model: nn.Module, adapter_name: str | list[str]) -> None:
    """Make one adapter, or several whose changes add up, active and trainable; the rest rest.

    Raises:
        UserError: there is no such adapter, it is named twice, or two of them train the same part
            themselves.
    """
    names = known_adapters(model, adapter_name)
    require_one_owner(model, names)
    activate(model, names)
    for _, wrapper in adapted(model):
        for name in wrapper.adapters:
            for parameter in wrapper.parameters_of(name).values():
                parameter.requires_grad_(name in names)


def activate(model: nn.Module, names: Sequence[str]) -> None:
    """Let these adapters act, each where it is, and no other.

    They add up in the order they were put on in: the sum's last bits depend on it.
    """
    names = [name for name in adapter_configs(model) if name in names]
    for _, wrapper in adapted(model):
        wrapper.active_adapters = tuple(name for name in names if name in wrapper.adapters)


def require_one_owner(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse an adapter that is named twice, and two that train the same part themselves: it has
    one value."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{', '.join(map(repr, twice))} is named twice: name each adapter once")
    for name, module in base_modules(model).items():
        there = [w for w in wrappers(module) if isinstance(w, TrainedModule | TokenRows)]
        owners = dict.fromkeys(a for wrapper in there for a in names if a in wrapper.adapters)
        others = [a for a in names if any(a in w.adapters for w in adapter_modules(module))]
        is_whole = any(
            isinstance(w, TokenRows) or "weight" in w.parameters_of(a)
            for w in there
            for a in owners
            if a in w.adapters
        )
        if len(owners) > 1 or (is_whole and len(others) > 1):
            raise UserError(
                f"adapters {' and '.join(map(repr, others))} cannot be active "
                f"together: each has a {name} of its own"
            )


def known_adapters(model: nn.Module, adapter_name: str | Iterable[str]) -> tuple[str, ...]:
    """The names given, all of which must be those of adapters on the model."""
    names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
    known = adapter_configs(model)
    for name in names:
        if name not in known:
            raise UserError(
                f"no adapter {name!r} on the model, which has: {', '.join(known) or 'none'}."
                f"{did_you_mean(name, known)}"
            )
    return names


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that are active, each once."""
    names = (name for _, wrapper in adapted(model) for name in wrapper.active_adapters)
    return tuple(dict.fromkeys(names))


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is its frozen base.

    One that was changed for its adapter has what was taken out of it beside it, in 16 bits.
    """
    active = active_adapters(model)
    try:
        activate(model, ())
        yield
    finally:
        activate(model, active)  # by name: adapters may have come and gone in the block


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str | None]) -> Iterator[None]:
    """Inside the block each row of a batch goes through its own adapter, or the base for None.

    The base sees all rows at once. Which adapters are active does not matter meanwhile.

    Raises:
        UserError: there is no such adapter; in the block: a batch has another number of rows.
    """
    names = known_adapters(model, [name for name in adapter_names if name is not None])
    require_own_base(model, "mixed_batch")
    there = [wrapper for _, wrapper in adapted(model)]
    for name in dict.fromkeys(names):
        for wrapper in (w for w in there if name in w.adapters):
            if isinstance(wrapper, LoRALayer) and name in wrapper.lora_magnitude_vector:
                raise UserError(f"adapter {name!r} is DoRA's, which cannot be mixed by rows")
            if isinstance(wrapper, LoRAExperts):
                raise UserError(
                    f"adapter {name!r} changes experts, which do not see a batch row by row"
                )
    before = [wrapper.adapter_of_row for wrapper in there]
    try:
        for wrapper in there:
            wrapper.adapter_of_row = tuple(name or "" for name in adapter_names)
        yield
    finally:
        for wrapper, rows in zip(there, before, strict=True):
            wrapper.adapter_of_row = rows


# ---- what is trained ----


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a 4-bit weight counts all of its values, not its bytes."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        total += state.shape.numel() if state is not None else parameter.numel()
    return trainable, total


def print_trainable_parameters(model: nn.Module) -> None:
    """Print the trainable adapters by kind of layer, and in all, like

        layer        layers       out x in  rank    trainable
        q_proj           30      576 x 576    16      552,960

    and `trainable 4,884,480 of 139,399,488 parameters (3.50%)`.
    """
    found: Counter[tuple[str, str, str, int]] = Counter()
    for name, wrapper in adapted(model):
        for adapter in wrapper.active_adapters:
            own = wrapper.parameters_of(adapter).values()
            size = sum(p.numel() for p in own if p.requires_grad)
            if size:
                shape, rank = _what_is_trained(wrapper, adapter)
                found[name.rpartition(".")[2], shape, rank, size] += 1
    if found:
        print(f"{'layer':24}{'layers':>7}{'out x in':>15}{'rank':>10}{'trainable':>14}")
    for (kind, shape, rank, size), count in found.items():
        print(f"{kind:24}{count:7}{shape:>15}{rank:>10}{count * size:14,}")
    trainable, total = trainable_parameters(model)
    print(f"trainable {trainable:,} of {total:,} parameters ({trainable / total:.2%})")


def _what_is_trained(wrapper: AdapterModule, adapter: str) -> tuple[str, str]:
    """The shape of a module's weight, and the rank of its change, or what else it is."""
    parameters = wrapper.parameters_of(adapter)
    if isinstance(wrapper, LoRALayer):
        return " x ".join(map(str, wrapper.shape)), str(len(wrapper.lora_A[adapter]))
    if isinstance(wrapper, LoRAExperts):
        return f"{len(parameters) // 2} stacked", str(wrapper.rank(adapter))
    if isinstance(wrapper, TokenRows):
        return " x ".join(map(str, wrapper.plain.weight.shape)), f"{len(wrapper.ids[adapter])} rows"
    if "weight" not in parameters:
        return "", "bias"
    return " x ".join(map(str, parameters["weight"].shape)), "in full"
