"""Families whose modules or files differ from Llama's: loaded, trained, merged, against live."""

import peft
import pytest
import torch
from adapter_kinds import logits
from conftest import VOCAB
from merging import refused, require_logits, run_merge, trained
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    HrmTextConfig,
)

from qlora import QuantConfig, UserError, load_adapter, load_base
from qlora.adapters.format import read_adapter
from qlora.adapters.live import load_live
from qlora.adapters.lora import lora_layers
from qlora.base.checkpoint import Checkpoint
from qlora.base.modules import is_quantized, use_codes_as_stored

FP32 = QuantConfig(compute_dtype="fp32", allow_unquantized=True)  # fused experts
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
MAMBA = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 1}
LLAMA = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
VISION = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
# model type: its own sizes, linear layers that are neither quantized nor adapted, those that are
FAMILIES = {
    "falcon": (
        {**MAMBA, "num_attention_heads": 4}, "",
        "query_key_value dense dense_h_to_4h dense_4h_to_h",
    ),
    "bloom": (
        {**MAMBA, "n_layer": 2, "n_head": 4}, "dense dense_4h_to_h",
        "query_key_value dense_h_to_4h",
    ),
    "llama4_text": (
        SIZES | EXPERTS | {"intermediate_size_mlp": 128, "interleave_moe_layer_step": 2}, "router",
        LLAMA,
    ),
    "mamba": (MAMBA | {"state_size": 8}, "x_proj dt_proj out_proj", "in_proj"),
    # names on disk: language_model.model., backbone., model.language_model.
    "gemma3": (
        {"text_config": SIZES, "vision_config": VISION, "mm_tokens_per_image": 4,
         "image_token_index": 5}, "", f"{LLAMA} out_proj fc1 fc2",
    ),
    "nemotron_h": (
        SIZES | {"hybrid_override_pattern": "M*-", "mamba_num_heads": 8, "mamba_head_dim": 16,
                 "ssm_state_size": 16, "n_groups": 1}, "out_proj",
        "in_proj q_proj k_proj v_proj o_proj up_proj down_proj",
    ),
    "qwen3_5": (
        {"text_config": SIZES | {"layer_types": ["linear_attention", "full_attention"],
                                 "linear_num_value_heads": 4, "linear_num_key_heads": 2,
                                 "linear_key_head_dim": 16, "linear_value_head_dim": 16},
         "vision_config": VISION | {"depth": 1, "num_heads": 2, "out_hidden_size": 64}}, "",
        f"{LLAMA} in_proj_qkv in_proj_z in_proj_b in_proj_a out_proj",
    ),
}  # fmt: skip
RENAMED = {
    "gemma3": "language_model.model.",
    "nemotron_h": "backbone.",
    "qwen3_5": "model.language",
}


@pytest.fixture
def base(tmp_path):
    """`base(kind)`: the folder of a tiny random model."""

    def folder(kind):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **FAMILIES[kind][0])
        auto = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
        auto.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return folder


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_computes_as_a_linear_layer_is_quantized_adapted_and_merged(
    kind, base, tmp_path, capsys
):
    _, dense, adapted = FAMILIES[kind]
    live = trained(base(kind), tmp_path / "adapter", FP32)
    said = capsys.readouterr().out
    leaves = ", ".join(sorted(dense.split()))
    assert said.count(f"This family keeps {leaves} in 16 bits and without an adapter") == bool(
        dense
    )
    layers = lora_layers(live.model)
    assert {name.rpartition(".")[2] for name in layers} == set(adapted.split())
    assert all(is_quantized(layer.plain) for layer in layers.values())
    run_merge(live.adapter, tmp_path / "out", format="fp32")
    require_logits(tmp_path / "out", logits(live.model))


def test_4_bits_that_transformers_does_not_open_are_refused(base, tmp_path):
    live = trained(base("falcon"), tmp_path / "adapter", FP32)
    refused(live.adapter, tmp_path / "out", "no 4-bit FalconLinear.*use --format", format="nf4")
    experts = trained(base("llama4_text"), tmp_path / "other", FP32)  # which transformers renames
    refused(experts.adapter, tmp_path / "out", "no 4-bit Llama4TextExperts", format="nf4")
    load_base(str(base("falcon")), FP32).save_pretrained(tmp_path / "4 bits")  # as transformers 4
    with pytest.raises(UserError, match=r"no 4-bit FalconLinear.*: give its 16-bit model"):
        load_base(str(tmp_path / "4 bits"), FP32)


@pytest.mark.parametrize("kind", ["bloom", "falcon", "nemotron_h"])
def test_an_adapter_of_peft_is_merged_onto_what_transformers_quantized(
    kind, base, tmp_path, capsys
):
    """Its files do not tell. That is Bloom's dense and Nemotron-H's out_proj, whose weights these
    models read themselves, and nothing of Falcon, whose linear layers are a class of its own."""
    folder = base(kind)
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **settings)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quant, dtype=torch.float32
    )
    names = [*FAMILIES[kind][2].split(), *(["dense"] if kind == "bloom" else [])]
    config = peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False)
    theirs = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    use_codes_as_stored(theirs)
    run_merge(tmp_path / "adapter", tmp_path / "out", format="fp32")
    require_logits(tmp_path / "out", logits(theirs))
    live = load_live(str(folder), read_adapter(tmp_path / "adapter"), quant=FP32)
    torch.testing.assert_close(logits(live), logits(theirs), atol=1e-5, rtol=1e-5)  # fp32
    capsys.readouterr()
    load_adapter(load_base(str(folder), FP32), tmp_path / "adapter")
    assert "its base was another one" in capsys.readouterr().out
    if kind == "falcon":
        match = "no 4-bit FalconLinear"
        refused(tmp_path / "adapter", tmp_path / "nf4", match, format="nf4")
        return
    run_merge(tmp_path / "adapter", tmp_path / "nf4", format="nf4", calibration="none")
    again = load_base(str(tmp_path / "nf4"), FP32)
    assert {is_quantized(m) for n, m in again.named_modules() if n.endswith("out_proj")} <= {False}
    change = logits(again) - logits(theirs)
    assert change.norm() < 0.5 * logits(theirs).norm()


@pytest.mark.parametrize("kind", RENAMED)
def test_merged_files_have_the_names_of_the_base(kind, base, tmp_path):
    """Also with a head that is untied, and merged onto the weights from before quantization."""
    folder = base(kind)
    disk = Checkpoint(folder).tensors
    assert any(name.startswith(RENAMED[kind]) for name in disk)
    live = trained(folder, tmp_path / "adapter", FP32, target_modules=("o_proj", "lm_head"))
    run_merge(live.adapter, tmp_path / "out", format="fp32")
    require_logits(tmp_path / "out", logits(live.model))
    written = Checkpoint(tmp_path / "out").tensors
    assert {name for name in written if name not in disk} <= {"language_model.lm_head.weight"}
    assert written.keys() >= disk.keys()
    run_merge(live.adapter, tmp_path / "nf4", format="nf4", calibration="none")
    assert logits(load_base(str(tmp_path / "nf4"), FP32)).isfinite().all()
    run_merge(live.adapter, tmp_path / "int4", format="int4", calibration="none")
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "int4", dtype=torch.float32)
    change = logits(rounded) - logits(live.model)
    assert change.norm() < 0.5 * logits(live.model).norm()
    pissa = trained(folder, tmp_path / "pissa", FP32, init_lora_weights="pissa")  # reads the base
    run_merge(pissa.adapter, tmp_path / "of pissa", format="fp32")
    require_logits(tmp_path / "of pissa", logits(pissa.model))
    run_merge(live.adapter, tmp_path / "original", format="fp32", onto="original")
    original = Checkpoint(tmp_path / "original")
    changed = [n for n in disk if not torch.equal(Checkpoint(folder).read(n), original.read(n))]
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} <= {"o_proj", "lm_head"}
    assert changed


def test_fused_weights_on_disk_are_refused_before_training(tmp_path):
    config = HrmTextConfig(**SIZES)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    match = r"weights fused.*self_attn.q_proj \(in .*gqkv_proj.weight\).*Use another model"
    with pytest.raises(UserError, match=match):
        load_base(str(tmp_path / "base"), FP32)


MOE = SIZES | {
    "moe_intermediate_size": 32, "num_experts_per_tok": 2, "num_hidden_layers": 3,
    "max_position_embeddings": 64,
}  # fmt: skip
ROUTED = {  # model type: its own sizes, and the tensors that transformers keeps in fp32
    "glm4_moe": (
        {"n_routed_experts": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
        "gate.e_score_correction_bias",
    ),
    "ernie4_5_moe": ({"moe_num_experts": 8, "moe_k": 2}, "mlp.gate.weight e_score_correction_bias"),
}


@pytest.mark.parametrize("kind", ROUTED)
def test_what_transformers_keeps_in_fp32_is_not_rounded(kind, tmp_path):
    """In bf16 the bias of the router's scores makes it choose other experts."""
    torch.manual_seed(0)
    sizes, names = ROUTED[kind]
    config = AutoConfig.for_model(kind, **MOE | sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    kept = [name for name in model.state_dict() if name.endswith(tuple(names.split()))]
    for name in kept:
        module, _, leaf = name.rpartition(".")
        tensor = getattr(model.get_submodule(module), leaf)
        tensor.data = 7 + torch.randn(tensor.shape)
    model.save_pretrained(tmp_path / "base")
    base = Checkpoint(tmp_path / "base")
    places = [name for name, header in base.tensors.items() if header.dtype == torch.float32]
    assert len(places) == len(kept) > 0
    quant = QuantConfig(compute_dtype="bf16", allow_unquantized=True)
    live = trained(tmp_path / "base", tmp_path / "adapter", quant)
    state = live.model.state_dict()
    assert all(torch.equal(state[name], model.state_dict()[name]) for name in kept)
    for form in ("bf16", "fp16", "nf4", "int4"):
        calibration = None if "16" in form else "none"
        run_merge(live.adapter, tmp_path / form, format=form, calibration=calibration)
        out = Checkpoint(tmp_path / form)
        assert all(torch.equal(out.read(name), base.read(name)) for name in places), form
        others = {h.dtype for n, h in out.tensors.items() if n not in places}
        assert torch.float32 not in others or form == "nf4"  # of absmax
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype="auto").state_dict()
    assert all(torch.equal(state[name], model.state_dict()[name]) for name in kept)
