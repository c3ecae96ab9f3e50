"""Everything PEFT's LoRA can put into an adapter, merged: PEFT's live model is the oracle."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import FP32, VOCAB, randomize_adapter, token_ids
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora.adapters.apply import apply_lora
from qlora.adapters.files import load_adapter, save_adapter
from qlora.adapters.format import combine, read_adapter
from qlora.adapters.lora import lora_layers
from qlora.base.load import load_base
from qlora.config import LoraConfig, MergeConfig
from qlora.errors import UserError
from qlora.merge import merge

# transformers 5.23 deprecates a property that PEFT 0.21 asks for; PEFT warns of tied weights.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
MLP = ["gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "rslora": ("llama", False, {"use_rslora": True}),
    "rank pattern": ("llama", False, {"rank_pattern": {"q_proj": 2, r"layers\.1\..*down_proj": 6}}),
    "alpha pattern": ("llama", False, {"alpha_pattern": {"v_proj": 3}, "use_rslora": True}),
    "dora": ("llama", False, {"use_dora": True}),
    "dora on conv1d": ("gpt2", True, {"use_dora": True, "target_modules": ["c_attn", "c_proj"]}),
    "dora beside biases": ("qwen2", False, {"use_dora": True}),
    "all biases": ("qwen2", False, {"bias": "all"}),
    "lora's biases": ("phi", False, {"bias": "lora_only", "target_modules": ["q_proj", "fc1"]}),
    "lora_bias": ("qwen2", False, {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
    "norms": ("llama", False, {"modules_to_save": ["input_layernorm", "norm"]}),
    "head": ("llama", False, {"modules_to_save": ["lm_head"]}),
    "tied head": ("llama", True, {"modules_to_save": ["lm_head"]}),
    "tied embedding": ("llama", True, {"modules_to_save": ["embed_tokens"]}),
    "both, tied": ("llama", True, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "lora on the embedding": ("llama", False, {"target_modules": ["embed_tokens", "q_proj"]}),
    "lora on the tied embedding": ("llama", True, {"target_modules": ["embed_tokens", *MLP]}),
    "lora on the tied head": ("llama", True, {"target_modules": ["lm_head", "q_proj"]}),
    "lora on gpt2's tied embedding": ("gpt2", True, {"target_modules": ["wte", "c_attn"]}),
    "lora on both": ("llama", False, {"target_modules": ["embed_tokens", "lm_head"]}),
    "dora on the embedding": (
        "llama", False, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}
    ),
    "token rows": ("llama", False, {"trainable_token_indices": [5, 7, 9]}),
    "token rows, tied": ("llama", True, {"trainable_token_indices": [5, 7, 9]}),
    "rows of the head": ("llama", False, {"trainable_token_indices": {"lm_head": [5, 7, 9]}}),
}  # fmt: skip


def trained_by_peft(base: Path, folder: Path, **settings: Any) -> torch.nn.Module:
    """PEFT's live model over our 4-bit base, every trainable value moved, and its files."""
    settings = {"target_modules": ["q_proj", "v_proj", *MLP]} | settings
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(load_base(str(base), FP32), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.02 * float(parameter.abs().mean() + 0.5))
    model.save_pretrained(folder)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(token_ids()).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_is_pefts_live_model(kind, base_of, tmp_path):
    family, tied, settings = KINDS[kind]
    base, adapter, output = base_of(family, tied), tmp_path / "adapter", tmp_path / "out"
    wanted = logits(trained_by_peft(base, adapter, **settings))
    merge(MergeConfig(adapter=str(adapter), output_dir=str(output), format="fp32"))
    again = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    # fp32: the same sums in another order
    torch.testing.assert_close(logits(again), wanted, rtol=1e-5, atol=1e-5)
    live = load_base(str(base), FP32)
    assert (logits(live) - wanted).abs().max() > 1e-3  # the adapter is not idle
    load_adapter(live, adapter)
    torch.testing.assert_close(logits(live.eval()), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_4_bit_merge_is_close_to_it(kind, base_of, tmp_path):
    family, tied, settings = KINDS[kind]
    base, adapter, output = base_of(family, tied), tmp_path / "adapter", tmp_path / "out"
    model = trained_by_peft(base, adapter, **settings)
    data: Any = {"format": "nf4", "calibration": "none"}
    merge(MergeConfig(adapter=str(adapter), output_dir=str(output), **data))
    before = logits(load_base(str(base), FP32))
    wanted, got = logits(model) - before, logits(load_base(str(output), FP32)) - before
    # Without data there is noise; of a merge that does nothing, or all of it twice, this is 0 or 2.
    assert float((got * wanted).sum() / wanted.square().sum()) == pytest.approx(1, abs=0.4)


def test_a_head_parted_from_its_embedding_is_so_in_the_config(base_of, tmp_path):
    trained_by_peft(base_of("llama", True), tmp_path / "adapter", target_modules=["lm_head"])
    output = tmp_path / "out"
    merge(MergeConfig(adapter=str(tmp_path / "adapter"), output_dir=str(output)))
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False
    tensors = load_file(output / "model.safetensors")
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_a_layer_trained_in_full_stays_out_of_4_bits(base_of, tmp_path):
    """It was trained in 16 bits beside the 4-bit ones, and is written so; the config says it."""
    base, adapter = base_of("llama", False), tmp_path / "adapter"
    trained_by_peft(base, adapter, target_modules=["q_proj"])
    name, weight = "model.layers.1.mlp.up_proj.weight", torch.randn(128, 64) * 0.1
    with_whole_layer(adapter, name, weight, entry="layers.1.mlp.up_proj")
    for format_ in ("fp32", "nf4"):
        output = tmp_path / format_
        data = {"calibration": "none"} if format_ == "nf4" else {}
        settings = {"output_dir": str(output), "format": format_, **data}
        merge(MergeConfig(adapter=str(adapter), **settings))
        got = load_file(output / "model.safetensors")[name]
        torch.testing.assert_close(got.float(), weight, rtol=1e-2 * (format_ == "nf4"), atol=0)
    settings = json.loads((output / "config.json").read_text())["quantization_config"]
    assert "model.layers.1.mlp.up_proj" in settings["llm_int8_skip_modules"]
    live = load_base(str(base), FP32)
    load_adapter(live, adapter)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fp32", dtype=torch.float32)
    torch.testing.assert_close(logits(live.eval()), logits(again), rtol=1e-5, atol=1e-5)


def with_whole_layer(adapter: Path, name: str, weight: torch.Tensor, *, entry: str) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file({**load_file(path), f"base_model.model.{name}": weight}, path)
    edit_config(adapter, modules_to_save=[entry])


def edit_config(adapter: Path, **values: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_grown_vocabulary(base_of, tmp_path):
    """PEFT saves embedding and head whole when they were resized."""
    base, adapter, output = base_of("llama", False), tmp_path / "adapter", tmp_path / "out"
    model = load_base(str(base), FP32)
    model.resize_token_embeddings(VOCAB + 16)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    wrapped.save_pretrained(adapter, save_embedding_layers=True)
    merge(MergeConfig(adapter=str(adapter), output_dir=str(output), format="fp32"))
    assert json.loads((output / "config.json").read_text())["vocab_size"] == VOCAB + 16
    again = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(wrapped.eval()), rtol=1e-5, atol=1e-5)


# ---- several at once ----


def two_adapters(base: Path, root: Path) -> torch.nn.Module:
    """Adapters `one` (all linear, r 4) and `two` (q_proj and up_proj, r 2) in `root`; both live."""
    for seed, (name, targets, r) in enumerate(
        [("one", "all-linear", 4), ("two", ("q_proj", "up_proj"), 2)]
    ):
        model = load_base(str(base), FP32)
        apply_lora(model, LoraConfig(r=r, lora_alpha=8, target_modules=targets))
        randomize_adapter(model, seed=seed)
        save_adapter(model, root / name)
    model = load_base(str(base), FP32)
    load_adapter(model, root / "one", adapter_name="one")
    load_adapter(model, root / "two", adapter_name="two")
    return model.eval()


def test_several_adapters_add_up_with_their_weights(base_of, tmp_path):
    model = two_adapters(base_of("llama", False), tmp_path)
    for layer in lora_layers(model).values():
        layer.active_adapters = tuple(layer.lora_A)
        for name, weight in {"one": 0.5, "two": -2.0}.items():
            if name in layer.scaling:
                layer.scaling[name] *= weight
    folders = tuple(str(tmp_path / name) for name in ("one", "two"))
    output = tmp_path / "out"
    merge(MergeConfig(adapter=folders, weights=(0.5, -2), output_dir=str(output), format="fp32"))
    again = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    report = json.loads((output / "merge_report.json").read_text())
    assert report["adapters"] == dict(zip(folders, (0.5, -2), strict=True))
    assert "one` times 0.5" in (output / "README.md").read_text()


def test_one_adapter_with_weight_one_is_itself(base_of, tmp_path):
    two_adapters(base_of("llama", False), tmp_path)
    adapter = read_adapter(tmp_path / "one")
    assert combine([adapter], [1.0]) is adapter


def test_adapters_that_do_not_add_up(base_of, tmp_path):
    two_adapters(base_of("llama", False), tmp_path)
    trained_by_peft(base_of("llama", False), tmp_path / "dora", use_dora=True)
    one, dora = (read_adapter(tmp_path / name) for name in ("one", "dora"))
    with pytest.raises(UserError, match="DoRA's magnitudes, of which no weighted sum is made"):
        combine([one, dora], [1, 1])
    other = read_adapter(tmp_path / "two")
    other.base["blocksize"] = 128
    with pytest.raises(UserError, match="different bases"):
        combine([one, other], [1, 1])


# ---- what is refused, by name ----


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"use_dora": True}, "has no lora_magnitude_vector, its config says use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "missing lm_head"),
        ({"rank_pattern": {"q_proj": 8}}, r"q_proj.lora_A.weight has shape \(4, 64\).* r=8"),
    ],
)
def test_a_config_that_does_not_fit_its_tensors(values, match, base_of, tmp_path):
    trained_by_peft(base_of("llama", False), tmp_path / "adapter")
    edit_config(tmp_path / "adapter", **values)
    with pytest.raises(UserError, match=match):
        read_adapter(tmp_path / "adapter")


def test_a_tensor_nobody_asked_for(base_of, tmp_path):
    trained_by_peft(base_of("llama", False), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.mlp.up_proj.weight"
    save_file({**load_file(path), name: torch.zeros(128, 64)}, path)
    with pytest.raises(UserError, match=f"unexpected {name}"):
        read_adapter(tmp_path / "adapter")


def test_a_bias_where_the_model_has_none(base_of, tmp_path):
    base = base_of("llama", False)
    trained_by_peft(base, tmp_path / "adapter", lora_bias=True)
    with pytest.raises(UserError, match=r"q_proj\.bias is not in the checkpoint"):
        merge(MergeConfig(adapter=str(tmp_path / "adapter"), output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_layer_that_the_files_lack_is_named(base_of, tmp_path):
    """PEFT would leave it as it starts, without a word."""
    base, adapter = base_of("llama", False), tmp_path / "adapter"
    trained_by_peft(base, adapter, target_modules=["q_proj", "v_proj"])
    file = adapter / "adapter_model.safetensors"
    kept = {n: t for n, t in load_file(file).items() if "layers.1.self_attn.v_proj" not in n}
    save_file(kept, file, metadata={"format": "pt"})
    message = r"layers\.1\.self_attn\.v_proj is in target_modules, and the files have no A and B"
    model = load_base(str(base), FP32)
    with pytest.raises(UserError, match=message):
        load_adapter(model, adapter)
    assert not lora_layers(model)
    with pytest.raises(UserError, match=message):
        merge(MergeConfig(adapter=str(adapter), output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    edit_config(adapter, exclude_modules=["layers.1.self_attn.v_proj"])  # then it may be
    load_adapter(model, adapter)
