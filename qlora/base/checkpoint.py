"""A checkpoint on disk: resolve it, read its headers, read its tensors one at a time.

- `resolve`: a folder, hub name or .gguf file -> a folder with config.json and safetensors.
- `Checkpoint`: every tensor's name, dtype and shape from the headers; `read` reads one tensor.
- `skeleton`: its model without weights, which says which tensors are linear layers.

A .gguf file is converted once to a bf16 safetensors folder in the cache ($QLORA_CACHE, by default
~/.cache/qlora): training quantizes those weights and the merge reads the same ones.

Pickled checkpoints (.bin, .pt) are never opened.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qlora.base.modules import auto_class, heads, is_in, is_linear, was_conv1d
from qlora.base.shards import DTYPE_CODES, INDEX, SINGLE
from qlora.config import QuantConfig
from qlora.config.tasks import task_named
from qlora.errors import UserError, first_line
from qlora.files import publishing, read_json
from qlora.ops.nf4 import RECORD_MARK

HUB_FILES = "safetensors json jinja model tiktoken txt py"
# RoBERTa and related models number positions from the pad token's id + 1.
POSITIONS_AFTER_PAD = (
    "camembert", "data2vec-text", "esm", "ibert", "longformer", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
AGAIN = "download or copy it again"


# ---- resolve ----


def resolve(model: str, *, revision: str | None = None) -> Path:
    """The local folder that holds `model`'s config.json and safetensors.

    Args:
        model: a local folder, a .gguf file, or a hub name such as `owner/name`.

    Raises:
        UserError: nothing is there, it holds no safetensors, or the hub does not answer.
    """
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _convert_gguf(path)
    if revision and path.exists():
        raise UserError(
            f"--revision {revision} is for hub models, {model} is a local path: drop it"
        )
    if path.is_dir():
        return _model_folder(path)
    if path.exists():
        raise UserError(
            f"model {model} is a file: wanted a folder with config.json and *.safetensors, "
            "a .gguf file, or a hub name"
        )
    if path.suffix == ".gguf" or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise UserError(f"model {model} does not exist: give a folder, a .gguf file or a hub name")
    return _from_hub(model, revision)


def _model_folder(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} is no model: it holds no config.json. Wanted a folder with config.json and "
            "*.safetensors (for an adapter, give its base model)"
        )
    if not any((path / name).is_file() for name in (SINGLE, INDEX)):
        raise UserError(
            f"{path} holds no {SINGLE} or {INDEX}. Pickled weights (.bin, .pt) are not opened: "
            "save the model as safetensors first (save_pretrained does)"
        )
    return path


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=[f"*.{kind}" for kind in HUB_FILES.split()],
            ignore_patterns=["*/*", "consolidated*"],  # copies of the same weights
        )
    except Exception as error:  # offline, gated, misspelt: the hub has an error for each
        raise UserError(
            f"model {name} is no local folder, and the hub did not give it: {first_line(error)} "
            "Check the name, the network, and that you are logged in if it is gated"
        ) from error
    return _model_folder(Path(folder))


def cache_folder() -> Path:
    """The folder of converted checkpoints: $QLORA_CACHE, by default ~/.cache/qlora."""
    return Path(os.environ.get("QLORA_CACHE", "~/.cache/qlora")).expanduser()


def _convert_gguf(path: Path) -> Path:
    """The bf16 safetensors folder of a .gguf file, converted once; recognised by samples of it."""
    folder = cache_folder() / f"{path.stem}-{_sampled_digest(path)[:12]}"
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with publishing(folder) as partial:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except Exception as error:  # transformers passes on whatever its parser raises
            raise UserError(
                f"{path} cannot be read as a GGUF model ({type(error).__name__}: {error}). "
                "Download it again, or give the safetensors checkpoint it was made from"
            ) from error
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return folder


def _sampled_digest(path: Path) -> str:
    """sha256 of the size and of 64 pieces spread over the file, which differ between models."""
    size, piece = path.stat().st_size, 1 << 16
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(64):
            file.seek(max(0, size - piece) * i // 63)
            digest.update(file.read(piece))
    return digest.hexdigest()


# ---- read ----


class Header(NamedTuple):
    """A tensor as its file's header describes it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors, known from its headers; `read` reads one tensor."""

    folder: Path
    name: str = ""
    """the path or hub name it was opened by, if that is not the folder"""
    revision: str | None = None
    """of the hub repository"""

    @classmethod
    def open(cls, model: "str | Checkpoint", *, revision: str | None = None) -> "Checkpoint":
        """The checkpoint that `resolve` finds for `model`; an opened one is returned as it is."""
        if isinstance(model, Checkpoint):
            return model
        return cls(resolve(model, revision=revision), model, revision)

    @property
    def origin(self) -> str:
        """The name to load it by again; for a .gguf file the folder of its converted weights."""
        return self.name if self.name and not self.name.endswith(".gguf") else str(self.folder)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return read_json(self.folder / "config.json")

    @cached_property
    def tensors(self) -> dict[str, Header]:
        """Every tensor's header by name, in the order of the files."""
        headers: dict[str, Header] = {}
        for file in self._files():
            try:
                with safe_open(file, framework="pt") as shard:
                    for name in shard.keys():  # noqa: SIM118 (safe_open is no mapping)
                        entry = shard.get_slice(name)
                        dtype, shape = DTYPES[entry.get_dtype()], tuple(entry.get_shape())
                        headers[name] = Header(file, dtype, shape)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} is damaged or cut short ({error}): {AGAIN}") from error
            except KeyError as error:
                raise UserError(
                    f"{file} holds a tensor of unknown dtype {error}: give a 16-bit checkpoint"
                ) from error
        return headers

    def _files(self) -> list[Path]:
        if (self.folder / SINGLE).is_file():  # first, as in transformers
            return [self.folder / SINGLE]
        index = self.folder / INDEX
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index} holds no weight_map: {AGAIN}")
        names = sorted(set(map(str, weight_map.values())))
        if outside := [name for name in names if Path(name).name != name]:
            raise UserError(
                f"{index} names files outside its folder: {', '.join(outside)}. "
                "Do not use a checkpoint that does"
            )
        if missing := [name for name in names if not (self.folder / name).is_file()]:
            raise UserError(
                f"{self.folder} lacks {', '.join(missing)}, which its index names: {AGAIN}"
            )
        return [self.folder / name for name in names]

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU. The file is closed again, which lets its pages go."""
        file = self.tensors[name].file
        try:
            with safe_open(file, framework="pt") as shard:
                return torch.as_tensor(shard.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file} can no longer be read ({error}): is it still there?"
            ) from error

    def record(self, name: str) -> dict[str, Tensor] | None:
        """The bitsandbytes record of the 4-bit weight `name`, or None if it is not quantized."""
        suffixes = [key[len(name) :] for key in self.tensors if key.startswith(f"{name}.")]
        if not any(suffix.startswith(RECORD_MARK) for suffix in suffixes):
            return None
        return {"": self.read(name), **{s[1:]: self.read(name + s) for s in suffixes}}

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names by id, which every config.json has, also that of a language model."""
        names = self.config.get("id2label") or {}
        return tuple(names[i] for i in sorted(names, key=int))

    @property
    def max_positions(self) -> int | None:
        """The longest row that the model takes, if config.json limits it."""
        text = self.config.get("text_config") or self.config
        if "relative_attention_num_buckets" in text:  # T5's n_positions limits nothing
            return None
        names = ("max_position_embeddings", "n_positions")
        longest = next((text[name] for name in names if text.get(name)), None)
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
    """The weights of a 4-bit model's linear layers from before quantization, by layer name; read
    from the checkpoint on demand."""

    checkpoint: Checkpoint
    names: Mapping[str, str]
    """layer -> the checkpoint's name of its weight"""
    transposed: frozenset[str]
    """layers whose weight the checkpoint stores as (in, out)"""
    dtype: torch.dtype

    @classmethod
    def of(cls, checkpoint: Checkpoint, model: nn.Module, dtype: torch.dtype) -> "OriginalWeights":
        """Those of all linear layers of `model`, which is made of `checkpoint`."""
        layers = linear_layers(model)
        names = {name: disk_name(checkpoint, model, f"{name}.weight") for name in layers}
        transposed = frozenset(name for name, layer in layers.items() if was_conv1d(layer))
        return cls(checkpoint, {k: v for k, v in names.items() if v}, transposed, dtype)

    def shape(self, name: str) -> tuple[int, int] | None:
        """(out, in), or None if the checkpoint has no such weight."""
        if name not in self.names:
            return None
        shape = self.checkpoint.tensors[self.names[name]].shape
        return (shape[1], shape[0]) if name in self.transposed else (shape[0], shape[1])

    def read(self, name: str) -> Tensor:
        """The weight (out, in) as loading casts it before quantization, on the CPU."""
        weight = self.checkpoint.read(self.names[name]).to(self.dtype)
        return weight.T if name in self.transposed else weight


# ---- the model without weights ----


@contextmanager
def _naming_the_model(folder: Path, task: str) -> Iterator[None]:
    """Turns transformers' errors about an unknown model into a UserError."""
    try:
        yield
    except (ValueError, KeyError, OSError) as error:
        kind = task_named(task).kind
        raise UserError(
            f"{folder} is no {kind} that this transformers knows: {first_line(error)}"
        ) from error


def model_config(
    folder: Path,
    *,
    task: str = "causal-lm",
    labels: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> Any:
    """config.json of `folder` as transformers reads it, with these class names if any are given."""
    from transformers import AutoConfig

    with _naming_the_model(folder, task):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    return config


def skeleton(
    folder: Path,
    *,
    task: str = "causal-lm",
    labels: Sequence[str] = (),
    trust_remote_code: bool = False,
    config: Any = None,
) -> nn.Module:
    """The model of `folder` for a task on the meta device: names and shapes, no memory.

    Args:
        config: what `model_config` returned, if it was called; transformers modifies it.
    """
    trusted: Any = {"trust_remote_code": trust_remote_code}
    config = config or model_config(folder, task=task, labels=labels, **trusted)
    with _naming_the_model(folder, task), torch.device("meta"):
        model: nn.Module = auto_class(task_named(task)).from_config(config, **trusted)
    return model


def disk_name(checkpoint: Checkpoint, model: nn.Module, name: str) -> str | None:
    """The checkpoint's name of the parameter `name` of `model`, or None.

    The two differ where the checkpoint was saved from the model without its head (as the first
    GPT-2 files).
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    candidates = (name, name.removeprefix(prefix), prefix + name)
    return next((c for c in candidates if c in checkpoint.tensors), None)


def quantized_layers(model: nn.Module, quant: QuantConfig) -> dict[str, bool]:
    """Layers of the skeleton `model` to be quantized; True where the weight is (in, out) on disk.

    Every nn.Linear and GPT-2's Conv1D, except output heads, `quant.skip_modules`, and layers that
    transformers never quantizes.
    """
    left_out, dense = heads(model), kept_dense(model)
    return {
        name: was_conv1d(module)
        for name, module in linear_layers(model).items()
        if (type(module) is nn.Linear or was_conv1d(module))
        and name not in dense
        and not is_in(name, left_out)
        and not is_skipped(name, quant.skip_modules)
    }


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every nn.Linear and Conv1D of `model`, by name."""
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def kept_dense(model: nn.Module) -> list[str]:
    """Linear layers that transformers never quantizes because model code reads their dtype: T5's
    `wo`, which overflows in fp16."""
    suffixes = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    return [name for name in linear_layers(model) if suffixes and name.endswith(suffixes)]


def is_skipped(name: str, skip_modules: Iterable[str]) -> bool:
    """Whether one of the names is `name`, a suffix of it, or a module that contains it."""
    return any(f".{skip}." in f".{name}." for skip in skip_modules)
