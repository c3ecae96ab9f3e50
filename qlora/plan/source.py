"""What a plan knows of a model before anything large is downloaded: config.json, and the headers of
the safetensors files or their index, where there are any."""

import json
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from qlora.base.checkpoint import Checkpoint, model_config
from qlora.base.shards import INDEX, SINGLE
from qlora.config import QuantConfig, TrainConfig
from qlora.errors import UserError, first_line, require
from qlora.files import read_json

SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size", "head_dim", "max_position_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A model's config, how it is quantized, and the bytes of its files if they are known."""

    config: PreTrainedConfig
    quant: QuantConfig
    file_bytes: int | None
    longest: int | None
    """tokens of a row, if config.json limits them"""


def read_source(config: TrainConfig) -> Source:
    """The model that `config` names. Raises UserError for one that cannot be planned."""
    if Path(config.model).suffix == ".gguf":
        return _of_gguf(Path(config.model).expanduser(), config)
    folder = _folder(config)
    values = read_json(folder / "config.json")
    fault = f"{config.model}: config.json"
    require(isinstance(values, dict), f"{fault} is no JSON object")
    require_sizes(values, fault)
    require_sizes(values.get("text_config") or {}, fault)
    try:
        made = model_config(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # transformers has one for each damaged file
        message = f"{fault} is of no model that this transformers knows: {first_line(error)}"
        raise UserError(message) from error
    quant = _stored(values.get("quantization_config") or {}, config, Checkpoint(folder))
    vars(made).pop("quantization_config", None)
    size = _file_bytes(folder)
    return Source(made, quant, size, Checkpoint(folder).max_positions)


def _of_gguf(path: Path, config: TrainConfig) -> Source:
    """The model of a .gguf file, by its header. Training converts it to 16 bits and quantizes."""
    require(
        path.is_file(), f"model {path} does not exist: give a folder, a .gguf file or a hub name"
    )
    try:
        made = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # transformers passes on whatever its parser raises
        fix = "download it again, or give its safetensors checkpoint"
        fault = f"{path} cannot be read as a GGUF model ({first_line(error)}): {fix}"
        raise UserError(fault) from error
    longest = getattr(made, "max_position_embeddings", None)
    return Source(made, config.quant, path.stat().st_size, longest)


def _folder(config: TrainConfig) -> Path:
    """The folder with config.json, of a hub model in its cache."""
    folder = Path(config.model).expanduser()
    if folder.exists():
        known = (folder / "config.json").is_file()
        require(known, f"{folder} is no model: it holds no config.json. Give a folder with one")
        return folder
    is_hub_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.model)
    require(bool(is_hub_name), f"model {config.model} does not exist: give a folder or a hub name")
    import huggingface_hub as hub

    at: Any = {"repo_id": config.model, "revision": config.revision}
    with suppress(Exception):  # not in the cache
        return Path(hub.hf_hub_download(**at, filename="config.json", local_files_only=True)).parent
    try:
        # which fails at once without network; the download would try again for half a minute
        hub.get_hf_file_metadata(hub.hf_hub_url(**at, filename="config.json"))
        found = hub.hf_hub_download(**at, filename="config.json")
        with suppress(Exception):  # a model of one file has no index
            hub.hf_hub_download(**at, filename=INDEX)
    except Exception as error:  # offline, gated, misspelt: the hub has an error for each
        raise UserError(
            f"model {config.model} is no local folder and its config.json cannot be downloaded: "
            f"{first_line(error)} Check the name, the network, and that you are logged in if the "
            "model is gated"
        ) from error
    return Path(found).parent


def require_sizes(values: dict[str, Any], fault: str) -> None:
    """Refuse sizes that no model has."""
    for name in SIZES:
        size = values.get(name)
        each = size if isinstance(size, list) and name == "intermediate_size" else [size]  # a layer
        is_size = size is None or all(type(n) is int and n > 0 for n in each)
        require(is_size, f"{fault}: {name} must be a whole number above 0, got {size!r}")
    hidden, heads, keys = (
        values.get(n) for n in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    if heads and keys:
        message = f"num_attention_heads {heads} must be a multiple of num_key_value_heads {keys}"
        require(heads % keys == 0, f"{fault}: {message}")
    if hidden and heads and not values.get("head_dim") and "num_hidden_layers" in values:
        message = f"hidden_size {hidden} must be a multiple of num_attention_heads {heads}"
        require(hidden % heads == 0, f"{fault}: {message}")


def _stored(settings: dict[str, Any], config: TrainConfig, checkpoint: Checkpoint) -> QuantConfig:
    """How the model will be quantized: as asked, or as a 4-bit checkpoint already is."""
    if not any(settings.get(key) for key in ("quant_method", "load_in_4bit", "load_in_8bit")):
        return config.quant
    method = settings.get("quant_method") or "bitsandbytes"
    message = f"{config.model} is already quantized, with {method}: give its 16-bit model, or a "
    require(bool(settings.get("load_in_4bit")), message + "bitsandbytes 4-bit one")
    stored: dict[str, Any] = {"quant_type": settings.get("bnb_4bit_quant_type", "fp4")}
    stored["double_quant"] = bool(settings.get("bnb_4bit_use_double_quant"))
    skipped = settings.get("llm_int8_skip_modules") or ()
    stored["skip_modules"] = (*config.quant.skip_modules, *skipped)
    return replace(config.quant, **stored)


def _file_bytes(folder: Path) -> int | None:
    """The bytes of the weights on disk, of the files or by their index."""
    with suppress(OSError, json.JSONDecodeError, KeyError, TypeError, ValueError):
        if (folder / SINGLE).is_file():
            return (folder / SINGLE).stat().st_size
        return int(json.loads((folder / INDEX).read_text("utf-8"))["metadata"]["total_size"])
    return None
