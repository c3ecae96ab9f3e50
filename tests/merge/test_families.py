"""Families whose modules or files differ from Llama's: loaded, trained, merged, against live."""

import pytest
import torch
from adapter_kinds import logits
from conftest import VOCAB
from merging import refused, require_logits, run_merge, trained
from transformers import AutoConfig, AutoModelForCausalLM

from qlora.adapters.lora import lora_layers
from qlora.base.modules import is_quantized
from qlora.config import QuantConfig

FP32 = QuantConfig(compute_dtype="fp32", allow_unquantized=True)  # fused experts
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
MAMBA = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 1}
# model type: its own sizes, linear layers that are neither quantized nor adapted, those that are
FAMILIES = {
    "falcon": (
        {**MAMBA, "num_attention_heads": 4}, "",
        "query_key_value dense dense_h_to_4h dense_4h_to_h",
    ),
    "llama4_text": (
        SIZES | EXPERTS | {"intermediate_size_mlp": 128, "interleave_moe_layer_step": 2}, "router",
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    ),
    "mamba": (MAMBA | {"state_size": 8}, "x_proj dt_proj out_proj", "in_proj"),
}  # fmt: skip


@pytest.fixture
def base(tmp_path):
    """`base(kind)`: the folder of a tiny random model."""

    def folder(kind):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **FAMILIES[kind][0])
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(
            tmp_path / "base"
        )
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
