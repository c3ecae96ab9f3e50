"""Tiny random models of every supported family, and the fixtures that several tests share."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import cache, partial
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # as the commands do in a log
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton: it then runs kernels on a CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from qlora import apply_lora, load_base, save_adapter
from qlora.adapters.lora import LoRALayer
from qlora.config import DataConfig, LoraConfig, QuantConfig, TrainConfig
from qlora.errors import UserError

VOCAB = 320
ENCODER: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 512, "pad_token_id": 0,
}  # fmt: skip
SIZES = ENCODER | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": partial(transformers.LlamaConfig, **SIZES),
    "qwen2": partial(transformers.Qwen2Config, **SIZES),
    "qwen3": partial(transformers.Qwen3Config, **SIZES, head_dim=16),
    "mistral": partial(transformers.MistralConfig, **SIZES),
    "gemma": partial(transformers.Gemma2Config, **SIZES, head_dim=16),
    "phi": partial(transformers.PhiConfig, **SIZES),
    "gpt2": partial(
        transformers.GPT2Config, vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=512,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,  # random numbers depend on the batch's shape
    ),
    "mixtral": partial(transformers.MixtralConfig, **SIZES, num_local_experts=4),
}  # fmt: skip


LONGEST = ("test_notebook_runs", "test_a_dry_day", "test_the_wheel", "test_page_has_the_counted")


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """The longest tests first: none begins when the other processes are done."""
    items.sort(key=lambda item: not item.name.startswith(LONGEST))


# the classes of pretrained checkpoints, and their sizes
OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "t5": (transformers.T5ForConditionalGeneration, {
        "vocab_size": VOCAB, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2,
        "num_heads": 4, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
    }),
    "bart": (transformers.BartForConditionalGeneration, {
        "vocab_size": VOCAB, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "max_position_embeddings": 512, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    }),
    "bert": (transformers.BertForPreTraining, ENCODER),
    "bert without pooler": (transformers.BertForMaskedLM, ENCODER),
    "bert without prefix": (transformers.BertModel, ENCODER),
    "roberta": (transformers.RobertaForMaskedLM,
                ENCODER | {"max_position_embeddings": 514, "pad_token_id": 1}),
    "modernbert": (transformers.ModernBertForMaskedLM,
                   ENCODER | {"global_attn_every_n_layers": 2, "local_attention": 16}),
    "llama without pad": (transformers.LlamaForCausalLM, SIZES | {"pad_token_id": None}),
}  # fmt: skip
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def axis(*values: Any) -> list[Any]:
    """Parameters of which `make test` runs the first and the nightly run all; for axes that
    multiply others, such as dtypes and families."""
    return [values[0], *(pytest.param(value, marks=pytest.mark.full) for value in values[1:])]


def with_folders(*folders: Path) -> dict[str, str]:
    """The environment of a process that also imports from these folders, first of all."""
    before = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    return os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, folders), *before])}


def on_gpu(test: Any) -> Any:
    return pytest.mark.gpu(NEEDS_GPU(test))


DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])]
FAMILIES = [name for name in CONFIGS if name != "mixtral"]
FP32 = QuantConfig(compute_dtype="fp32")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, ChatML around them; ids stay below VOCAB."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<bos>", "<|im_end|>", "<|im_start|>"]
    vocab = {token: i for i, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"], chat_template=CHATML,
    )  # fmt: skip


def larger_tokenizer(folder: Path) -> Path:
    """Save a tokenizer with 70 tokens more, <t0> to <t69>, of which the last are beyond VOCAB."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<t{i}>" for i in range(70)])
    tokenizer.save_pretrained(folder)
    return folder


def tiny_model(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, tied: bool | None = None
) -> nn.Module:
    """A random model of `family`, including norms and biases, so that every term matters."""
    torch.manual_seed(seed)
    if family in OTHERS:
        model_class, sizes = OTHERS[family]
        model = model_class(model_class.config_class(**sizes)).to(dtype)
    else:
        config = CONFIGS[family]()
        if tied is not None:
            config.tie_word_embeddings = tied
        model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(autouse=True)
def seed() -> None:
    """A test draws the same numbers whichever tests ran before it in the process."""
    torch.manual_seed(0)


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """torch's global generator begins at seed 0 in the block, and goes on after it as before."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """`checkpoints(family, tied)`: the folder of a tiny model in fp32 and its tokenizer."""

    @cache
    def folder(family: str, tied: bool | None = None) -> Path:
        path = tmp_path_factory.mktemp("checkpoint") / family
        with own_random_numbers():
            tiny_model(family, tied=tied).save_pretrained(path)
        tiny_tokenizer().save_pretrained(path)
        return path

    return folder


@pytest.fixture
def base_with_another_eos(checkpoints, tmp_path):
    """A llama whose eos is <pad> (id 0), not the <|im_end|> (id 2) of its chat template."""
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "base")
    for name, eos in (("config", 0), ("generation_config", 0), ("tokenizer_config", "<pad>")):
        path = folder / f"{name}.json"
        key = "eos_token" if isinstance(eos, str) else "eos_token_id"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: eos}))
    return folder


def randomize_adapter(model: nn.Module, *, seed: int = 1, std: float = 0.05) -> None:
    """Random values for every lora_B and DoRA magnitude: with B = 0 a merge changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, LoRALayer):
                for lora_B in layer.lora_B.values():
                    lora_B.copy_(torch.randn(lora_B.shape, generator=generator) * std)
                for magnitude in layer.lora_magnitude_vector.values():
                    magnitude.mul_(1 + torch.randn(magnitude.shape, generator=generator) * std)


def adapted_model(folder: Path, lora: LoraConfig | None = None, quant: QuantConfig = FP32) -> Any:
    """The checkpoint in 4 bits with a random adapter (by default r=4), the same in each call."""
    lora = lora or LoraConfig(r=4, lora_alpha=8)
    quant = replace(quant, allow_unquantized=True)  # Mixtral's experts
    generator = torch.Generator().manual_seed(0)
    model = apply_lora(load_base(str(folder), quant), lora, generator=generator)
    randomize_adapter(model)
    return model


@pytest.fixture(scope="session")
def adapters(checkpoints, tmp_path_factory):
    """`adapters(family)`: the folder of a random adapter on that tiny model, and its tokenizer."""

    @cache
    def folder(family: str) -> Path:
        path = tmp_path_factory.mktemp("adapter") / family
        model = adapted_model(checkpoints(family))
        randomize_adapter(model, std=0.3)
        save_adapter(model, path)
        tiny_tokenizer().save_pretrained(path)
        return path

    return folder


ROWS = [{"prompt": f"{i} times {i}", "completion": f"{i * i} " * (1 + i % 5)} for i in range(40)]
"""Of different lengths, so that means over tokens and over rows differ."""


WORDS, TAGS = ["I", "met", "Ann", "Lee", "in", "Rome"], ["O", "O", "B-P", "I-P", "O", "B-L"]
RECORDS: dict[str, Callable[[int], dict[str, Any]]] = {  # which a model learns within a few steps
    "seq2seq": lambda i: {"prompt": f"say {i % 3}", "completion": "one two three"[: 3 + i % 9]},
    "seq-cls": lambda i: {"text": ("good " if i % 2 else "bad ") * (1 + i % 4),
                          "label": "pos" if i % 2 else "neg"},
    "token-cls": lambda i: {"tokens": WORDS[: 3 + i % 4], "tags": TAGS[: 3 + i % 4]},
}  # fmt: skip


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def quick_config(base: Path, rows: Path, output: Path, **settings: Any) -> TrainConfig:
    """Four deterministic steps of training on the CPU."""
    quick: dict[str, Any] = {
        "model": str(base), "output_dir": str(output),
        "data": DataConfig(str(rows), max_length=128), "lora": LoraConfig(r=4, lora_alpha=8),
        "quant": FP32, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant",  # a longer run begins the same
        "max_steps": 4, "logging_steps": 1, "save_steps": 2, "samples": 0,
    }  # fmt: skip
    return TrainConfig(**(quick | settings))


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_rows(folder / "metrics.jsonl") if "loss" in row]


def require_same_adapter(one: Path, other: Path) -> None:
    """Two folders hold the same adapter, bit for bit."""
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@contextmanager
def refuses(folder: Path, *words: str) -> Iterator[None]:
    """The block raises a UserError with these words and leaves `folder` as it was."""

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before, existed = files(), folder.exists()
    with pytest.raises(UserError) as error:
        yield
    assert [word for word in words if word not in str(error.value)] == [], error.value
    assert files() == before and folder.exists() == existed


class Run(NamedTuple):
    """A finished run."""

    config: TrainConfig
    folder: Path
    said: str  # on standard output


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "data.jsonl", ROWS)


@pytest.fixture(scope="session")
def few(data, tmp_path_factory) -> Path:
    """37 rows: the last batch of an epoch is short, and one rank has a batch less."""
    return write_rows(tmp_path_factory.mktemp("few") / "few.jsonl", read_rows(data)[:37])


@pytest.fixture(scope="session")
def quick_run(checkpoints, data, tmp_path_factory) -> Run:
    """A finished `quick_config` run with evaluation, samples and a logger; tests must not change
    its folder."""
    from qlora.training import train

    folder = tmp_path_factory.mktemp("quick") / "run"
    both = DataConfig(str(data), str(data), max_length=128)
    settings: Any = {"eval_steps": 2, "samples": 3, "report_to": ("tensorboard",)}
    config = quick_config(checkpoints("llama"), data, folder, data=both, **settings)
    with redirect_stdout(StringIO()) as stdout:
        train(config)
    return Run(config, folder, stdout.getvalue())


def one_by_one(model: Any, tokenizer: Any, chats: Iterable[Any], **settings: Any) -> list[str]:
    """transformers' greedy answer to each chat, without a batch and so without pads."""
    answers = []
    for chat in chats:
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**inputs, do_sample=False, pad_token_id=0, **settings)
        new = ids[0, inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True))
    return answers


def token_ids(*, rows: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB, (rows, length), generator=generator)


def pefts_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters of a PEFT model by their names in its files."""
    parameters = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.replace(".modules_to_save.default", "").replace(".default", "")
            name = name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
            parameters[name] = parameter
    return parameters


@pytest.fixture(scope="session", params=DEVICES)
def kernel_device(request) -> torch.device:
    """The device of Triton's kernels: a GPU, or without one the CPU, through its interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU of this machine")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def adapter_build(checkpoints, tmp_path_factory):
    """`adapter_build(kind, base)`: the `adapter_kinds.Build` of that adapter."""
    from adapter_kinds import ADAPTER_KINDS, build

    @cache
    def cached_build(kind: str, base: str = "4-bit") -> Any:
        family, tied = ADAPTER_KINDS[kind].family, ADAPTER_KINDS[kind].tied
        checkpoint, folder = checkpoints(family, tied), tmp_path_factory.mktemp("adapter")
        with own_random_numbers():  # of PEFT's first values
            return build(kind, base, checkpoint, folder)

    return cached_build
