"""A checkpoint on disk: resolve it, read its headers, read its tensors one at a time.

- `resolve`: a folder, hub name or .gguf file -> a folder with config.json and safetensors.
- `Checkpoint`: every tensor's name, dtype and shape from the headers; `read` reads one tensor.
- `skeleton`: the model on the meta device; `quantized_layers`: which of its layers become 4-bit.

A .gguf file is converted once to a bf16 safetensors folder in the cache ($QLORA_CACHE, by default
~/.cache/qlora): training quantizes those weights and the merge reads the same ones. Pickled
checkpoints (.bin, .pt) are never opened.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qlora.base.gguf import check_header
from qlora.base.inputs import read_config, read_record, why_not
from qlora.base.modules import (
    CASTS,
    auto_class,
    heads,
    is_in,
    is_linear,
    read_directly,
    tied_modules,
    was_conv1d,
)
from qlora.base.shards import DTYPE_CODES, INDEX, SINGLE
from qlora.config import QuantConfig
from qlora.config.tasks import CAUSAL_LM, Task
from qlora.errors import UserError, first_line, require
from qlora.files import publishing, read_json, read_stop_ids, require_inside
from qlora.ops.nf4 import RECORD_MARK

HUB_FILES = [
    "*.safetensors", "*.json", "*.model", "*.spm", "*.codes", "*.tiktoken", "*.txt", "*.py",
    "*.jinja",
]  # fmt: skip
# in folders are copies of the same weights, or chat templates
HUB_COPIES = [*(f"*/{name}" for name in HUB_FILES[:-1]), "consolidated*"]
# RoBERTa and related models number positions from the pad token's id + 1.
POSITIONS_AFTER_PAD = (
    "camembert", "data2vec-text", "esm", "ibert", "longformer", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
CONVERT = (  # transformers unpickles tensors and plain values only, torch.load's weights_only
    "convert them with: python -c 'from transformers import AutoModelForCausalLM as M; "
    'M.from_pretrained("{0}", dtype="auto").save_pretrained("{0}")\''
)
COPY_AGAIN = "download or copy it again"


def resolve(model: str, *, revision: str | None = None, weights: bool = True) -> Path:
    """The local folder with config.json and safetensors of a folder, .gguf file or hub name.

    Without `weights`, none are downloaded, and a folder may lack them and config.json.

    Raises:
        UserError: it does not exist, has no safetensors, or cannot be downloaded.
    """
    folder = Path(model).expanduser()
    if folder.suffix == ".gguf" and folder.is_file():
        return _convert_gguf(folder)
    if revision and folder.exists():
        raise UserError(f"--revision {revision} is for hub models, not for a local path: {model}")
    is_revision = revision is None or re.fullmatch(r"(?!.*\.\.)[\w./-]+", revision)
    require(bool(is_revision), f"revision must be a branch, tag or commit, got {revision!r}")
    is_hub_name = folder.suffix != ".gguf" and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model)
    if folder.is_file() or not (folder.exists() or is_hub_name):
        fault = "is a file" if folder.is_file() else "does not exist"
        raise UserError(f"model {model} {fault}: give a folder, a .gguf file or a hub name")
    if not folder.exists():
        from huggingface_hub import snapshot_download

        names = HUB_FILES[0 if weights else 1 :]
        patterns: Any = {"allow_patterns": names, "ignore_patterns": HUB_COPIES}
        try:
            folder = Path(snapshot_download(model, revision=revision, **patterns))
        except Exception as error:  # offline, gated, misspelt: the hub has an error for each
            raise UserError(
                f"model {model} is no local folder and cannot be downloaded: {first_line(error)} "
                "Check the name, the network, and that you are logged in if the model is gated"
            ) from error
    if not weights:
        return folder
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is no model: it holds no config.json. Give a folder with config.json and "
            "*.safetensors (for an adapter, its base model)"
        )
    if not any((folder / name).is_file() for name in (SINGLE, INDEX)):
        raise UserError(
            f"{folder} holds no {SINGLE} or {INDEX}. Pickled weights (.bin, .pt) are not opened: "
            f"{CONVERT.format(folder)}"
        )
    return folder


def _convert_gguf(path: Path) -> Path:
    """Its bf16 folder in the cache, named by a sha256 of its size and of 64 pieces of 64 KiB."""
    size, piece = path.stat().st_size, 1 << 16
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(64):
            file.seek(max(0, size - piece) * i // 63)
            digest.update(file.read(piece))
    cache = Path(os.environ.get("QLORA_CACHE", "~/.cache/qlora")).expanduser()
    folder = cache / f"{path.stem}-{digest.hexdigest()[:12]}"
    if any(folder.glob("*.safetensors")):
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source: Any = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    source["trust_remote_code"] = False
    with publishing(folder, shared=True) as partial:
        try:
            check_header(path)
            model = AutoModelForCausalLM.from_pretrained(
                **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
            )
            tokenizer = AutoTokenizer.from_pretrained(**source)
        except Exception as error:  # transformers passes on whatever its parser raises
            raise UserError(
                f"{path} cannot be read as a GGUF model ({type(error).__name__}: {error}): "
                "download it again, or give its safetensors checkpoint"
            ) from error
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return folder


class Header(NamedTuple):
    """A tensor as its file's header describes it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors, of which only headers are read; `read` reads one tensor."""

    folder: Path
    name: str = ""
    """the path or hub name given to `open`"""
    revision: str | None = None
    """of the hub repository"""

    @classmethod
    def open(cls, model: str, *, revision: str | None = None) -> "Checkpoint":
        """The checkpoint in `resolve(model)`."""
        folder = resolve(model, revision=revision)
        require_inside(folder)
        read_config(folder)
        read_stop_ids(folder)  # of a file that is no JSON object transformers has a traceback
        return cls(folder, model, revision)

    @property
    def origin(self) -> str:
        """The hub name or the absolute path that loads it again, from any working directory; for a
        .gguf file that of the converted folder."""
        is_hub_name = self.name and not Path(self.name).expanduser().exists()
        return str(self.name if is_hub_name else self.folder.absolute())

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_config(self.folder)

    @cached_property
    def tensors(self) -> dict[str, Header]:
        """Every tensor's header by name, in the order of the files."""
        names = [SINGLE]
        if not (self.folder / SINGLE).is_file():  # it comes first in transformers too
            index = self.folder / INDEX
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise UserError(f"{index} holds no weight_map: {COPY_AGAIN}")
            names = sorted(set(map(str, weight_map.values())))
            if outside := ", ".join(name for name in names if Path(name).name != name):
                raise UserError(f"{index} lists files outside its folder, do not use it: {outside}")
            if lacks := ", ".join(name for name in names if not (self.folder / name).is_file()):
                raise UserError(f"{self.folder} lacks {lacks}, listed in its index: {COPY_AGAIN}")
        headers: dict[str, Header] = {}
        for file in (self.folder / name for name in names):
            try:
                with safe_open(file, framework="pt") as shard:
                    for name in shard.keys():  # noqa: SIM118 (safe_open is no mapping)
                        entry = shard.get_slice(name)
                        dtype, shape = DTYPES[entry.get_dtype()], tuple(entry.get_shape())
                        headers[name] = Header(file, dtype, shape)
            except (SafetensorError, OSError) as error:
                fault = f"{file} is damaged or cut short ({error}): {COPY_AGAIN}"
                raise UserError(fault) from error
            except KeyError as error:
                fault = f"{file} holds a tensor of unknown dtype {error}: use a 16-bit checkpoint"
                raise UserError(fault) from error
        return headers

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU. The file is closed again, which releases its memory map."""
        file = self.tensors[name].file
        try:
            with safe_open(file, framework="pt") as shard:
                return torch.as_tensor(shard.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} can no longer be read: {error}") from error

    def record(self, name: str) -> dict[str, Tensor] | None:
        """The bitsandbytes record of the 4-bit weight `name`, or None if it is not quantized."""
        suffixes = [key[len(name) :] for key in self.tensors if key.startswith(f"{name}.")]
        if not any(suffix.startswith(RECORD_MARK) for suffix in suffixes):
            return None
        require(name in self.records, f"{self.folder} has no 4-bit weight {name}: {COPY_AGAIN}")
        return {"": self.read(name), **{s[1:]: self.read(name + s) for s in suffixes}}

    @cached_property
    def records(self) -> dict[str, dict[str, Any]]:
        """4-bit weight -> what its record tells: quant_type, blocksize, shape (out, in), and more.

        Raises:
            UserError: a record is damaged, or its tensors are not of the sizes that it tells.
        """
        marks = [name for name in self.tensors if RECORD_MARK in name]
        return {
            name: read_record(name, self.tensors, self.read(mark))
            for mark in marks
            for name in [mark.partition(RECORD_MARK)[0]]
        }

    @cached_property
    def _names(self) -> "WeakKeyDictionary[nn.Module, DiskNames]":
        return WeakKeyDictionary()

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names by id. transformers writes some for every model, LABEL_0 and LABEL_1."""
        names = self.config.get("id2label") or {}
        return tuple(names[i] for i in sorted(names, key=int))

    @property
    def vocab_size(self) -> int | None:
        """The rows of the model's embedding, if config.json tells."""
        return (self.config.get("text_config") or self.config).get("vocab_size")

    @property
    def max_positions(self) -> int | None:
        """The longest row that the model accepts, if config.json limits it."""
        text = self.config.get("text_config") or self.config
        if "relative_attention_num_buckets" in text:  # T5's n_positions limits nothing
            return None
        longest: int | None = text.get("max_position_embeddings") or text.get("n_positions")
        if longest and text.get("model_type") in POSITIONS_AFTER_PAD:
            longest -= (text.get("pad_token_id") or 0) + 1
        return longest

    @cached_property
    def is_quantized(self) -> bool:
        """Whether some of its weights are bitsandbytes 4-bit records."""
        return any(RECORD_MARK in name for name in self.tensors)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over name, shape and bf16 value of every vector that is not quantized.

        Norms and biases are small, differ between trained models, and are the same in a model and
        its 4-bit copies (except an fp32 model's copies in fp16, which round twice). Bases that
        differ in matrices alone have the same fingerprint.
        """
        digest = hashlib.sha256()
        for name, header in sorted(self.tensors.items()):
            if len(header.shape) == 1 and not re.search(r"\.(nested_)?(absmax|quant_)", name):
                value = self.read(name).to(torch.bfloat16)
                digest.update(f"{name}{header.shape}".encode())
                digest.update(value.view(torch.int16).numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class OriginalWeights:
    """A 4-bit model's linear weights from before quantization, read from disk on demand."""

    checkpoint: Checkpoint
    model: nn.Module  # its skeleton
    dtype: torch.dtype  # that loading casts to before it quantizes

    def shape(self, name: str) -> tuple[int, int] | None:
        """(out, in), or None if the checkpoint has no such weight."""
        place = disk_name(self.checkpoint, self.model, f"{name}.weight")
        if place is None:
            return None
        rows, columns = self.checkpoint.tensors[place].shape
        return (columns, rows) if was_conv1d(self.model.get_submodule(name)) else (rows, columns)

    def read(self, name: str) -> Tensor:
        """The weight (out, in) as it was quantized, on the CPU."""
        place = disk_name(self.checkpoint, self.model, f"{name}.weight")
        weight = self.checkpoint.read(str(place)).to(self.dtype)
        return weight.T if was_conv1d(self.model.get_submodule(name)) else weight


# ---- the model without weights ----


def model_config(
    folder: Path, *, labels: Sequence[str] = (), trust_remote_code: bool = False
) -> Any:
    """transformers' config of `folder`, with the class names `labels` if there are any. Raises
    UserError for a damaged one, and transformers' own errors."""
    from transformers import AutoConfig

    read_config(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    settings = getattr(config, "quantization_config", {})
    if not any((settings or {}).get(key) for key in ("quant_method", "load_in_4bit")):
        vars(config).pop("quantization_config", None)  # an empty one, which transformers refuses
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    return config


def skeleton(
    folder: Path,
    *,
    task: Task = CAUSAL_LM,
    labels: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model of `folder` on the meta device: names, shapes, no memory. UserError if unknown."""
    trusted: Any = {"trust_remote_code": trust_remote_code}
    try:
        config = model_config(folder, labels=labels, **trusted)
        with torch.device("meta"):
            model: nn.Module = auto_class(task).from_config(config, **trusted)
    except UserError:
        raise
    except Exception as error:  # a model's code has one for each setting
        raise UserError(
            f"{folder} is no {task.kind} that this transformers knows: {why_not(error)}"
        ) from error
    return model


def disk_name(checkpoint: Checkpoint, model: nn.Module, name: str) -> str | None:
    """The checkpoint's name of the parameter `name` of `model`, or None: it has none, or has the
    parameter in another form (`disk_names`)."""
    return disk_names(checkpoint, model).same.get(name)


def disk_names(checkpoint: Checkpoint, model: nn.Module) -> "DiskNames":
    """How the checkpoint names the parameters of `model`, by transformers' own mapping."""
    known = checkpoint._names
    if model not in known:
        known[model] = DiskNames.of(checkpoint, model)
    return known[model]


@dataclass(frozen=True)
class DiskNames:
    """Names of a model's parameters -> names on disk."""

    same: dict[str, str]  # of parameters that are a tensor on disk
    converted: dict[str, str]  # of those in another form, fused, split or transposed: one part
    renamings: list[Any]  # transformers', if it renames any

    @classmethod
    def of(cls, checkpoint: Checkpoint, model: Any) -> "DiskNames":
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            PrefixChange,
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        parameters, prefix = model.state_dict(), model.base_model_prefix
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        of_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        same: dict[str, str] = {}
        converted: dict[str, str] = {}
        for place in sorted(checkpoint.tensors, key=dot_natural_key):  # some depend on the order
            name, pattern = rename_source_key(place, renamings, converters, prefix, parameters)
            if name not in parameters and place in parameters:
                name, pattern = rename_source_key(place, [], [], prefix, parameters)
            if pattern is not None:
                first, *others = of_pattern[pattern].target_patterns
                for target in (first, *others):
                    converted.setdefault(name.replace(first, target), place)
            elif name in parameters:
                same.setdefault(name, place)
        used = [entry for entry in renamings if entry.was_used()]
        style = [e for e in renamings if e in used or not isinstance(e, PrefixChange)]
        return cls(same, converted, style if used else [])

    def new(self, name: str) -> str:
        """The name on disk that a parameter which the checkpoint lacks would have."""
        from transformers.core_model_loading import rename_source_key

        reverse = [entry.reverse_transform() for entry in reversed(self.renamings)]
        place, _ = rename_source_key(name, reverse, [], reverse=True)
        again, _ = rename_source_key(place, self.renamings, [])
        return place if again == name else name


def tied_on_disk(checkpoint: Checkpoint, model: nn.Module) -> list[list[str]]:
    """`tied_modules` of a skeleton, without those for which the checkpoint has another weight, as
    FLAN-T5 has a head of its own: transformers does not tie these."""
    groups = []
    for names in tied_modules(dict(model.named_modules())):
        places = {name: disk_name(checkpoint, model, f"{name}.weight") for name in names}
        present = dict.fromkeys(place for place in places.values() if place)
        first, *others = present or [""]
        other = {p for p in others if not torch.equal(checkpoint.read(p), checkpoint.read(first))}
        groups.append([name for name in names if places[name] not in other])
    return [names for names in groups if len(names) > 1]


def quantized_layers(model: nn.Module, quant: QuantConfig) -> dict[str, bool]:
    """The layers of `model` to quantize -> whether the weight is (in, out) on disk, a Conv1D's."""
    left_out, dense = heads(model), {*kept_dense(model), *not_as_linear(model)}
    return {
        name: was_conv1d(module)
        for name, module in linear_layers(model).items()
        if name not in dense
        and not is_in(name, left_out)
        and not is_skipped(name, quant.skip_modules)
    }


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every nn.Linear of any subclass and Conv1D of `model`, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or was_conv1d(m)}


def not_as_linear(model: nn.Module) -> list[str]:
    """Linear layers of which more than x W^T + b is used: neither quantized nor adapted."""
    direct = read_directly(dict(model.named_modules()))
    layers = linear_layers(model).items()
    return [name for name, layer in layers if name in direct or not is_linear(layer)]


def kept_dense(model: nn.Module) -> list[str]:
    """Linear layers that are never quantized: those kept in fp32, and those to whose dtype the
    model casts their input, which codes would turn into bytes."""
    cast, left_out = read_directly(dict(model.named_modules()), CASTS), heads(model)
    dense = {*kept_in_fp32(model), *(name for name in cast if not is_in(name, left_out))}
    return [name for name in linear_layers(model) if name in dense]


def kept_in_fp32(model: nn.Module) -> list[str]:
    """Linear layers that overflow in fp16, says transformers: T5's `wo`."""
    suffixes = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    return [name for name in linear_layers(model) if suffixes and name.endswith(suffixes)]


def fp32_names(model: Any, dtype: torch.dtype) -> set[str]:
    """The parameters and buffers that transformers keeps in fp32 in a model of `dtype`: of some in
    fp16 and bf16, such as the bias by which GLM-4 chooses experts, of others in fp16 alone."""
    globs = [re.compile(glob.replace("*", ".*")) for glob in model._get_dtype_plan(dtype)]
    return {name for name in model.state_dict() if any(glob.search(name) for glob in globs)}


def is_skipped(name: str, skip_modules: Iterable[str]) -> bool:
    """Whether one of the names is `name`, a suffix of it, or a module that contains it."""
    return any(f".{skip}." in f".{name}." for skip in skip_modules)
