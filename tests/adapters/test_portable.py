"""The portable adapter is the same function, in PEFT and by each consumer's own arithmetic."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import FP32, randomize_adapter, tiny_model, token_ids
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora.adapters.apply import apply_lora
from qlora.adapters.files import load_adapter, save_adapter
from qlora.adapters.format import CONFIG, WEIGHTS
from qlora.adapters.lora import lora_layers
from qlora.adapters.portable import CONSUMERS, make_portable, portable_subset, problems
from qlora.base.load import load_base
from qlora.config import LoraConfig, MergeConfig, PortableConfig
from qlora.config.lora import pattern_key
from qlora.errors import UserError
from qlora.merge import merge

# transformers 5.23 deprecates a property that PEFT 0.21 asks for; PEFT warns of what it saves
# whole.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

SAME = {"rtol": 0, "atol": 1e-5}  # fp32: the same sums in another order
ALPHAS = {
    "none": {},
    "doubled": {"v_proj": 32, "down_proj": 8},
    "odd": {"v_proj": 3, "k_proj": 7.7},
}
RANKS = {"none": {}, "uneven": {"q_proj": 2, r"layers\.1\..*down_proj": 6}}
KINDS = [
    {"use_rslora": rs, "alpha_pattern": alphas, "rank_pattern": ranks}
    for rs in (False, True)
    for alphas in ALPHAS.values()
    for ranks in RANKS.values()
]
UNEVEN = {"rank_pattern": RANKS["uneven"], "alpha_pattern": ALPHAS["odd"]}
PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"]}


def files(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return (
        json.loads((folder / CONFIG).read_text()),
        load_file(folder / WEIGHTS),
    )


def ours(model: Any, **settings: Any) -> Any:
    """`model` with an adapter that is not idle."""
    apply_lora(model, LoraConfig(**{"r": 4, "lora_alpha": 16, **settings})).eval()
    randomize_adapter(model)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


# ---- the same function ----


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_peft_computes_the_same_from_it(kind, dtype, checkpoints, tmp_path):
    base = str(checkpoints("llama"))
    model = ours(load_base(base, FP32), adapter_dtype=dtype, **kind)
    assert save_adapter(model, tmp_path, portable=True) == tmp_path
    loaded = peft.PeftModel.from_pretrained(load_base(base, FP32), tmp_path)
    torch.testing.assert_close(logits(loaded.eval()), logits(model), **SAME)
    again = load_adapter(load_base(base, FP32), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), **SAME)
    assert (logits(model) - logits(load_base(base, FP32))).abs().max() > 1e-2


def scaling_of(consumer: str, values: dict[str, Any], module: str, rank: int) -> float:
    """What a consumer multiplies a module's B A with.

    vllm/lora/peft_helper.py get_rank_and_scaling; python/sglang/srt/lora/lora.py, LoRAAdapter;
    llama.cpp's src/llama-adapter.h get_scale; TGI's adapters/lora.py get_scaling_factor.
    """
    alpha, r = values["lora_alpha"], values["r"]
    if consumer == "vLLM":
        pattern = values["alpha_pattern"]
        key = pattern_key(pattern, module)
        alpha, r = (alpha if key is None else pattern[key]), rank
    if consumer == "llama.cpp":
        r = rank
    root = values["use_rslora"] and consumer in ("vLLM", "TGI")
    return float(alpha / (math.sqrt(r) if root else r))


def errors(consumer: str, folder: Path, model: Any) -> list[float]:
    """How far a consumer's B A is from each layer's in `model`, relative, in fp64."""
    values, tensors = files(folder)
    found = []
    for name, layer in lora_layers(model).items():
        lora_A, lora_B = (
            tensors[f"base_model.model.{name}.lora_{s}.weight"].double() for s in "AB"
        )
        got = scaling_of(consumer, values, name, len(lora_A)) * lora_B @ lora_A
        own_A, own_B, scaling, _ = layer.factors("default")
        wanted = scaling * own_B.double() @ own_A.double()
        found.append(float(((got - wanted).norm() / wanted.norm()).detach()))
    return found


@pytest.mark.parametrize("consumer", ["vLLM", "SGLang", "llama.cpp", "TGI"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_consumer_computes_the_same_from_it(kind, consumer, tmp_path):
    model = ours(tiny_model("llama"), **kind)
    save_adapter(model, tmp_path / "plain")
    save_adapter(model, tmp_path / "portable", portable=True)
    found = problems(*files(tmp_path / "portable"))
    assert not any(found.values())
    assert max(errors(consumer, tmp_path / "portable", model)) < 1e-7  # fp32's rounding of B
    # and from the plain file just where there is no problem with it
    if not any("refuses" in what for what in problems(*files(tmp_path / "plain"))[consumer]):
        is_same = max(errors(consumer, tmp_path / "plain", model)) < 1e-7
        assert is_same == (not problems(*files(tmp_path / "plain"))[consumer])


@pytest.mark.parametrize(("alphas", "exact"), [("none", True), ("doubled", True), ("odd", False)])
def test_powers_of_two_are_exact_in_any_dtype(alphas, exact, tmp_path):
    model = ours(tiny_model("llama"), adapter_dtype="bf16", alpha_pattern=ALPHAS[alphas])
    save_adapter(model, tmp_path, portable=True)
    values, tensors = files(tmp_path)
    dtypes = {name.split(".")[-3] for name, t in tensors.items() if t.dtype == torch.float32}
    assert dtypes == (set() if exact else {"v_proj", "k_proj"})  # the others are untouched
    assert (values["lora_alpha"], values["r"]) == (16, 4)
    assert (max(errors("SGLang", tmp_path, model)) == 0) == exact


def test_a_portable_adapter_stays_as_it_is(tmp_path):
    save_adapter(ours(tiny_model("llama")), tmp_path)
    values, tensors = files(tmp_path)
    again, same = portable_subset(values, tensors, tmp_path)
    assert {k: again[k] for k in values} == values
    assert all(same[name] is tensor for name, tensor in tensors.items())


@st.composite
def pairs(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """An adapter of some layers (3, 5), each with its own r, alpha and dtype."""
    values = {**PLAIN, "use_rslora": draw(st.booleans()), "rank_pattern": {}, "alpha_pattern": {}}
    tensors = {}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    for i in range(draw(st.integers(1, 4))):
        r = values["rank_pattern"][f"m{i}"] = draw(st.integers(1, 9))
        values["alpha_pattern"][f"m{i}"] = draw(st.floats(2**-8, 2**12))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        for name, shape in (("A", (r, 5)), ("B", (3, r))):
            value = torch.randn(shape, generator=generator).to(dtype)
            tensors[f"base_model.model.m{i}.lora_{name}.weight"] = value
    return values, tensors


@given(pairs())
def test_b_times_a_is_the_same_for_any_ranks_and_alphas(adapter):
    values, tensors = adapter
    portable, baked = portable_subset(values, tensors, Path("x"))
    scaling = portable["lora_alpha"] / portable["r"]
    assert not portable["use_rslora"]
    assert baked.keys() == tensors.keys()
    for key, r in values["rank_pattern"].items():
        old, new = (
            [t[f"base_model.model.{key}.lora_{s}.weight"].double() for s in "AB"]
            for t in (tensors, baked)
        )
        alpha = values["alpha_pattern"][key]
        wanted = alpha / (r**0.5 if values["use_rslora"] else r) * old[1] @ old[0]
        assert new[0].shape == (portable["r"], 5) and new[1].shape == (3, portable["r"])
        # one rounding of B to fp32, 6e-8, of terms that may cancel in the sum
        scale = float(old[1].abs().max() * old[0].abs().max()) * r * alpha
        torch.testing.assert_close(scaling * new[1] @ new[0], wanted, rtol=0, atol=1e-7 * scale)


def test_the_merge_of_it_is_the_same(checkpoints, tmp_path):
    model = ours(load_base(str(checkpoints("llama")), FP32), use_rslora=True, **UNEVEN)
    merged = []
    for portable in (False, True):
        folder, output = tmp_path / f"adapter-{portable}", tmp_path / f"merged-{portable}"
        save_adapter(model, folder, portable=portable)
        merge(MergeConfig(adapter=str(folder), output_dir=str(output), format="fp32"))
        merged.append(logits(AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)))
    torch.testing.assert_close(*merged, **SAME)


# ---- the config ----


@pytest.mark.parametrize(
    "chosen",
    [
        {"target_modules": r".*layers\.1\..*(q|v)_proj"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0\..*"},
    ],
    ids=str,
)
def test_the_layers_that_peft_chose_become_a_list(chosen, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights="gaussian", **chosen)
    model = peft.get_peft_model(tiny_model("llama"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(tmp_path / "in")
    make_portable(PortableConfig(adapter=str(tmp_path / "in"), output_dir=str(tmp_path / "out")))
    values, _ = files(tmp_path / "out")
    assert values["target_modules"] == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    assert values["init_lora_weights"] is True
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded), logits(model.eval()), **SAME)


def test_a_list_of_endings_is_kept_and_what_is_unknown_too():
    tensors = pair("a.q")
    values, _ = portable_subset({**PLAIN, "base_model_name_or_path": "b"}, tensors, Path("x"))
    assert values["target_modules"] == ["q"]
    assert values["base_model_name_or_path"] == "b"
    assert (values["r"], values["lora_alpha"]) == (4, 8)
    assert type(values["lora_alpha"]) is int


def pair(module: str) -> dict[str, torch.Tensor]:
    prefix = f"base_model.model.{module}.lora"
    return {f"{prefix}_A.weight": torch.ones(4, 6), f"{prefix}_B.weight": torch.ones(6, 4)}


# ---- what is refused ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, r"DoRA's magnitudes \(.*q_proj.*\): merge_dequant.py folds that in$"),
        ({"bias": "all"}, r"biases \(.*\): merge_dequant.py folds"),
        ({"lora_bias": True}, r"lora_bias \(q_proj, v_proj\): merge_dequant"),
        ({"modules_to_save": ["lm_head"]}, r"modules trained in full \(lm_head\): merge_dequant"),
        ({"modules_to_save": ["norm"]}, r"norms trained in full \(.*norm.*\): merge_dequant"),
        ({"target_modules": ["embed_tokens"]}, r"embeddings \(embed_tokens\): merge_dequant"),
        ({"trainable_token_indices": [5]}, r"trained token rows \(embed_tokens\): merge_dequant"),
        ({"alora_invocation_tokens": [5]}, r"aLoRA \(.*\): train without it, or serve"),
        ({"init_lora_weights": "pissa"}, r"changes the base \(pissa\): save it with PEFT's path_"),
        (
            {"use_dora": True, "modules_to_save": ["lm_head"], "init_lora_weights": "olora"},
            r"DoRA's magnitudes \(.*\), modules trained in full \(lm_head\): merge_dequant.py "
            r"folds that in; an init that changes the base \(olora\): save it with",
        ),
    ],
    ids=str,
)
def test_what_a_and_b_cannot_say_is_refused(settings, message, tmp_path, capsys):
    settings = {"target_modules": ["q_proj", "v_proj"], **settings}
    family = "qwen2" if "bias" in settings or "lora_bias" in settings else "llama"
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings)
    peft.get_peft_model(tiny_model(family), config).save_pretrained(tmp_path / "in")
    with pytest.raises(
        UserError, match=rf"adapter {tmp_path / 'in'} holds what is not .*{message}"
    ):
        make_portable(
            PortableConfig(adapter=str(tmp_path / "in"), output_dir=str(tmp_path / "out"))
        )
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert len(capsys.readouterr().out.splitlines()) == len(CONSUMERS)  # the verdicts are there
    make_portable(PortableConfig(adapter=str(tmp_path / "in")))  # which is all that was asked for


def test_dora_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="holds what is not portable: DoRA's magnitudes"):
        save_adapter(ours(tiny_model("llama"), use_dora=True), tmp_path / "out", portable=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "tensors", "message"),
    [
        ({"arrow_config": {"top_k": 1}}, {}, "arrow_config="),
        ({"r": 5}, {}, r"has shape \(4, 6\), its config says r=5"),
        ({"lora_bias": True}, {}, r"missing base_model.model.a.q.lora_B.bias"),
        ({}, {"base_model.model.b.lora_A.weight": torch.ones(4, 6)}, r"missing .*b.lora_B.weight"),
        ({"lora_alpha": "8"}, {}, "lora_alpha must be a number above 0"),
    ],
    ids=str,
)
def test_files_at_fault_are_refused(values, tensors, message):
    with pytest.raises(UserError, match=message):
        portable_subset({**PLAIN, **values}, {**pair("a.q"), **tensors}, Path("x"))


def test_a_copy_of_the_base_alone_is_no_adapter():
    copy = {"base_model.model.lm_head.base_layer.weight": torch.ones(6, 4)}
    with pytest.raises(UserError, match="holds no lora_A and lora_B: there is nothing to write"):
        portable_subset(PLAIN, copy, Path("x"))


# ---- the command ----


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """rsLoRA with alphas of their own."""
    model = ours(tiny_model("llama"), use_rslora=True, alpha_pattern={"v_proj": 3})
    return save_adapter(model, tmp_path / "in")


def test_a_line_for_each_consumer(adapter, capsys):
    make_portable(PortableConfig(adapter=str(adapter)))
    rs, alphas = "rsLoRA's scaling (use_rslora=True)", "alphas of their own (v_proj)"
    assert capsys.readouterr().out.splitlines() == [
        "vLLM          takes it",
        f"SGLang        ignores {rs}; ignores {alphas}",
        f"llama.cpp     ignores {rs}; ignores {alphas}",
        f"TGI           ignores {alphas}",
        "transformers  takes it",
        "PEFT          takes it",
        "",
        f"--output-dir DIR writes it without {rs}, {alphas}.",
    ]


def test_the_portable_files_are_written_with_their_metadata(adapter, tmp_path, capsys):
    make_portable(PortableConfig(adapter=str(adapter), output_dir=str(tmp_path / "new" / "out")))
    assert capsys.readouterr().out.count("takes it") == 3 + len(CONSUMERS)
    folder = tmp_path / "new" / "out"
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert [p.name for p in folder.parent.iterdir()] == ["out"]
    records = []
    for path in (adapter, folder):
        with safe_open(path / WEIGHTS, framework="pt") as file:
            records.append(file.metadata())
    assert records[0] == records[1]


def test_a_folder_in_use_is_left_alone(adapter, capsys):
    before = {path: path.read_bytes() for path in adapter.iterdir()}
    with pytest.raises(UserError, match="already holds something: give a new folder"):
        make_portable(PortableConfig(adapter=str(adapter), output_dir=str(adapter)))
    assert {path: path.read_bytes() for path in adapter.iterdir()} == before
    assert capsys.readouterr().out == ""


def test_a_write_that_fails_leaves_nothing(adapter, tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("qlora.adapters.portable.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        make_portable(PortableConfig(adapter=str(adapter), output_dir=str(tmp_path / "out")))
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / CONFIG).unlink(), "holds no adapter_config.json"),
        (lambda f: (f / CONFIG).write_text("{"), "is no JSON"),
        (lambda f: (f / CONFIG).write_text('{"peft_type": "IA3"}'), "is no LoRA"),
        (lambda f: (f / WEIGHTS).write_bytes(b"x"), "damaged or cut short"),
        (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "is a pickle"),
        (lambda f: save_file({"x": torch.ones(1)}, f / WEIGHTS), "unexpected x"),
    ],
)
def test_bad_files_are_refused(adapter, change, message, capsys):
    change(adapter)
    with pytest.raises(UserError, match=message):
        make_portable(PortableConfig(adapter=str(adapter)))
    assert capsys.readouterr().out == ""


def test_the_command_ends_with_2_and_one_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "qlora.portable",
        "--adapter",
        str(tmp_path / "absent"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: adapter ") and done.stderr.count("\n") == 1
