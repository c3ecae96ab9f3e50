"""The plan: a count of few layers is that of all; sizes and optimizer state by arithmetic."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import SIZES, axis
from transformers import AutoConfig, AutoModelForCausalLM

from qlora.base import load_base
from qlora.config import DataConfig, LoraConfig, QuantConfig, TrainConfig
from qlora.errors import UserError
from qlora.plan.estimate import ALL_REDUCE, ALLOWANCE, CONTEXT, Plan, Planner, budget
from qlora.plan.meter import WORKSPACES
from qlora.plan.optimizer import optimizer_bytes
from qlora.plan.shards import GATHERED
from qlora.plan.step import ADAPTERS, EMBEDDING, GRADIENTS, HEAD, LINEAR, OTHER, SAVED

LAYERS = 7
# 64 values a head, as large models have; layers of several kinds in turn
WIDE: dict[str, Any] = {
    **SIZES, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": LAYERS,
    "max_position_embeddings": 8192,
}  # fmt: skip
IN_TURN = ["sliding_attention", "full_attention", "sliding_attention"] * 3
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**WIDE),
    "mistral": transformers.MistralConfig(**WIDE),
    "qwen2": transformers.Qwen2Config(**WIDE),
    "qwen3": transformers.Qwen3Config(**WIDE, head_dim=64),
    "gemma2": transformers.Gemma2Config(**WIDE, head_dim=64),
    "gemma3": transformers.Gemma3TextConfig(**WIDE, head_dim=64, layer_types=IN_TURN[:LAYERS]),
    "phi3": transformers.Phi3Config(**WIDE),
    "gpt2": transformers.GPT2Config(
        vocab_size=320, n_embd=256, n_layer=LAYERS, n_head=4, n_positions=4096,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=1, eos_token_id=2,
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(**WIDE, **EXPERTS, head_dim=64),
    "falcon": transformers.FalconConfig(
        vocab_size=320, hidden_size=256, num_hidden_layers=LAYERS, num_attention_heads=4
    ),
}  # fmt: skip
LENGTHS = (64, 256, 1000)
OPTIONS: dict[str, dict[str, Any]] = {
    "one row": {"per_device_train_batch_size": 1},
    "one micro-batch": {"gradient_accumulation_steps": 1},
    "no checkpointing": {"gradient_checkpointing": False},
    "plain": {"fast_path": False},
    "activations in host memory": {"offload_activations": True},
    "packing": {"data": DataConfig("rows.jsonl", packing=True)},
    "adapter in fp32": {"lora": LoraConfig(r=8, adapter_dtype="fp32")},
    "attention alone": {"lora": LoraConfig(r=32, target_modules=("q_proj", "v_proj"))},
    "DoRA": {"lora": LoraConfig(r=8, use_dora=True)},
    "trained head": {"lora": LoraConfig(r=8, modules_to_save=("lm_head",))},
    "dropout": {"lora": LoraConfig(r=8, lora_dropout=0.1)},
    "one layer": {"lora": LoraConfig(r=8, layers_to_transform=(3,))},
    "no double quantization": {"quant": QuantConfig(double_quant=False)},
    "classifier": {"task": "seq-cls"},
    "shards": {"sharding": "fsdp", "gpus": 2, "plan": True},
    "shards in host memory": {"sharding": "fsdp", "gpus": 3, "offload_base": True, "plan": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`folder(name)`: a folder with nothing but the config.json of one of CONFIGS."""

    @cache
    def written(name: str) -> Path:
        path = tmp_path_factory.mktemp("config") / name
        CONFIGS[name].save_pretrained(path)
        return path

    return written


def config_of(model: Path, **settings: Any) -> TrainConfig:
    known: Any = {"model": str(model), "output_dir": "out", "data": DataConfig("rows.jsonl")}
    known |= {"lora": LoraConfig(r=8), "quant": QuantConfig(allow_unquantized=True)}
    return TrainConfig(**(known | settings))


def with_length(config: TrainConfig, tokens: int) -> TrainConfig:
    return replace(config, data=replace(config.data, max_length=tokens))


def counted(plan: Plan) -> int:
    return plan.peak_bytes - plan.parts[CONTEXT] - plan.parts[ALLOWANCE] - plan.parts[WORKSPACES]


def require_equal_plans(config: TrainConfig, lengths: tuple[int, ...]) -> None:
    """A plan of a few layers is that of a direct count of all."""
    some, every = Planner(config), Planner(config, direct=True)
    assert len(some.sample.parts) <= len(every.sample.parts)
    for tokens in lengths:
        ours, direct = (p.plan(with_length(config, tokens)) for p in (some, every))
        assert counted(ours) == pytest.approx(counted(direct), rel=0.02)
        assert (ours.peak_at, ours.disk) == (direct.peak_at, direct.disk)
        assert counted(ours) > sum(ours.parts[kind] for kind in (LINEAR, ADAPTERS))


@pytest.mark.parametrize("name", CONFIGS)
def test_few_layers_count_as_all(name, folder):
    require_equal_plans(config_of(folder(name)), LENGTHS)


@pytest.mark.parametrize("name", axis("llama", "gemma3"))
@pytest.mark.parametrize("option", OPTIONS)
def test_few_layers_count_as_all_with_each_option(option, name, folder):
    require_equal_plans(config_of(folder(name), **OPTIONS[option]), LENGTHS[1:2])


def test_weights_of_an_encoder_decoder_are_those_that_are_loaded(tmp_path):
    sizes: dict[str, Any] = {"d_model": 128, "d_ff": 256, "d_kv": 64, "num_heads": 2}
    t5 = transformers.T5Config(vocab_size=320, num_layers=3, **sizes, decoder_start_token_id=0)
    transformers.T5ForConditionalGeneration(t5).bfloat16().save_pretrained(tmp_path)
    config = config_of(tmp_path, task="seq2seq")
    planner = Planner(config)
    plan = planner.plan(with_length(config, 64))
    quant = QuantConfig(compute_dtype="bf16", allow_unquantized=True)
    model = load_base(str(tmp_path), quant, task="seq2seq")
    held = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    for state in (getattr(p, "quant_state", None) for p in model.parameters()):
        if state is not None:
            parts = (state.absmax, state.code, state.offset)
            held |= {id(t): t.nbytes for t in (*parts, state.state2.absmax, state.state2.code)}
    kinds = (LINEAR, EMBEDDING, HEAD, OTHER)
    assert sum(plan.parts.get(kind, 0) for kind in kinds) == pytest.approx(
        sum(held.values()), rel=0.01
    )
    assert planner.plan(with_length(config, 512)).peak_bytes > plan.peak_bytes


def test_weights_and_adapters_are_those_of_the_sizes(folder):
    plan = Planner(config_of(folder("llama"))).plan()
    hidden, inner, heads, keys, r = 256, 512, 4, 2, 8
    shapes = [(hidden, hidden), (hidden * keys // heads, hidden), (hidden * keys // heads, hidden)]
    shapes += [(hidden, hidden), (inner, hidden), (inner, hidden), (hidden, inner)]
    weights = LAYERS * sum(out * width for out, width in shapes)
    # 4 bits, a byte a block, fp32 for 256 blocks; two tables and a mean for each weight
    codes = weights / 2 + weights / 64 + 4 * weights / 64 / 256
    tables = LAYERS * len(shapes) * 4 * (16 + 256 + 1)
    assert plan.parts[LINEAR] == pytest.approx(codes + tables, rel=1e-3)
    adapters = 2 * LAYERS * sum(r * (out + width) for out, width in shapes)
    assert plan.parts[ADAPTERS] == plan.parts[GRADIENTS] == plan.disk["adapter"] == adapters
    assert plan.parts[EMBEDDING] == plan.parts[HEAD] == 2 * 320 * hidden
    assert plan.disk["merged model in 16 bits"] == 2 * (weights + 2 * 320 * hidden + 15 * hidden)
    assert plan.peak_at


def test_what_is_trained_in_full_is_in_fp32(folder):
    config = config_of(folder("llama"))
    whole = replace(config, lora=LoraConfig(r=8, modules_to_save=("lm_head",)))
    plain, with_head = (Planner(c).plan() for c in (config, whole))
    assert with_head.disk["adapter"] - plain.disk["adapter"] == 4 * 320 * 256


def test_checkpointing_saves_the_input_of_each_layer(folder):
    config = config_of(folder("llama"))
    rows, tokens = 2, 1000
    plan = Planner(with_length(config, tokens)).plan()
    saved = max(segment.end[SAVED] for segment in plan.segments)
    inputs = (LAYERS + 1) * rows * tokens * 256 * 2
    ids, rotation = 3 * 8 * rows * tokens, 2 * 2 * 64 * rows * tokens  # labels; cosines and sines
    assert saved == pytest.approx(inputs + ids + rotation, rel=1e-3)


def test_embedding_in_host_memory(folder):
    config = config_of(folder("llama"))
    before, after = (
        Planner(replace(config, offload_embedding=there)).plan() for there in (False, True)
    )
    assert after.host == {"embedding": before.parts[EMBEDDING]}
    assert before.peak_bytes - after.peak_bytes == pytest.approx(2 * 320 * 256 * 1.03, rel=1e-3)
    with pytest.raises(UserError, match="tied to the output head"):
        Planner(replace(config, model=str(folder("gemma2")), offload_embedding=True)).plan()


@pytest.mark.parametrize("dtype, size", [("bf16", 2), ("fp32", 4)])
def test_several_gpus_have_the_gradients_twice_before_the_optimizer_step(dtype, size, folder):
    """And of each matrix a number beside its gradient, as the tensor of the all-reduce has."""
    lora = LoraConfig(r=8, adapter_dtype=dtype)
    config = config_of(folder("llama"), lora=lora, gradient_accumulation_steps=3, plan=True)
    one, four = (Planner(replace(config, gpus=gpus)).plan() for gpus in (None, 4))
    gradients = one.parts[GRADIENTS] + LAYERS * 7 * 2 * size
    *_, total, step = four.segments
    assert +total.rise == {ALL_REDUCE: gradients} and step.start == total.start
    assert (four.parts, four.peak_at) == (one.parts, one.peak_at)  # the peak is in another part
    assert (one.sent_bytes, four.sent_bytes) == (0, gradients * 2 * 3 // 4)
    assert (one.rows_a_step, four.rows_a_step) == (2 * 3, 2 * 3 * 4)


def test_shards_are_a_part_of_the_base_with_three_layers_and_the_vocabulary_gathered(folder):
    """Of a model whose sizes are known: half a byte a value of a layer, two of the vocabulary."""
    config = config_of(folder("llama"), gradient_accumulation_steps=3, plan=True, gpus=4)
    whole = Planner(config).plan()
    text = AutoConfig.from_pretrained(folder("llama"))
    layer = sum(p.numel() for p in decoder_layer(text).parameters() if p.ndim == 2) // 2
    vocabulary = 2 * 2 * text.vocab_size * text.hidden_size  # the embedding, and the head
    assert whole.parts[EMBEDDING] + whole.parts[HEAD] == vocabulary
    for offload, held in ((False, LAYERS * layer // 4), (True, 0)):
        made = Planner(replace(config, sharding="fsdp", offload_base=offload)).plan()
        assert whole.parts[LINEAR] - made.parts[LINEAR] == LAYERS * layer - held
        assert made.parts[EMBEDDING] + made.parts[HEAD] == vocabulary // 4
        copied = layer // 4 if offload else 0
        assert made.parts[GATHERED] == 3 * layer + vocabulary + copied
        assert made.host == ({"shards of the base": LAYERS * layer // 4} if offload else {})
        assert made.gathered_bytes == vocabulary + 2 * LAYERS * layer
        assert made.sent_bytes - whole.sent_bytes == 3 * made.gathered_bytes * 3 // 4
        assert GATHERED not in +made.segments[-1].peak
    with pytest.raises(UserError, match="--sharding fsdp is for several GPUs: give --gpus N"):
        Planner(replace(config, sharding="fsdp", gpus=None)).plan()


def decoder_layer(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).model.layers[0]


@pytest.mark.parametrize(
    "optim, dtype, a_number",
    [
        # 2 states of a byte or 4, and the lower half of the master weight
        ("paged_adamw_8bit", torch.bfloat16, 2 + 2),
        ("paged_adamw_32bit", torch.bfloat16, 8 + 2),
        ("adamw_torch", torch.bfloat16, 8 + 2),
        ("adamw_torch", torch.float32, 8),
        ("adamw_torch_fused", torch.float32, 8),
        ("sgd", torch.float32, 0),
    ],
)
def test_state_of_an_optimizer(optim, dtype, a_number, tmp_path):
    config = config_of(tmp_path, optim=optim)
    found = optimizer_bytes(config, [(dtype, (16, 4096))] * 100)
    assert found.state == pytest.approx(a_number * 100 * 16 * 4096, rel=0.02)


def test_budget_of_a_card():
    config = config_of(Path("model"), plan=True)
    assert budget(replace(config, gpu_memory="8GiB")) == 8 << 30
    with pytest.raises(UserError, match=r"--gpu-memory: size must look like 5GB .* got 'much'"):
        budget(replace(config, gpu_memory="much"))
