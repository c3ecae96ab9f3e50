"""PEFT writes an adapter of every kind, and each consumer's verdict is what its source says."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import CONFIGS, FAMILIES, FP32, VOCAB, tiny_model, token_ids
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from qlora.adapters.apply import apply_lora
from qlora.adapters.files import save_adapter
from qlora.adapters.portable import BAKED, CONSUMERS, LOST, STAYS, findings, kind_of, problems
from qlora.base.load import load_base
from qlora.config import LoraConfig

# transformers 5.23 deprecates a property that PEFT 0.21 asks for; PEFT warns of what it saves whole
# and of layers that it did not expect.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft"),
]

SAME = {"rtol": 0, "atol": 1e-5}  # fp32: the same sums, perhaps in another order
NONE = "- - - - - -"
SETTING, ODD = "a setting for biases", "odd ones of stacked layers"
WHOLE, INIT = "modules trained in full", "an init that changes the base"
GAPS = "layers adapted in some blocks"
ID = int(token_ids()[0, 2])  # of the first row
# What PEFT is told; the rules that the file then falls under; what each consumer does about it:
# vLLM, SGLang, llama.cpp, TGI, transformers, PEFT.
KINDS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "plain": ({}, [], NONE),
    "gaussian": ({"init_lora_weights": "gaussian"}, [], NONE),
    "an idle pattern": ({"alpha_pattern": {"q_proj": 6, "up_proj": 2}}, [], NONE),
    "rsLoRA": ({"use_rslora": True}, ["rsLoRA's scaling"], "- I I - - -"),
    "alphas": ({"alpha_pattern": {"q_proj": 2}}, ["alphas of their own"], "- I I I - -"),
    "ranks": ({"rank_pattern": {"q_proj": 2}}, ["ranks of their own"], "- R - I - -"),
    "regex": ({"target_modules": ".*(q|v)_proj"}, ["targets that are no list"], "- R - - - -"),
    "DoRA": ({"use_dora": True}, ["DoRA's magnitudes"], "R R R I I -"),
    "lora_bias": ({"lora_bias": True, "family": "qwen2"}, ["lora_bias"], "R I R I - -"),
    "biases": ({"bias": "all", "family": "qwen2"}, [SETTING, "biases"], "R I R I - -"),
    "some": ({"bias": "lora_only", "family": "qwen2"}, [SETTING, "biases"], "R I R I - -"),
    "no bias there": ({"bias": "all"}, [SETTING], "R - - - - -"),
    "head": ({"modules_to_save": ["lm_head"]}, [WHOLE], "R I R I I -"),
    "norm": ({"modules_to_save": ["norm"]}, ["norms trained in full"], "R I I I I -"),
    "classifier": ({"task_type": "SEQ_CLS"}, ["a classification head"], "- I R I I -"),
    "embedding": ({"target_modules": ["embed_tokens"]}, ["embeddings"], "- - - I - -"),
    "rows": ({"trainable_token_indices": [ID]}, ["trained token rows"], "R I R I I -"),
    "grown": ({"vocab": VOCAB + 16}, [WHOLE], "R I R I I -"),
    "PiSSA": ({"init_lora_weights": "pissa"}, [INIT], "R I I I - -"),
    "OLoRA": ({"init_lora_weights": "olora"}, [INIT], "R I I I - -"),
    "replicated": ({"layer_replication": [[0, 2], [1, 2]]}, ["repeated layers"], "R I I I - -"),
    "aLoRA": ({"alora_invocation_tokens": [ID]}, ["aLoRA"], "R I - I I -"),
    "q alone": ({"target_modules": ["q_proj"]}, [ODD], "- R - - - -"),
    "up alone": ({"target_modules": ["up_proj"]}, [ODD], "- R - - - -"),
    "no k": ({"target_modules": ["q_proj", "v_proj", "gate_proj"]}, [], NONE),
    "a block": ({"layers_to_transform": [0]}, [GAPS], "- - - I - -"),
    "the last": ({"target_modules": ["1.mlp.down_proj"]}, [GAPS], "- - - I - -"),
    "r 1024": ({"r": 1024}, ["a high rank"], "R - - - - -"),
}


def trained(kind: str, folder: Path) -> torch.nn.Module:
    """PEFT's live model with every trainable value moved, and its files."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **KINDS[kind][0]}
    vocab, _ = settings.pop("vocab", None), settings.pop("family", None)
    base = fresh(kind)
    if vocab:
        base.resize_token_embeddings(vocab)
    model = peft.get_peft_model(base, peft.LoraConfig(**{"task_type": "CAUSAL_LM", **settings}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    model.save_pretrained(folder, save_embedding_layers=True if vocab else "auto")
    return model.eval()


def fresh(kind: str) -> torch.nn.Module:
    """The base of that adapter."""
    settings, *_ = KINDS[kind]
    family = settings.get("family", "llama")
    if settings.get("task_type") == "SEQ_CLS":
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(CONFIGS[family]()).eval()
    return tiny_model(family)


def files(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_verdicts_are_those_of_the_sources(kind, tmp_path):
    trained(kind, tmp_path)
    _, rules, letters = KINDS[kind]
    values, tensors = files(tmp_path)
    found = findings(values, tensors, (*BAKED, *LOST, *STAYS))
    assert [rule.what for rule, _ in found] == rules
    words = {"R": {"refuses"}, "I": {"ignores"}, "-": set()}
    wanted = dict(zip(CONSUMERS, (words[letter] for letter in letters.split()), strict=True))
    verdicts = {
        who: {what.split()[0] for what in whats} for who, whats in problems(values, tensors).items()
    }
    assert verdicts == wanted
    assert vllm_refuses(values, tensors) == ("refuses" in verdicts["vLLM"])
    assert llama_cpp_exits(tensors) == ("refuses" in verdicts["llama.cpp"])
    assert sglang_refuses(values, tensors) == ("refuses" in verdicts["SGLang"])


def vllm_refuses(values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> bool:
    """vllm/lora/peft_helper.py, PEFTHelper.validate_legal; utils.py, parse_fine_tuned_lora_name."""
    init = values["init_lora_weights"]
    features = (
        set(values["modules_to_save"] or ()) - {"classifier", "score"},
        values["use_dora"],
        values["lora_bias"],
        isinstance(init, str)
        and init.lower() not in ("gaussian", "eva", "orthogonal", "mica", "lora_ga"),
        values["alora_invocation_tokens"],
        values["layer_replication"],
        values["bias"] != "none",
        values["r"] > 512,  # the highest --max-lora-rank
    )
    copies = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
    parts = [name.split(".") for name in tensors if not name.endswith(copies)]
    unknown = [
        p
        for p in parts
        if not (p[-1] == "weight" and p[-2] in ("lora_A", "lora_B"))
        and not (p[-1] in ("weight", "bias") and p[-2] in ("score", "classifier"))
        and p[-1] not in ("lora_embedding_A", "lora_embedding_B")
    ]
    return any(features) or bool(unknown)


def llama_cpp_exits(tensors: dict[str, torch.Tensor]) -> bool:
    """convert_lora_to_gguf.py, get_tensors: what is no A and no B, no copy and no norm ends it."""
    known = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
    passed = (*known, ".base_layer.weight", "_layernorm", ".norm")
    return not all(any(part in name for part in passed) for name in tensors)


def sglang_refuses(values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> bool:
    """lora_manager.py, validate_new_adapter and init_lora_shapes; lora.py, normalize_qkv_proj,
    which looks up v_proj for each q_proj and stacks the two, and normalize_gate_up_proj;
    mem_pool.py, whose buffers hold r rows and know the stacked names only."""
    if values["use_dora"] or not isinstance(values["target_modules"], list):
        return True
    lora_A = {name: len(tensor) for name, tensor in tensors.items() if ".lora_A." in name}
    if any(rows != values["r"] for rows in lora_A.values()):
        return True
    missing_v = [n for n in lora_A if "q_proj" in n and n.replace("q_proj", "v_proj") not in lora_A]
    left = [n for n in lora_A if "v_proj" in n and n.replace("v_proj", "q_proj") not in lora_A]
    left += [n for n in lora_A if ".up_proj" in n and n.replace("up_", "gate_") not in lora_A]
    return bool(missing_v or left)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "grown"])
def test_what_peft_and_transformers_take_they_compute(kind, tmp_path):
    wanted = logits(trained(kind, tmp_path))
    assert (wanted - logits(fresh(kind))).abs().max() > 1e-3  # the adapter is not idle
    found = problems(*files(tmp_path))
    loaded = peft.PeftModel.from_pretrained(fresh(kind), tmp_path)
    assert found["PEFT"] == []
    torch.testing.assert_close(logits(loaded.eval()), wanted, **SAME)
    if not found["transformers"]:
        model = fresh(kind)
        model.load_adapter(str(tmp_path))
        torch.testing.assert_close(logits(model.eval()), wanted, **SAME)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"r": 64, "lora_alpha": 1}], ids=str)
def test_ours_has_no_problems(family, settings, checkpoints, tmp_path):
    model = load_base(str(checkpoints(family)), FP32)
    save_adapter(apply_lora(model, LoraConfig(**settings)), tmp_path)
    assert not any(problems(*files(tmp_path)).values())


@pytest.mark.parametrize(
    ("values", "tensors", "letters"),
    [
        ({"use_qalora": True}, {}, "R I I I - -"),
        ({"use_bdlora": {"nblocks": 2}}, {}, "R I I I - -"),
        ({"target_parameters": ["experts.down_proj"]}, {}, "- R R I - -"),
        ({}, {"conv.lora_A.weight": (4, 3, 3, 3)}, "R R R I - -"),
        ({"target_modules": None}, {}, "- R - - - -"),
        ({"target_modules": "all-linear"}, {}, NONE),
        ({"init_lora_weights": "LoftQ"}, {}, "R I I I - -"),
        ({"init_lora_weights": False}, {}, NONE),
    ],
    ids=str,
)
def test_what_peft_writes_elsewhere(values, tensors, letters):
    """Kinds that need other bases (GPTQ, experts, images), by hand."""
    full = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **values}
    shaped = {f"base_model.model.{name}": torch.empty(shape) for name, shape in tensors.items()}
    words = {"R": "refuses", "I": "ignores"}
    found = {who: whats[0].split()[0] for who, whats in problems(full, shaped).items() if whats}
    wanted = zip(CONSUMERS, letters.split(), strict=True)
    assert found == {who: words[letter] for who, letter in wanted if letter in words}


def test_a_setting_that_is_not_there_is_missed_by_those_that_need_it():
    """vLLM's PEFTHelper.from_dict, SGLang's LoRAConfig and llama.cpp's lparams["lora_alpha"]."""
    found = {who: whats for who, whats in problems({"peft_type": "LORA"}, {}).items() if whats}
    alpha, others = (
        "refuses no lora_alpha in the config (lora_alpha)",
        "refuses missing in the config (r, target_modules)",
    )
    assert found == {"vLLM": [alpha, others], "SGLang": [alpha, others], "llama.cpp": [alpha]}


def test_offenders_are_named_but_not_all():
    tensors = {f"base_model.model.{name}.weight": torch.ones(1) for name in "abcdefg"}
    found = problems({"r": 4, "lora_alpha": 8, "target_modules": []}, tensors)
    assert found["TGI"] == ["ignores modules trained in full (a, b, c, d, e, …)"]


@pytest.mark.parametrize("name", ["q_proj.lora_A.weight", "a.b.lora_B.bias", "x.lora_embedding_B"])
def test_a_tensors_module_is_what_stands_before_its_part(name):
    module = name.partition(".lora")[0]
    assert kind_of(f"base_model.model.{name}")[0] == module
