"""A checkpoint on disk: find it, know it from its headers, read its tensors one at a time.

`resolve` turns what a user types (folder, hub name, .gguf file) into a folder with config.json and
safetensors. `Checkpoint` knows every tensor's name, dtype and shape from the headers alone and
reads one tensor when asked. `skeleton` is the model made of it, without its weights: it tells which
tensors are linear layers.

A .gguf file is converted once to a bf16 safetensors folder in the cache ($QLORA_CACHE, by default
~/.cache/qlora): training quantizes it from there and the merge reads the same weights again.

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

from qlora.base.modules import auto_class, heads, is_in
from qlora.base.shards import DTYPE_CODES, INDEX, SINGLE
from qlora.config import QuantConfig
from qlora.config.tasks import task_named
from qlora.errors import UserError, first_line
from qlora.files import publishing, read_json
from qlora.ops.nf4 import RECORD_MARK

HUB_FILES = "safetensors json jinja model tiktoken txt py"
# RoBERTa and its kin number positions from the pad's id + 1 on.
POSITIONS_AFTER_PAD = (
    "camembert", "data2vec-text", "esm", "ibert", "longformer", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


# ---- finding it ----


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
            ignore_patterns=["*/*", "consolidated*"],  # the same weights once more
        )
    except Exception as error:  # offline, gated, misspelt: the hub has an error for each
        raise UserError(
            f"model {name} is no local folder, and the hub did not give it: {first_line(error)} "
            "Check the name, the network, and that you are logged in if it is gated"
        ) from error
    return _model_folder(Path(folder))


def cache_folder() -> Path:
    """Where converted checkpoints live: $QLORA_CACHE, by default ~/.cache/qlora."""
    return Path(os.environ.get("QLORA_CACHE", "~/.cache/qlora")).expanduser()


def _convert_gguf(path: Path) -> Path:
    """The bf16 safetensors folder of a .gguf file; made once, recognised by samples of it."""
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
        except Exception as error:  # transformers raises what its parser meets: show it in one line
            raise UserError(
                f"{path} cannot be read as a GGUF model ({type(error).__name__}: {error}). "
                "Download it again, or give the safetensors checkpoint it was made from"
            ) from error
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return folder


def _sampled_digest(path: Path) -> str:
    """sha256 over the size and 64 pieces spread over the file: another model has other pieces."""
    size, piece = path.stat().st_size, 1 << 16
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(64):
            file.seek(max(0, size - piece) * i // 63)
            digest.update(file.read(piece))
    return digest.hexdigest()


# ---- reading it ----


class Header(NamedTuple):
    """A tensor as its file's header describes it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors, known from its headers; `read` fetches one tensor."""

    folder: Path
    name: str = ""
    """the path or hub name that it was opened by, if that is not the folder"""
    revision: str | None = None
    """of the hub's repository"""

    @classmethod
    def open(cls, model: str, *, revision: str | None = None) -> "Checkpoint":
        """The checkpoint that the user calls `model`: see `resolve`."""
        return cls(resolve(model, revision=revision), model, revision)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return read_json(self.folder / "config.json")

    @cached_property
    def tensors(self) -> dict[str, Header]:
        """Every tensor's header by name, in the files' order."""
        found: dict[str, Header] = {}
        for file in self._files():
            try:
                with safe_open(file, framework="pt") as shard:
                    for name in shard.keys():  # noqa: SIM118 (safe_open is no mapping)
                        entry = shard.get_slice(name)
                        found[name] = Header(
                            file, DTYPES[entry.get_dtype()], tuple(entry.get_shape())
                        )
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{file} is damaged or cut short ({error}): download or copy it again"
                ) from error
            except KeyError as error:
                raise UserError(
                    f"{file} holds a tensor of unknown dtype {error}: give a 16-bit checkpoint"
                ) from error
        return found

    def _files(self) -> list[Path]:
        index = self.folder / INDEX
        if (self.folder / SINGLE).is_file():  # first, as transformers does
            return [self.folder / SINGLE]
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index} holds no weight_map: download or copy it again")
        names = sorted(set(map(str, weight_map.values())))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise UserError(
                f"{index} names files outside its folder: {', '.join(outside)}. "
                "Do not use a checkpoint that does"
            )
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise UserError(
                f"{self.folder} lacks {', '.join(missing)}, which its index names: "
                "download or copy it again"
            )
        return [self.folder / name for name in names]

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU. The file is closed again, so that its pages can go."""
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
        """The longest row its model takes, where config.json says and it is a limit."""
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
        its 4-bit copies (but for an fp32 model's copies in fp16, which rounds twice). Two bases
        that differ in their matrices alone are not told apart.
        """
        digest = hashlib.sha256()
        for name, header in sorted(self.tensors.items()):
            if len(header.shape) == 1 and not re.search(r"\.(nested_)?(absmax|quant_)", name):
                digest.update(f"{name}{header.shape}".encode())
                digest.update(
                    self.read(name).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
                )
        return digest.hexdigest()


@dataclass(frozen=True)
class OriginalWeights:
    """The weights of a 4-bit model's linear layers from before quantization, by the names of the
    model's layers; read from the checkpoint on demand."""

    checkpoint: Checkpoint
    names: Mapping[str, str]
    """layer -> its weight's name in the checkpoint"""
    transposed: frozenset[str]
    """layers whose weight the checkpoint stores as (in, out)"""
    dtype: torch.dtype

    def shape(self, name: str) -> tuple[int, int] | None:
        """(out, in), or None where the checkpoint has no such weight."""
        if name not in self.names:
            return None
        shape = self.checkpoint.tensors[self.names[name]].shape
        return (shape[1], shape[0]) if name in self.transposed else (shape[0], shape[1])

    def read(self, name: str) -> Tensor:
        """The weight (out, in) as loading casts it before it quantizes, on the CPU."""
        weight = self.checkpoint.read(self.names[name]).to(self.dtype)
        return weight.T if name in self.transposed else weight


# ---- what the model made of it will look like ----


@contextmanager
def _naming_the_model(folder: Path, task: str) -> Iterator[None]:
    """transformers' errors about an unknown model, as one of the user's."""
    try:
        yield
    except (ValueError, KeyError, OSError) as error:
        raise UserError(
            f"{folder} is no {task_named(task).kind} that this transformers knows: "
            f"{first_line(error)}"
        ) from error


def model_config(
    folder: Path,
    *,
    task: str = "causal-lm",
    labels: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> Any:
    """config.json of `folder` as transformers reads it, with these labels if there are any."""
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
        config: what `model_config` read, if it was; transformers writes into it.
    """
    trusted: Any = {"trust_remote_code": trust_remote_code}
    config = config or model_config(folder, task=task, labels=labels, **trusted)
    with _naming_the_model(folder, task), torch.device("meta"):
        model: nn.Module = auto_class(task_named(task)).from_config(config, **trusted)
    return model


def disk_name(checkpoint: Checkpoint, model: nn.Module, name: str) -> str | None:
    """The checkpoint's name of the parameter `name` of `model`, or None.

    The two differ where the checkpoint was saved from the headless model (the first GPT-2 files).
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    candidates = (name, name.removeprefix(prefix), prefix + name)
    return next((c for c in candidates if c in checkpoint.tensors), None)


def quantized_layers(model: nn.Module, quant: QuantConfig) -> dict[str, bool]:
    """Layers of the skeleton `model` to be quantized; True where the weight is (in, out) on disk.

    These are every nn.Linear and every Conv1D (GPT-2's transposed linear layer) but the output
    head or a classifier's, what `quant` skips, and what transformers never quantizes.
    """
    from transformers.pytorch_utils import Conv1D

    left_out = heads(model)
    kept = kept_dense(model)
    return {
        name: isinstance(module, Conv1D)
        for name, module in linear_layers(model).items()
        if (type(module) is nn.Linear or isinstance(module, Conv1D))
        and name not in kept
        and not is_in(name, left_out)
        and not is_skipped(name, quant.skip_modules)
    }


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every nn.Linear and Conv1D of `model`, by name."""
    from transformers.pytorch_utils import Conv1D

    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def kept_dense(model: nn.Module) -> list[str]:
    """Linear layers that transformers keeps out of 4 bits, as the models look at their dtype: T5's
    `wo`, which overflows in fp16."""
    endings = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    return [name for name in linear_layers(model) if endings and name.endswith(endings)]


def is_skipped(name: str, skip_modules: Iterable[str]) -> bool:
    """Whether `name` is, ends in, or lies below one of the names."""
    return any(f".{skip}." in f".{name}." for skip in skip_modules)
