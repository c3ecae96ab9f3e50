"""load_base: which layers are 4-bit, the effect of the settings, and refused checkpoints."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import reference
import torch
from adapter_kinds import logits
from bitsandbytes.functional import dequantize_blockwise
from bitsandbytes.nn import Linear4bit
from conftest import FP32, axis, on_gpu, randomize_adapter, tiny_model, token_ids
from merging import require_logits, run_merge
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

from qlora.adapters.apply import apply_lora
from qlora.adapters.files import save_adapter
from qlora.adapters.fuse import merge_and_unload
from qlora.adapters.lora import lora_layers
from qlora.base.checkpoint import Checkpoint
from qlora.base.load import Decoded4bit, compute_dtype, load_base, load_tokenizer
from qlora.base.modules import dense_weight, output_head, state_of
from qlora.config import LoraConfig, QuantConfig
from qlora.errors import UserError
from qlora.ops import nf4
from qlora.training import prepare_for_training

EACH_FAMILY = ["llama", *axis("gpt2", "qwen2", "qwen3", "mistral", "gemma", "phi")]
LAYERS = {"gpt2": 8, "phi": 12}  # others: 14


def four_bit_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}


def load(folder, **settings):
    quant = QuantConfig(**{"compute_dtype": "fp32", **settings})
    return load_base(str(folder), quant, device="cpu")


def disk_weights(folder, layers):
    """The weights (out, in) of `layers` as the checkpoint has them."""
    disk = load_file(folder / "model.safetensors")
    gpt2 = Checkpoint(folder).config["model_type"] == "gpt2"
    return {name: disk[f"{name}.weight"].T if gpt2 else disk[f"{name}.weight"] for name in layers}


@pytest.fixture(scope="module")
def bases(checkpoints):
    """`bases("llama")`: that tiny model in 4 bits, loaded once; tests do not change it."""
    return cache(lambda family: load(checkpoints(family)))


@pytest.mark.parametrize("family", axis("llama", "gpt2", "phi"))
@pytest.mark.parametrize("name", axis("bf16", "fp16", "fp32"))
def test_everything_else_has_the_compute_dtype(checkpoints, family, name):
    dtype = nf4.DTYPES[name]
    model = load(checkpoints(family), compute_dtype=name)
    codes = {f"{layer}.weight" for layer in four_bit_layers(model)}
    assert {p.dtype for n, p in model.named_parameters() if n not in codes} == {dtype}
    assert {layer.compute_dtype for layer in four_bit_layers(model).values()} == {dtype}


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_all_linear_layers_but_the_head_are_4_bit_and_frozen(checkpoints, bases, family):
    """Codes are those of the weights on disk, logits those of the model with rounded weights."""
    model, rounded = bases(family), tiny_model(family)
    layers, disk = four_bit_layers(model), load_file(checkpoints(family) / "model.safetensors")
    dense = {n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    assert dense == {"lm_head"}
    assert output_head(model) is model.lm_head
    assert len(layers) == LAYERS.get(family, 14)
    assert {m.weight.dtype for m in layers.values()} == {torch.uint8}
    assert not any(p.requires_grad for p in model.parameters())
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(parameter, disk[name]), name
    for name, weight in disk_weights(checkpoints(family), layers).items():
        codes = reference.quantize(weight, reference.NF4, 64)
        differ = reference.unpack(layers[name].weight) != codes.indices
        assert not (differ & ~reference.near_ties(weight, reference.NF4, 64)).any(), name
        exact = reference.round_trip(weight, double_quant=True)
        parameter = rounded.get_parameter(f"{name}.weight").data
        parameter.copy_(exact.T if family == "gpt2" else exact)
    # 1e-3: bitsandbytes sometimes takes the neighbouring level for an absmax (see test_nf4)
    assert reference.relative_rms(logits(model), logits(rounded)) < 1e-3
    assert reference.relative_rms(logits(model), logits(tiny_model(family))) > 0.01


@on_gpu
def test_the_codes_on_a_gpu_are_those_of_the_cpu(checkpoints, bases):
    model = load_base(str(checkpoints("llama")), FP32, device="cuda")
    for name, layer in four_bit_layers(bases("llama")).items():
        assert torch.equal(model.get_submodule(name).weight.cpu(), layer.weight)


def decode(layer):
    """The weight (out, in) that a layer's codes and absmax give."""
    state = layer.weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    values = state.code[torch.from_numpy(reference.unpack(layer.weight)).int()]
    return (values * absmax.repeat_interleave(state.blocksize)[: values.numel()]).view(state.shape)


@pytest.mark.parametrize("family", axis("llama", "gpt2"))
@pytest.mark.parametrize(
    ("settings", "grid", "levels"),
    [
        ({"blocksize": 32}, ("nf4", 32, True), reference.NF4),
        ({"blocksize": 4096, "double_quant": False}, ("nf4", 4096, False), reference.NF4),
        ({"quant_type": "fp4", "double_quant": False}, ("fp4", 64, False), reference.FP4),
    ],
)
def test_quantization_settings_take_effect(checkpoints, family, settings, grid, levels):
    layers = four_bit_layers(load(checkpoints(family), **settings))
    for name, weight in disk_weights(checkpoints(family), layers).items():
        state = layers[name].weight.quant_state
        assert (state.quant_type, state.blocksize, state.nested) == grid
        exact = reference.round_trip(weight, levels, blocksize=grid[1], double_quant=grid[2])
        # 0.4 %: one of 2,048 values half-way between two levels, or a neighbouring absmax level
        # (test_nf4); another blocksize or code is off by 5 % and more
        assert reference.relative_rms(decode(layers[name]), exact) < 0.004


def test_skipped_modules_stay_unquantized(checkpoints):
    skip = ("q_proj", "layers.1.mlp", "layers.0.mlp.up_proj", "absent")
    model = load(checkpoints("llama"), skip_modules=skip)
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    dense = {name.removeprefix("model.layers.") for name in linear}
    assert dense == {
        "lm_head", "0.self_attn.q_proj", "1.self_attn.q_proj", "0.mlp.up_proj",
        *(f"1.mlp.{leaf}_proj" for leaf in ("gate", "up", "down")),
    }  # fmt: skip
    assert len(four_bit_layers(model)) == 14 - 6


def test_the_compute_dtype_is_the_named_one_or_bf16_where_the_hardware_has_it(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for name, dtype in nf4.DTYPES.items():
        assert compute_dtype(QuantConfig(compute_dtype=name), cpu) == dtype
    for avx512, amx in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda has=avx512: has)
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda has=amx: has)
        wanted = torch.bfloat16 if avx512 or amx else torch.float32
        assert compute_dtype(QuantConfig(), cpu) == wanted
    for has_bf16, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda has=has_bf16, **_: has)
        assert compute_dtype(QuantConfig(), gpu) == dtype


def test_an_opened_checkpoint_loads_like_its_name_and_describes_itself(checkpoints, bases):
    base, named = checkpoints("llama"), bases("llama")
    before = {file: file.read_bytes() for file in base.iterdir()}
    model = load_base(Checkpoint.open(str(base)), FP32, device="cpu")
    assert {file: file.read_bytes() for file in base.iterdir()} == before
    assert torch.equal(logits(model), logits(named))
    assert model.config._name_or_path == named.config._name_or_path == str(base)
    assert state_of(tiny_model("llama")).record() == {}
    assert state_of(model).record() == state_of(named).record()
    assert state_of(model).record() == {
        "fingerprint": Checkpoint(base).fingerprint, "quant_type": "nf4", "blocksize": 64,
        "double_quant": True, "compute_dtype": "fp32", "skip_modules": [], "revision": None,
        "task": "causal-lm",
    }  # fmt: skip
    settings = model.config.quantization_config  # Trainer reads it before it trains an adapter
    assert model.is_loaded_in_4bit
    assert (settings.quant_method, settings.bnb_4bit_quant_type) == ("bitsandbytes", "nf4")
    assert settings.bnb_4bit_use_double_quant
    assert settings.llm_int8_skip_modules == ["lm_head"]
    assert not settings.to_diff_dict().get("blocksize")


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_a_saved_4_bit_model_has_the_same_logits_and_generates(bases, tmp_path, family):
    """Greedy tokens are the argmax of the logits over the sequence so far."""
    bases(family).save_pretrained(tmp_path)
    again, ids = load(tmp_path), token_ids(rows=1)
    assert four_bit_layers(again).keys() == four_bit_layers(bases(family)).keys()
    assert torch.equal(logits(again), logits(bases(family)))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train()
    # in train mode bitsandbytes does not repack; 1e-5: fp32 rounding, another compute path
    assert torch.allclose(logits(theirs), logits(bases(family)), rtol=0, atol=1e-5)
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = again.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert tokens.shape == (1, ids.shape[1] + 3)
    with torch.no_grad():
        predicted = again(tokens).logits[:, ids.shape[1] - 1 : -1].argmax(-1)
    assert torch.equal(predicted, tokens[:, ids.shape[1] :])


@pytest.mark.parametrize("tied", [True, False])
def test_a_4_bit_model_of_transformers_has_the_same_logits(checkpoints, tmp_path, tied):
    """Its config.json has no list of skipped layers; the head is skipped all the same."""
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs = AutoModelForCausalLM.from_pretrained(
        checkpoints("llama", tied), dtype=torch.float32, quantization_config=settings
    )
    theirs.save_pretrained(tmp_path)
    assert Checkpoint(tmp_path).config["quantization_config"]["llm_int8_skip_modules"] is None
    ours = load(tmp_path)
    assert four_bit_layers(ours).keys() == four_bit_layers(theirs).keys()
    # in train mode bitsandbytes does not repack; 1e-5: fp32 rounding, another compute path
    assert torch.allclose(logits(ours), logits(theirs.train()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("storage", [torch.bfloat16, *axis(torch.float16, torch.float32)])
def test_codes_stored_as_a_float_dtype(checkpoints, tmp_path, storage):
    """As FSDP needs them: loaded here or by transformers, trained, saved, merged and fused."""
    base, saved = checkpoints("llama"), tmp_path / "base"
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=storage, **options)
    theirs = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=settings
    )
    theirs.save_pretrained(saved)
    logits(theirs)  # on some CPUs bitsandbytes now repacks the weights
    ours, plain = load(saved), load(base)
    assert torch.equal(logits(ours), logits(plain))
    assert {layer.weight.dtype for layer in four_bit_layers(ours).values()} == {torch.uint8}
    for model in (ours, theirs, plain):
        apply_lora(
            model, LoraConfig(r=2, use_dora=True), generator=torch.Generator().manual_seed(0)
        )
        randomize_adapter(model)
        prepare_for_training(model.train())
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    live = logits(plain.eval())
    # 1 %: of theirs absmax may be rounded to bf16
    for model, most in ((ours, 1e-5), (theirs, 0.01)):
        assert reference.relative_rms(logits(model.eval()), live) < most
    save_adapter(ours, tmp_path / "adapter")
    run_merge(tmp_path / "adapter", tmp_path / "out", format="fp32")
    require_logits(tmp_path / "out", live)
    assert reference.relative_rms(logits(merge_and_unload(theirs)), live) < 0.01


@pytest.mark.parametrize("empty", [{}, None])
def test_an_empty_quantization_config_is_none(checkpoints, tmp_path, empty):
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "base")
    values = json.loads((folder / "config.json").read_text()) | {"quantization_config": empty}
    (folder / "config.json").write_text(json.dumps(values))
    model = load(folder)
    assert len(four_bit_layers(model)) == 14
    assert model.config.quantization_config.load_in_4bit


def test_a_4_bit_checkpoint_keeps_all_but_the_compute_dtype(checkpoints, tmp_path, capsys):
    settings = {"quant_type": "fp4", "blocksize": 32, "double_quant": False}
    first = load(checkpoints("llama"), **settings, skip_modules=("q_proj",))
    first.save_pretrained(tmp_path)
    again = load(tmp_path, quant_type="nf4", blocksize=128)
    assert "is 4-bit already: fp4, blocksize 32, double quantization off" in capsys.readouterr().out
    assert torch.equal(logits(again), logits(first))
    assert settings.items() <= state_of(again).record().items()
    assert state_of(again).fingerprint == state_of(first).fingerprint
    assert state_of(again).original_weights is None
    half = load(tmp_path, compute_dtype="bf16")
    assert {layer.compute_dtype for layer in four_bit_layers(half).values()} == {torch.bfloat16}
    # transformers leaves norm weights in the stored dtype, and LayerNorm refuses the mixture
    assert {p.dtype for p in half.parameters() if p.is_floating_point()} == {torch.bfloat16}


def test_fused_experts_are_refused_unless_allowed_or_skipped(checkpoints):
    base = checkpoints("mixtral")
    experts = (r"gate_up_proj \(65,536 values\)", r"down_proj \(32,768 values\)", "--allow-unquant")
    with pytest.raises(UserError, match=".*".join(["^4 linear weights cannot be quant", *experts])):
        load(base)
    load(base, skip_modules=("experts",))
    model = load(base, allow_unquantized=True)
    assert set(four_bit_layers(model)) == {
        f"model.layers.{i}.self_attn.{leaf}_proj" for i in (0, 1) for leaf in "qkvo"
    }
    experts, exact = (m.model.layers[0].mlp.experts for m in (model, tiny_model("mixtral")))
    assert torch.equal(experts.down_proj, exact.down_proj)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_forward_pass_in_eval_mode_does_not_repack_the_weights(checkpoints, name):
    model = load(checkpoints("llama"), compute_dtype=name)
    before = {n: layer.weight.data.clone() for n, layer in four_bit_layers(model).items()}
    in_training = logits(model.train())
    assert torch.equal(logits(model.eval()), in_training)
    for n, layer in four_bit_layers(model).items():
        assert torch.equal(layer.weight.data, before[n])
        assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    inputs = model.get_input_embeddings()(token_ids()).detach().requires_grad_()
    with_grad = model.train()(inputs_embeds=inputs).logits
    with_grad.sum().backward()
    assert torch.equal(with_grad, in_training)


def without(tensor):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        del tensors[tensor]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def quantized(settings):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = settings
        (folder / "config.json").write_text(json.dumps(config))

    return change


def stops(text):
    return lambda folder: (folder / "generation_config.json").write_text(text)


CLASSIFIER = {"task": "seq-cls", "labels": ("a", "b", "c")}
NORM, MATRIX = "model.layers.1.input_layernorm.weight", "bert.encoder.layer.0.output.dense.weight"


@pytest.mark.parametrize(
    ("family", "change", "settings", "match"),
    [
        ("llama", without(NORM), {}, f"lacks 1 tensors of its model.*: {NORM}"),
        ("bert", without(MATRIX), CLASSIFIER, f"lacks 1 tensors of its model.*: {MATRIX}"),
        (
            "llama",
            quantized({"quant_method": "gptq"}),
            {},
            "already quantized, with gptq: give its 16-bit model",
        ),
        ("llama", quantized({"load_in_8bit": True}), {}, "already quantized, with bitsandbytes"),
        ("llama", quantized({"load_in_4bit": True}), {}, "bitsandbytes 4-bit, its tensors have no"),
        ("llama", quantized(["fp8"]), {}, "quantization_config must be NAME: VALUE pairs"),
        ("llama", stops("[1, 2]"), {}, "generation_config.json is not a JSON object: got a list"),
        ("llama", stops('"2"'), {}, "generation_config.json is not a JSON object: got a str"),
    ],
)
def test_checkpoints_that_are_refused(checkpoints, tmp_path, family, change, settings, match):
    folder = shutil.copytree(checkpoints(family), tmp_path / "base")
    change(folder)
    with pytest.raises(UserError, match=match):
        load_base(str(folder), FP32, device="cpu", **settings)


AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


@pytest.mark.parametrize(
    ("width", "blocksize", "is_right"),
    [(576, 64, True), (64, 64, True), (128, 64, True), (2048, 4096, True), (576, 128, not AVX512),
     (32, 64, not AVX512), (64, 128, not AVX512), (512, 1024, not AVX512)],
)  # fmt: skip
def test_widths_at_which_a_cpu_kernel_has_wrong_weights(width, blocksize, is_right):
    """bitsandbytes 0.50 with AVX-512, where a block is no part of a row: silent errors of 5 to
    35 %. When this fails, bitsandbytes has fixed it."""
    assert nf4.kernel_is_right(width, blocksize) is is_right


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_layers_of_these_widths_are_decoded_by_nf4(family, checkpoints, monkeypatch):
    """64 inputs and blocks of 128: outputs and input gradients are those of the dense weights."""
    monkeypatch.setattr("qlora.ops.nf4.kernel_is_right", lambda *_: False)
    model = load(checkpoints(family), blocksize=128)
    layers = four_bit_layers(model).values()
    assert layers and all(type(layer) is Decoded4bit for layer in layers)
    for layer in layers:
        x, y = torch.randn(2, 3, layer.in_features), torch.randn(2, 3, layer.out_features)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        wanted = F.linear(theirs, dense_weight(layer), layer.bias)
        torch.testing.assert_close(layer(ours), wanted, rtol=1e-5, atol=1e-5)
        (layer(ours) * y).sum().backward()
        (wanted * y).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_layers_decoded_by_nf4_get_adapters(dtype, checkpoints, monkeypatch):
    monkeypatch.setattr("qlora.ops.nf4.kernel_is_right", lambda *_: False)
    model = load(checkpoints("llama"), compute_dtype=dtype)
    adapted = lora_layers(apply_lora(model, LoraConfig(r=2))).values()
    assert len(adapted) == 14 and all(type(layer.base_layer) is Decoded4bit for layer in adapted)


@pytest.mark.parametrize("text", ['{"a": ', "{}", "[1]", "\xff"])
def test_a_damaged_tokenizer_file_is_one_line(text, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "base")
    (folder / "tokenizer.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="base holds no tokenizer to load: "):
        load_tokenizer(folder)


@pytest.fixture
def family_config(monkeypatch):
    """`tiny_config` of benchmarks/family_sizes.py."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from family_sizes import tiny_config

    return tiny_config


def test_the_language_model_of_a_checkpoint_with_images_loads(family_config, tmp_path):
    # AutoModelForCausalLM has a model for the whole config, and none for its text_config
    config = family_config("mllama")
    whole = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    whole.save_pretrained(tmp_path)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    model = load(tmp_path, skip_modules=tuple(dict(wanted.named_children())))
    ids = token_ids() % config.text_config.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, wanted(ids).logits)


@pytest.mark.parametrize("kind", ["reformer", "rwkv", "zamba", "zamba2"])
def test_a_family_that_cannot_be_trained_is_refused_by_name(kind, family_config, tmp_path):
    AutoModelForCausalLM.from_config(family_config(kind)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"is of type {kind}, which is not supported: its?"):
        load(tmp_path)
