"""Every kind of adapter that the tests use, and one build of each that they share.

ADAPTER_KINDS has the settings of each kind, as PEFT's LoraConfig takes them. The session fixture
`adapter_build(kind, base)` gives its `Build`, made once: our model with an adapter whose every
trainable value was moved, its files, and PEFT's own model with the same values.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import VOCAB, pefts_parameters, token_ids
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from qlora import LoraConfig, QuantConfig, UserError, apply_lora, load_base, save_adapter
from qlora.adapters.apply import active_adapters, adapter_configs
from qlora.adapters.files import parameters_by_file_name


class AdapterKind(NamedTuple):
    """An adapter of r 4 and lora_alpha 6 on `TARGETS`, but for `settings`."""

    settings: dict[str, Any]
    family: str = "llama"
    tied: bool = False  # whether the base's head is its embedding
    # "plain": PEFT would copy 4-bit codes, which nothing trains (ours become dense), so over a
    # 4-bit base PEFT has no model: the build has our logits and no gradients
    base: str = "any"
    by_peft: bool = False  # only PEFT can make it, over a plain base
    vocab: int = VOCAB


QV, MLP = ("q_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")
TARGETS = (*QV, *MLP)
ID = int(token_ids()[0, 2])  # of the first row
TOKENS = (ID, 7, 191)
RANKS = {"q_proj": 2, r"layers\.1\..*down_proj": 6}
SAVED, ROWS = "modules_to_save", "trainable_token_indices"


def on(*targets: str, **settings: Any) -> dict[str, Any]:
    return {"target_modules": targets, **settings}


ADAPTER_KINDS: dict[str, AdapterKind] = {
    # A and B of linear layers
    "lora": AdapterKind({}),
    "rslora": AdapterKind({"use_rslora": True}),
    "ranks": AdapterKind({"rank_pattern": RANKS}),
    "alphas": AdapterKind({"alpha_pattern": {"v_proj": 3.7, "up_proj": 7}}),
    "doubled alphas": AdapterKind({"alpha_pattern": {"v_proj": 12, "down_proj": 3}}),
    "rslora, alphas and ranks": AdapterKind(
        {"use_rslora": True, "alpha_pattern": {"v_proj": 3}, "rank_pattern": RANKS}
    ),
    "regex": AdapterKind({"target_modules": ".*(q|v)_proj"}),
    "dora": AdapterKind({"use_dora": True}),
    "dora on conv1d": AdapterKind(on("c_attn", "c_proj", use_dora=True), "gpt2", True),
    "dora beside biases": AdapterKind({"use_dora": True}, "qwen2"),
    # biases
    "all biases": AdapterKind({"bias": "all"}, "qwen2"),
    "lora's biases": AdapterKind(on("q_proj", "fc1", bias="lora_only"), "phi"),
    "all biases of gpt2": AdapterKind(on("c_attn", bias="all"), "gpt2", True),
    "biases and dora": AdapterKind({"bias": "lora_only", "use_dora": True}, "qwen2"),
    "lora_bias": AdapterKind(on(*QV, lora_bias=True), "qwen2"),
    # modules trained in full
    "norms": AdapterKind({SAVED: ("input_layernorm", "norm")}),
    "a block": AdapterKind(on(*QV) | {SAVED: ("layers.1.mlp",)}, base="plain"),
    "a conv1d": AdapterKind(on("c_attn") | {SAVED: ("h.1.mlp.c_fc",)}, "gpt2", True, "plain"),
    "the head": AdapterKind({SAVED: ("lm_head",)}),
    "the tied head": AdapterKind({SAVED: ("lm_head",)}, tied=True),
    "the tied embedding": AdapterKind({SAVED: ("embed_tokens",)}, tied=True),
    "embedding and tied head": AdapterKind({SAVED: ("embed_tokens", "lm_head")}, "gemma", True),
    # A and B of embeddings and heads
    "lora on the embedding": AdapterKind(on("embed_tokens", "q_proj")),
    "lora on the tied embedding": AdapterKind(on("embed_tokens", *MLP), tied=True),
    "lora on a scaled embedding": AdapterKind(on("embed_tokens", "q_proj"), "gemma", True),
    "dora on the embedding": AdapterKind(on("embed_tokens", "q_proj", use_dora=True)),
    "lora on gpt2's embedding": AdapterKind(on("wte", "c_attn"), "gpt2", True),
    "lora on the head": AdapterKind(on("lm_head", "q_proj")),
    "lora on the tied head": AdapterKind(on("lm_head", "q_proj"), tied=True),
    "lora on embedding and head": AdapterKind(on("embed_tokens", "lm_head")),
    # token rows
    "token rows": AdapterKind({ROWS: TOKENS}),
    "token rows, tied": AdapterKind({ROWS: TOKENS}, tied=True),
    "token rows, scaled": AdapterKind({ROWS: TOKENS}, "gemma", True),
    "token rows by name": AdapterKind(on("c_attn") | {ROWS: {"wte": TOKENS}}, "gpt2", True),
    "token rows of the head": AdapterKind({ROWS: {"lm_head": (5, 9)}}),
    # experts
    "experts": AdapterKind(
        on("q_proj", target_parameters=("experts.down_proj", "experts.gate_up_proj")), "mixtral"
    ),
    "one of experts": AdapterKind(
        on("q_proj", target_parameters=("experts.down_proj", "gate.weight")), "mixtral"
    ),
    "experts alone": AdapterKind(on(target_parameters=("experts.down_proj",)), "mixtral"),
    "experts of two ranks": AdapterKind(
        on("q_proj", target_parameters=("down_proj", "experts.gate_up_proj"), use_rslora=True)
        | {"rank_pattern": {"experts.down_proj": 2, "q_proj": 3}}
        | {"alpha_pattern": {"gate_up_proj": 3}},
        "mixtral",
    ),
    # what ours does not write
    "gaussian": AdapterKind({"init_lora_weights": "gaussian"}, by_peft=True),
    "an idle pattern": AdapterKind({"alpha_pattern": {"q_proj": 6, "o_proj": 2}}, by_peft=True),
    "lora_only biases": AdapterKind({"bias": "lora_only"}, "qwen2", by_peft=True),
    "no bias to train": AdapterKind({"bias": "all"}, by_peft=True),
    "classifier": AdapterKind({"task_type": "SEQ_CLS"}, by_peft=True),
    "grown vocabulary": AdapterKind({}, by_peft=True, vocab=VOCAB + 16),
    "pissa": AdapterKind({"init_lora_weights": "pissa"}, by_peft=True),
    "olora": AdapterKind({"init_lora_weights": "olora"}, by_peft=True),
    "replicated layers": AdapterKind({"layer_replication": [[0, 2], [1, 2]]}, by_peft=True),
    "alora": AdapterKind({"alora_invocation_tokens": [ID]}, by_peft=True),
    "q_proj alone": AdapterKind(on("q_proj"), by_peft=True),
    "up_proj alone": AdapterKind(on("up_proj"), by_peft=True),
    "without k_proj": AdapterKind(on("q_proj", "v_proj", "gate_proj"), by_peft=True),
    "first layer": AdapterKind(on(*QV, layers_to_transform=[0]), by_peft=True),
    "down_proj of the last layer": AdapterKind(on("1.mlp.down_proj"), by_peft=True),
    "r 1024": AdapterKind({"r": 1024}, by_peft=True),
}
OUR_KINDS = [kind for kind, asked in ADAPTER_KINDS.items() if not asked.by_peft]
# The weights of experts are no linear layers': a 4-bit base has them in 16 bits.
FP32_OR_16_BITS = QuantConfig(compute_dtype="fp32", allow_unquantized=True)


class Build(NamedTuple):
    """A kind's adapter, ours and PEFT's with the same values. Tests leave it as they found it."""

    model: Any  # ours, evaluating; None where only PEFT can make it
    folder: Path  # its files; PEFT's, where only PEFT can make it
    peft_folder: Path
    base_logits: Tensor
    logits: Tensor  # of PEFT's model
    gradients: dict[str, Tensor]  # of PEFT's model, by the names of files; empty without ours


def build(kind: str, base: str, checkpoint: Path, root: Path) -> Build:
    """The adapter of that kind over a "4-bit" or "plain" base of `checkpoint`."""
    asked = ADAPTER_KINDS[kind]
    model, gradients, folder, peft_folder = None, {}, root / "peft", root / "peft"
    plain = new_base(kind, base, checkpoint)
    base_logits = logits(plain)
    if (base, asked.base) == ("4-bit", "plain"):
        model = trained(plain, kind)
        save_adapter(model, folder)
        return Build(model, folder, folder, base_logits, logits(model), {})
    with warnings.catch_warnings():  # PEFT's, of tied weights and of patterns that it looks for
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(plain, peft_config(kind)).eval()
        parameters = pefts_parameters(theirs)
        if asked.by_peft:
            move(parameters)
        else:
            folder = root / "ours"
            model = trained(new_base(kind, base, checkpoint), kind)
            ours = parameters_by_file_name(model, "default")
            assert ours.keys() == parameters.keys()
            for name, parameter in parameters.items():
                assert parameter.shape == ours[name].shape
                parameter.data.copy_(ours[name])
            save_adapter(model, folder)
            gradients = gradients_of(theirs, parameters)
        grown = asked.vocab != VOCAB
        theirs.save_pretrained(peft_folder, save_embedding_layers=True if grown else "auto")
        wanted = logits(theirs)
    return Build(model, folder, peft_folder, base_logits, wanted, gradients)


def new_base(kind: str, base: str, checkpoint: Path) -> Any:
    """The model that a kind's adapter is for, each time the same: "4-bit", or "plain" in fp32."""
    if ADAPTER_KINDS[kind].settings.get("task_type") == "SEQ_CLS":
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    if base == "4-bit":
        model: Any = load_base(str(checkpoint), FP32_OR_16_BITS)
    else:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if (vocab := ADAPTER_KINDS[kind].vocab) != VOCAB:
        torch.manual_seed(0)
        model.resize_token_embeddings(vocab, mean_resizing=False)
    return model.eval()


def trained(model: Any, kind: str, *, name: str = "default", seed: int = 3) -> Any:
    """`model` with an adapter of that kind, every trainable value moved."""
    settings = {"target_modules": TARGETS} | ADAPTER_KINDS[kind].settings
    config = LoraConfig(**{"r": 4, "lora_alpha": 6} | settings)
    generator = torch.Generator().manual_seed(seed)
    apply_lora(model, config, adapter_name=name, generator=generator)
    move(parameters_by_file_name(model, name), seed)
    return model


def peft_config(kind: str) -> peft.LoraConfig:
    """PEFT's config of that kind, which has lists where ours has tuples."""
    plain = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": TARGETS}
    return peft.LoraConfig(**json.loads(json.dumps(plain | ADAPTER_KINDS[kind].settings)))


@torch.no_grad()
def move(parameters: dict[str, nn.Parameter], seed: int = 3, std: float = 0.02) -> None:
    """Noise on every value, after the size of each parameter's."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        parameter.add_(noise, alpha=std * float(parameter.abs().mean() + 0.5))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Of `token_ids`."""
    return torch.as_tensor(model(input_ids=token_ids().to(model.device)).logits)


def gradients_of(model: Any, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Of the language modeling loss of `token_ids`, by the parameters' names."""
    ids = token_ids().to(model.device)
    loss = model(input_ids=ids, labels=ids).loss
    found = torch.autograd.grad(loss, list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def codes(model: Any) -> dict[str, Tensor]:
    """A copy of every tensor of the 4-bit layers."""
    layers = {n: m.state_dict() for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    copies = {f"{n}.{key}": t.clone() for n, own in layers.items() for key, t in own.items()}
    return {name.replace(".base_layer", ""): tensor for name, tensor in copies.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def snapshot(model: Any) -> Any:
    """Modules, parameters, configs and the active adapters, to compare before and after."""
    modules = {name: type(module) for name, module in model.named_modules()}
    parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    return modules, parameters, dict(adapter_configs(model)), active_adapters(model)


@contextmanager
def refused(model: Any, message: str) -> Iterator[None]:
    """The block raises a UserError that matches `message`, and the model does not change."""
    before, before_logits = snapshot(model), logits(model)
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match=message):
        yield
    assert snapshot(model) == before
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model), before_logits)
