"""Each consumer's verdict is that of its source; all compute a portable adapter alike."""

import math
import re
from pathlib import Path
from unittest.mock import Mock

import peft
import pytest
import reference
import torch
from adapter_kinds import ADAPTER_KINDS, logits, new_base
from conftest import FAMILIES, FP32, axis, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

from qlora import LoraConfig, UserError, apply_lora, load_adapter, load_base, save_adapter
from qlora.adapters import portable
from qlora.adapters.format import CONFIG, WEIGHTS, read_files
from qlora.adapters.lora import lora_layers
from qlora.adapters.portable import CONSUMERS, make_portable, portable_subset, problems
from qlora.config import PortableConfig
from qlora.config.lora import pattern_key
from qlora.files import GENERATION, read_stop_ids

# transformers deprecates what PEFT 0.21 reads; PEFT warns of full modules and unexpected layers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft"),
]

SAME = {"rtol": 0, "atol": 1e-5}  # fp32: the same sums in another order
WORDS = {"R": {"refuses"}, "I": {"ignores"}, "-": set()}
NONE = "- - - - - -"
SETTING = "a setting for biases"
# Kinds, the rules that apply to their files, and the verdicts of vLLM, SGLang, llama.cpp, TGI,
# transformers, PEFT.
VERDICTS: list[tuple[str, list[str], str]] = [
    ("lora/gaussian/an idle pattern/without k_proj", [], NONE),
    ("rslora", ["rsLoRA's scaling"], "- I I - - -"),
    ("alphas", ["separate alphas"], "- I I I - -"),
    ("ranks", ["separate ranks"], "- R - I - -"),
    ("regex", ["targets that are no list"], "- R - - - -"),
    ("dora", ["DoRA's magnitudes"], "R R R I I -"),
    ("lora_bias", ["lora_bias"], "R I R I - -"),
    ("all biases/lora_only biases", [SETTING, "biases"], "R I R I - -"),
    ("no bias to train", [SETTING], "R - - - - -"),
    ("the head/grown vocabulary", ["modules trained in full"], "R I R I I -"),
    ("norms", ["norms trained in full"], "R I I I I -"),
    ("classifier", ["a classification head"], "- I R I I -"),
    ("lora on embedding and head", ["embeddings"], "- - - I - -"),
    ("token rows", ["trained token rows"], "R I R I I -"),
    ("pissa/olora", ["an init that changes the base"], "R I I I - -"),
    ("replicated layers", ["repeated layers"], "R I I I - -"),
    ("alora", ["aLoRA"], "R I - I I -"),
    ("q_proj alone/up_proj alone", ["incomplete stacked layers"], "- R - - - -"),
    ("first layer/down_proj of the last layer", ["layers adapted in some blocks"], "- - - I - -"),
    ("r 1024", ["a high rank"], "R - - - - -"),
]
EACH = [(kind, *verdict) for kinds, *verdict in VERDICTS for kind in kinds.split("/")]
SCALED = ["lora", "rslora", "ranks", "alphas", "doubled alphas", "rslora, alphas and ranks"]
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"]}


def peft_files(folder):
    return read_files(folder)[:2]


def pair(module):
    prefix = f"base_model.model.{module}.lora"
    return {f"{prefix}_A.weight": torch.ones(4, 6), f"{prefix}_B.weight": torch.ones(6, 4)}


def verdicts_of(values, tensors):
    """The first words of `problems`, by consumer."""
    return {n: {w.split()[0] for w in what} for n, what in problems(values, tensors).items()}


@pytest.mark.parametrize(("kind", "rules", "letters"), EACH, ids=[kind for kind, *_ in EACH])
def test_verdicts_are_those_of_the_sources(kind, rules, letters, adapter_build, checkpoints):
    build = adapter_build(kind, "plain")
    values, tensors = peft_files(build.peft_folder)
    every = (*portable.BAKED, *portable.LOST, *portable.STAYS)
    assert [rule.what for rule, _ in portable.findings(values, tensors, every)] == rules
    verdicts = verdicts_of(values, tensors)
    assert [*verdicts.values()] == [WORDS[letter] for letter in letters.split()]
    assert vllm_refuses(values, tensors) == ("refuses" in verdicts["vLLM"])
    assert llama_cpp_exits(tensors) == ("refuses" in verdicts["llama.cpp"])
    assert sglang_refuses(values, tensors) == ("refuses" in verdicts["SGLang"])
    if kind == "grown vocabulary":  # a fresh base does not fit its files
        return
    assert (build.logits - build.base_logits).abs().max() > 1e-3  # the adapter is not idle
    base = checkpoints(ADAPTER_KINDS[kind].family, False)
    loaded = peft.PeftModel.from_pretrained(new_base(kind, "plain", base), build.peft_folder)
    torch.testing.assert_close(logits(loaded.eval()), build.logits, **SAME)
    if not verdicts["transformers"]:
        model = new_base(kind, "plain", base)
        model.load_adapter(str(build.peft_folder))
        torch.testing.assert_close(logits(model.eval()), build.logits, **SAME)


def vllm_refuses(values, tensors):
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
    known = r".*\.(lora_[AB]\.weight|lora_embedding_[AB]|(score|classifier)\.(weight|bias))"
    others = [name for name in tensors if not name.endswith(copies)]
    return any(features) or not all(re.fullmatch(known, name) for name in others)


def llama_cpp_exits(tensors):
    """convert_lora_to_gguf.py, get_tensors: exits at any tensor but A, B, a copy or a norm."""
    known = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
    passed = (*known, ".base_layer.weight", "_layernorm", ".norm")
    return not all(any(part in name for part in passed) for name in tensors)


def sglang_refuses(values, tensors):
    """lora_manager.py, validate_new_adapter and init_lora_shapes; lora.py, normalize_qkv_proj,
    which looks up v_proj for each q_proj and stacks the two, and normalize_gate_up_proj;
    mem_pool.py, whose buffers hold r rows and know the stacked names only."""
    if values["use_dora"] or not isinstance(values["target_modules"], list):
        return True
    lora_A = {name: len(tensor) for name, tensor in tensors.items() if ".lora_A." in name}
    if any(rows != values["r"] for rows in lora_A.values()):
        return True
    stacked = {"q_proj": "v_proj", "v_proj": "q_proj", ".up_proj": ".gate_proj"}.items()
    return any(a in n and n.replace(a, b) not in lora_A for n in lora_A for a, b in stacked)


@pytest.mark.parametrize("family", axis(*FAMILIES))
def test_our_files_have_no_problems(family, checkpoints, tmp_path):
    model = load_base(str(checkpoints(family)), FP32)
    save_adapter(apply_lora(model, LoraConfig(r=64, lora_alpha=1)), tmp_path)
    assert not any(problems(*peft_files(tmp_path)).values())


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
def test_verdicts_of_adapters_over_other_bases(values, tensors, letters):
    """Kinds that need GPTQ, experts or images, by hand."""
    shaped = {f"base_model.model.{name}": torch.empty(shape) for name, shape in tensors.items()}
    verdicts = verdicts_of({**PLAIN, "target_modules": ["q_proj"], **values}, shaped)
    assert [*verdicts.values()] == [WORDS[letter] for letter in letters.split()]


def test_missing_settings_are_refused_by_consumers_that_read_them():
    """vLLM's PEFTHelper.from_dict, SGLang's LoRAConfig and llama.cpp's lparams["lora_alpha"]."""
    found = {name: texts for name, texts in problems({"peft_type": "LORA"}, {}).items() if texts}
    alpha = "refuses no lora_alpha in the config (lora_alpha)"
    both = [alpha, "refuses missing in the config (r, target_modules)"]
    assert found == {"vLLM": both, "SGLang": both, "llama.cpp": [alpha]}
    tensors = {f"base_model.model.{name}.weight": torch.ones(1) for name in "abcdefg"}
    seven = "ignores modules trained in full (a, b, c, d, e and 2 more)"
    assert problems(PLAIN, tensors)["TGI"] == [seven]


def scaling_of(consumer, values, module, rank):
    """A consumer's scaling of a module's B A.

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


def error(consumer, folder, model):
    """The largest relative error of a consumer's B A over the layers of `model`, in fp64."""
    values, tensors = peft_files(folder)
    errors = []
    for name, layer in lora_layers(model).items():
        prefix = f"base_model.model.{name}.lora_"
        lora_A, lora_B = (tensors[f"{prefix}{side}.weight"].double() for side in "AB")
        got = scaling_of(consumer, values, name, len(lora_A)) * lora_B @ lora_A
        wanted = reference.delta(*layer.factors("default")[:3])
        errors.append(float(((got - wanted).norm() / wanted.norm()).detach()))
    return max(errors)


@pytest.mark.parametrize("kind", SCALED)
def test_every_consumer_computes_the_same_from_the_portable_files(
    kind, adapter_build, checkpoints, tmp_path
):
    build, base = adapter_build(kind, "plain"), checkpoints("llama", False)
    assert save_adapter(build.model, tmp_path, portable=True) == tmp_path
    for load in (peft.PeftModel.from_pretrained, load_adapter):
        loaded = load(new_base(kind, "plain", base), tmp_path).eval()
        torch.testing.assert_close(logits(loaded), build.logits, **SAME)
    assert not any(problems(*peft_files(tmp_path)).values())
    plain = problems(*peft_files(build.folder))
    for consumer in ("vLLM", "SGLang", "llama.cpp", "TGI"):
        assert error(consumer, tmp_path, build.model) < 1e-7  # fp32's rounding of B
        # and from the plain files if and only if they have no problem
        if not any("refuses" in what for what in plain[consumer]):
            assert (error(consumer, build.folder, build.model) < 1e-7) == (not plain[consumer])


@pytest.mark.parametrize(
    ("alphas", "rounded"), [({"v_proj": 32, "down_proj": 8}, set()), ({"v_proj": 7.7}, {"v_proj"})]
)
def test_scaling_by_a_power_of_two_keeps_the_dtype(alphas, rounded, tmp_path):
    config = LoraConfig(r=4, lora_alpha=16, adapter_dtype="bf16", alpha_pattern=alphas)
    model = apply_lora(tiny_model("llama"), config)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"])
    save_adapter(model, tmp_path, portable=True)
    values, tensors = peft_files(tmp_path)
    assert rounded == {n.split(".")[-3] for n, t in tensors.items() if t.dtype == torch.float32}
    assert (values["lora_alpha"], values["r"]) == (16, 4)
    assert (error("SGLang", tmp_path, model) == 0) == (not rounded)


def test_portable_files_do_not_change(adapter_build):
    values, tensors = peft_files(adapter_build("lora", "plain").folder)
    again, same = portable_subset(values, tensors, Path("x"))
    assert {key: again[key] for key in values} == values
    assert type(again["lora_alpha"]) is int
    assert all(same[name] is tensor for name, tensor in tensors.items())


@st.composite
def pairs(draw):
    """An adapter of some layers (3, 5), each with another r, alpha and dtype."""
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
    plain, baked = portable_subset(values, tensors, Path("x"))
    scaling = plain["lora_alpha"] / plain["r"]
    assert not plain["use_rslora"] and baked.keys() == tensors.keys()
    for key, r in values["rank_pattern"].items():
        old, new = (
            [t[f"base_model.model.{key}.lora_{s}.weight"].double() for s in "AB"]
            for t in (tensors, baked)
        )
        alpha = values["alpha_pattern"][key]
        wanted = alpha / (r**0.5 if values["use_rslora"] else r) * old[1] @ old[0]
        assert new[0].shape == (plain["r"], 5) and new[1].shape == (3, plain["r"])
        # one rounding of B to fp32, 6e-8, of terms that may cancel in the sum
        scale = float(old[1].abs().max() * old[0].abs().max()) * r * alpha
        torch.testing.assert_close(scaling * new[1] @ new[0], wanted, rtol=0, atol=1e-7 * scale)


def test_layers_chosen_by_peft_become_a_list():
    names = [f"model.layers.1.self_attn.{leaf}_proj" for leaf in "qv"]
    tensors = {**pair(names[1]), **pair(names[0])}
    for chosen in (
        {"target_modules": r".*layers\.1\..*(q|v)_proj"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0\..*"},
    ):
        config = peft.LoraConfig(r=4, init_lora_weights="gaussian", **chosen).to_dict()
        values, _ = portable_subset(config, tensors, Path("x"))
        assert values["target_modules"] == names
        assert values["init_lora_weights"] is True
        assert not (values["exclude_modules"] or values["layers_to_transform"])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("dora", r"DoRA's magnitudes \(.*q_proj.*\): a merge folds that in$"),
        ("all biases", r"biases \(.*\): a merge"),
        ("lora_bias", r"lora_bias \(q_proj, v_proj\): a merge"),
        ("the head", r"modules trained in full \(lm_head\): a merge"),
        ("norms", r"norms trained in full \(.*norm.*\): a merge"),
        ("lora on embedding and head", r"embeddings \(embed_tokens\): a merge"),
        ("token rows", r"trained token rows \(embed_tokens\): a merge"),
        ("alora", r"aLoRA \(.*\): train without it, or serve"),
        ("pissa", r"changes the base \(pissa\): save it with PEFT's path_"),
    ],
)
def test_kinds_that_a_and_b_cannot_express_are_refused(
    kind, message, adapter_build, tmp_path, capsys
):
    folder = str(adapter_build(kind, "plain").peft_folder)
    with pytest.raises(UserError, match=rf"adapter {folder} is not portable: it has .*{message}"):
        make_portable(PortableConfig(folder, str(tmp_path / "out")))
    assert not any(tmp_path.iterdir())
    assert len(capsys.readouterr().out.splitlines()) == len(CONSUMERS)  # the verdicts are printed
    make_portable(PortableConfig(folder))  # prints them only


def test_all_reasons_are_named_by_remedy(adapter_build, tmp_path):
    build = adapter_build("biases and dora", "plain")
    config, weights = peft_files(build.folder)
    copied = {"base_model.model.lm_head.base_layer.weight": torch.ones(6, 4)}
    both = r"magnitudes \(.*\), biases \(.*\): a merge.* in; .* the base \(olora\): save"
    for values, tensors, message in (
        (config | {"init_lora_weights": "olora"}, weights, both),
        (PLAIN | {"arrow_config": {"top_k": 1}}, pair("a.q"), "arrow_config="),
        (PLAIN | {"r": 5}, pair("a.q"), r"\(4, 6\), its config says r=5"),
        (PLAIN, copied, "nothing to write"),
    ):
        with pytest.raises(UserError, match=message):
            portable_subset(values, tensors, Path("x"))
    with pytest.raises(UserError, match="is not portable: it has DoRA's magnitudes"):
        save_adapter(build.model, tmp_path / "out", portable=True)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def adapter(tmp_path):
    config = LoraConfig(r=4, use_rslora=True, alpha_pattern={"v_proj": 3})
    return save_adapter(apply_lora(tiny_model("llama"), config), tmp_path / "in")


def test_the_command_prints_each_verdict_and_writes_the_files(adapter, tmp_path, capsys):
    make_portable(PortableConfig(str(adapter)))
    rs, alphas = "rsLoRA's scaling (use_rslora=True)", "separate alphas (v_proj)"
    assert capsys.readouterr().out.splitlines() == [
        "vLLM          accepts it",
        f"SGLang        ignores {rs}; ignores {alphas}",
        f"llama.cpp     ignores {rs}; ignores {alphas}",
        f"TGI           ignores {alphas}",
        "transformers  accepts it",
        "PEFT          accepts it",
        "",
        f"--output-dir DIR writes it without {rs}, {alphas}.",
    ]
    (adapter / GENERATION).write_text('{"eos_token_id": [0, 2]}')
    folder = tmp_path / "new" / "out"
    make_portable(PortableConfig(str(adapter), str(folder)))
    assert capsys.readouterr().out.count("accepts it") == 3 + len(CONSUMERS)
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS, GENERATION]
    assert read_stop_ids(folder) == {0, 2}
    assert [p.name for p in folder.parent.iterdir()] == ["out"]
    assert read_files(folder)[2] == read_files(adapter)[2]  # the metadata


def test_an_error_changes_no_file(adapter, tmp_path, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in adapter.iterdir()}
    with pytest.raises(UserError, match="already holds something: give a new folder"):
        make_portable(PortableConfig(str(adapter), str(adapter)))
    assert capsys.readouterr().out == ""
    full = SafetensorError("Error while serializing: I/O error: File too large (os error 27)")
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"too large.* free disk"):
        patch.setattr(portable, "save_file", Mock(side_effect=full))
        make_portable(PortableConfig(str(adapter), str(tmp_path / "out")))
    assert {path: path.read_bytes() for path in adapter.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    save_file({"x": torch.ones(1)}, adapter / WEIGHTS)
    capsys.readouterr()
    with pytest.raises(UserError, match="unexpected x"):
        make_portable(PortableConfig(str(adapter)))
    assert capsys.readouterr().out == ""  # nor are verdicts on damaged files printed
