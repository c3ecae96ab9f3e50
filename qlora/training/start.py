"""`--adapter DIR`: a new run that starts from a saved adapter, of this library or of PEFT, with a
fresh optimizer and schedule.

The adapter's settings and the quantization that it records are those of the run: a flag that says
otherwise is refused, but for the dropout and the dtype, which are of training. The base is checked
by its fingerprint, if the adapter records one, and by the shapes of all layers.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora.adapters.apply import adapter_configs
from qlora.adapters.files import load_adapter
from qlora.adapters.format import read_adapter, without_rebase
from qlora.adapters.lora import LoRALayer, adapter_dtype
from qlora.adapters.wrappers import adapted
from qlora.base.modules import computes_in
from qlora.base.sharding import device_of
from qlora.config import LoraConfig, QuantConfig, TrainConfig, build
from qlora.config.lora import Settings
from qlora.errors import UserError, require
from qlora.ops.nf4 import DTYPES

OF_TRAINING = ("lora_dropout", "adapter_dtype", "compute_dtype", "allow_unquantized")


def with_settings_of_adapter(config: TrainConfig, recorded: Mapping[str, Any]) -> TrainConfig:
    """`config` with the settings of the adapter that it starts from, if any. A resumed run has
    those that run.yaml, `recorded`, has of its start: the adapter is not read again.

    Raises:
        UserError: a setting, or the task, differs from the adapter's; or its files are damaged.
    """
    if config.adapter is None:
        return config
    config = replace(config, adapter=str(Path(config.adapter).expanduser().absolute()))
    if recorded:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in recorded.items()}
        lora = replace(build(LoraConfig, values), **given(config.lora))
        quant = replace(build(QuantConfig, values), **given(config.quant))
        return replace(config, lora=lora, quant=quant)
    saved = without_rebase(read_adapter(str(config.adapter)))
    where = f"--adapter {saved.folder}"
    task = f"{where} was trained for task {saved.task}, not {config.task}: give --task {saved.task}"
    require(saved.task == config.task, task)
    quant = saved.quantization if saved.knows_quantization else config.quant
    names = [f.name for f in fields(quant) if f.name in OF_TRAINING]
    own: Any = {name: getattr(config.quant, name) for name in names}
    quant, differ = replace(quant, **own), dict[str, str]()
    for before, now in ((saved.config, config.lora), (quant, config.quant)):
        for name, value in given(now).items():
            if name not in OF_TRAINING and not _same(value, old := getattr(before, name)):
                differ[name] = f"{name} {old}, not {value}"
    if differ:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in differ)
        raise UserError(f"{where} has {'; '.join(differ.values())}: leave out {flags}")
    own = {name: value for name, value in given(config.lora).items() if name in OF_TRAINING}
    lora = replace(saved.config, **own)
    print(f"the run starts from the adapter in {saved.folder}, r {lora.r}, with a fresh optimizer")
    if not saved.base.get("fingerprint") and saved.base_model not in (None, config.model):
        print(f"it names {saved.base_model} as its base, not {config.model}: shapes are compared")
    return replace(config, lora=lora, quant=quant)


def given(settings: Settings) -> dict[str, Any]:
    """The values that are not the defaults."""
    default = type(settings)()
    names = [member.name for member in fields(default)]  # type: ignore[arg-type]
    values = {name: getattr(settings, name) for name in names}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def _same(one: Any, other: Any) -> bool:
    """Equal, or lists of the same names in any order."""
    are_lists = isinstance(one, tuple) and isinstance(other, tuple)
    return set(one) == set(other) if are_lists else bool(one == other)


def put_saved_adapter(model: PreTrainedModel, folder: str | Path, lora: LoraConfig) -> None:
    """Add the adapter in `folder` to `model`, to be trained with the dropout and in the dtype of
    `lora`. Raises UserError if it is of another base."""
    load_adapter(model, folder, trainable=True)
    in_full = torch.float32 if lora.adapter_dtype == "auto" else DTYPES[lora.adapter_dtype]
    for _, wrapper in adapted(model):
        is_lora, dtype = isinstance(wrapper, LoRALayer), in_full
        if is_lora:
            dtype = adapter_dtype(lora, device_of(wrapper.plain.weight), computes_in(wrapper.plain))
            if "default" in wrapper.dropout:
                wrapper.dropout["default"] = lora.lora_dropout
        for ending, parameter in wrapper.parameters_of("default").items():
            is_norm = is_lora and "magnitude" in ending
            parameter.data = parameter.data.to(torch.float32 if is_norm else dtype)
    configs = adapter_configs(model)
    own: Any = {"lora_dropout": lora.lora_dropout, "adapter_dtype": lora.adapter_dtype}
    configs["default"] = replace(configs["default"], **own)
