"""Tiny models, built from a config in this process, for every family the project promises."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton: it then runs kernels on a CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from qlora import apply_lora, load_base, save_adapter
from qlora.adapters.lora import LoRALayer
from qlora.config import DataConfig, LoraConfig, QuantConfig, TrainConfig

VOCAB = 320
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "mistral": lambda: MistralConfig(**SIZES),
    "gemma": lambda: Gemma2Config(**SIZES, head_dim=16),
    "phi": lambda: PhiConfig(**SIZES),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=512,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,  # batches of other shapes draw other numbers
    ),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
}  # fmt: skip
ENCODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
OTHERS: dict[str, Callable[[], PreTrainedModel]] = {  # as they are pretrained, without a classifier
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
            pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
        )
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCAB, d_model=64, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=128,
            decoder_ffn_dim=128, encoder_attention_heads=4, decoder_attention_heads=4,
            max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=2, forced_eos_token_id=2,
        )
    ),
    "bert": lambda: BertForPreTraining(BertConfig(**ENCODER)),
    "bert without pooler": lambda: BertForMaskedLM(BertConfig(**ENCODER)),
    "bert without prefix": lambda: BertModel(BertConfig(**ENCODER)),
    "roberta": lambda: RobertaForMaskedLM(
        RobertaConfig(**ENCODER | {"max_position_embeddings": 514, "pad_token_id": 1})
    ),
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(**ENCODER, global_attn_every_n_layers=2, local_attention=16)
    ),
    "llama without pad": lambda: LlamaForCausalLM(LlamaConfig(**SIZES | {"pad_token_id": None})),
}  # fmt: skip
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def axis(*values: Any) -> list[Any]:
    """Parameters of which `make test` runs the first, and `pytest -m full` (every night) all.

    For axes that are multiplied with others: dtypes, families, checkpointing.
    """
    return [values[0], *(pytest.param(value, marks=pytest.mark.full) for value in values[1:])]


def on_gpu(test: Any) -> Any:
    """Decorates a test that needs a GPU."""
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
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHATML
    return fast


def tiny_model(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, tied: bool | None = None
) -> nn.Module:
    """A random model of `family`; norms and biases are random too, so that no term is idle."""
    torch.manual_seed(seed)
    if family in OTHERS:
        model = OTHERS[family]().to(dtype)
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


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoints("llama")`: the folder of that tiny model with its tokenizer, made once."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(family: str) -> Path:
        path = root / family
        if not path.exists():
            tiny_model(family).save_pretrained(path)
            tiny_tokenizer().save_pretrained(path)
        return path

    return folder


def randomize_adapter(model: nn.Module, *, seed: int = 1, std: float = 0.05) -> None:
    """Random values for every lora_B, and in DoRA: a merge test with B = 0 tests nothing."""
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
def adapters(
    checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`adapters("llama")`: a random adapter on that tiny model, with its tokenizer, made once."""
    root = tmp_path_factory.mktemp("adapters")

    def folder(family: str) -> Path:
        path = root / family
        if not path.exists():
            model = adapted_model(checkpoints(family))
            randomize_adapter(model, std=0.3)
            save_adapter(model, path)
            tiny_tokenizer().save_pretrained(path)
        return path

    return folder


ROWS = [{"prompt": f"{i} times {i}", "completion": f"{i * i} " * (1 + i % 5)} for i in range(40)]
"""Of different lengths, so that a mean over tokens is not one over rows."""


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def quick_config(base: Path, rows: Path, output: Path, **settings: Any) -> TrainConfig:
    """Four steps of training on the CPU, the same wherever they run."""
    quick = TrainConfig(
        model=str(base),
        output_dir=str(output),
        data=DataConfig(str(rows), max_length=128),
        lora=LoraConfig(r=4, lora_alpha=8),
        quant=FP32,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",  # the same steps, also where a run is to go on longer
        max_steps=4,
        logging_steps=1,
        save_steps=2,
        samples=0,
    )
    return replace(quick, **settings)


def losses(folder: Path) -> list[float]:
    """The training losses of a run."""
    return [row["loss"] for row in read_rows(folder / "metrics.jsonl") if "loss" in row]


def require_same_adapter(one: Path, other: Path) -> None:
    """Bit for bit, in two folders."""
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


class Run(NamedTuple):
    """A run that has ended."""

    config: TrainConfig
    folder: Path
    said: str
    """what it printed"""


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROWS in a file."""
    return write_rows(tmp_path_factory.mktemp("data") / "data.jsonl", ROWS)


@pytest.fixture(scope="session")
def quick_run(
    checkpoints: Callable[[str], Path], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """A `quick_config` with evaluation, samples and a logger, trained once.

    Tests look at its folder; one that changes something copies it first.
    """
    from qlora.training import train

    folder = tmp_path_factory.mktemp("quick") / "run"
    both = DataConfig(str(data), str(data), max_length=128)
    settings: Any = {"eval_steps": 2, "samples": 3, "report_to": ("tensorboard",)}
    config = quick_config(checkpoints("llama"), data, folder, data=both, **settings)
    with redirect_stdout(StringIO()) as said:
        train(config)
    return Run(config, folder, said.getvalue())


def token_ids(*, rows: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB, (rows, length), generator=generator)


def pefts_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's trainable parameters under the names they have in files."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.replace(".modules_to_save.default", "").replace(".default", "")
            found[name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")] = parameter
    return found


@pytest.fixture(scope="session", params=DEVICES)
def kernel_device(request: pytest.FixtureRequest) -> torch.device:
    """Where Triton's kernels run: on a GPU, or through its interpreter where there is none."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU of this machine")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def base_of(tmp_path_factory):
    """`base_of(family, tied)`: the folder of that tiny model, in fp32, made once."""
    root = tmp_path_factory.mktemp("bases")

    def folder(family: str, tied: bool) -> Path:
        path = root / f"{family}-{tied}"
        if not path.exists():
            tiny_model(family, tied=tied).save_pretrained(path)
            tiny_tokenizer().save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="session")
def adapter_build(base_of, tmp_path_factory):
    """`adapter_build(kind, base)`: its `adapter_kinds.Build` over that base, made once."""
    from adapter_kinds import ADAPTER_KINDS, build

    @cache
    def made(kind: str, base: str = "4-bit") -> Any:
        asked = ADAPTER_KINDS[kind]
        checkpoint = base_of(asked.family, asked.tied)
        return build(kind, base, checkpoint, tmp_path_factory.mktemp("adapter"))

    return made
