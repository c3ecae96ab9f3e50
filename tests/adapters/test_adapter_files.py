"""Adapter files: exchanged with PEFT, what they hold, and errors, which change no model.

Every kind of adapter is saved, loaded, resumed and opened by PEFT in test_trained.
"""

import json
import shutil

import peft
import pytest
import torch
from adapter_kinds import logits, move, new_base, refused, snapshot
from conftest import FP32, randomize_adapter, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora import LoraConfig, UserError, apply_lora, load_adapter, load_base, save_adapter
from qlora.adapters import merge_adapter, set_adapter, swap_adapter, unmerge_adapter
from qlora.adapters.apply import adapter_configs
from qlora.adapters.files import load_adapter_weights, target_suffixes
from qlora.adapters.format import CONFIG, WEIGHTS, read_adapter
from qlora.adapters.lora import lora_layers
from qlora.base.checkpoint import Checkpoint
from qlora.base.modules import state_of

# transformers 5.23 deprecates a property that PEFT 0.21 asks for.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")

SETTINGS = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
Q = "model.layers.0.self_attn.q_proj"
Q_A = f"base_model.model.{Q}.lora_A.weight"
Q_B = Q_A.replace("lora_A", "lora_B")
Q_BIAS = Q_B.removesuffix("weight") + "bias"
SAME_LOGITS = {"rtol": 0, "atol": 1e-5}  # fp32: PEFT adds scaling * B A x in another order


def ours(model=None, **settings):
    """`model` (a tiny llama) with an adapter of ours that is not idle."""
    model = tiny_model("llama") if model is None else model
    model = apply_lora(model, LoraConfig(**{**SETTINGS, **settings})).eval()
    randomize_adapter(model)
    return model


def four_bit(folder):
    return load_base(str(folder), FP32, device="cpu")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The folder of a good adapter over a tiny llama; not to be changed."""
    return save_adapter(ours(), tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def copy(adapter, tmp_path):
    return shutil.copytree(adapter, tmp_path / "copy")


def change_config(folder, values):
    old = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(old | values))


def change_tensors(folder, change):
    values = load_file(folder / WEIGHTS)
    change(values)
    save_file(values, folder / WEIGHTS, metadata={"format": "pt"})


def cut_short(folder, keep):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:keep])


@pytest.mark.parametrize("kind", ["rslora, alphas and ranks", "regex", "dora"])
def test_files_of_peft_load_and_are_saved_with_its_config(
    kind, adapter_build, checkpoints, tmp_path
):
    build = adapter_build(kind, "plain")
    loaded = load_adapter(new_base(kind, "plain", checkpoints("llama", False)), build.peft_folder)
    assert torch.allclose(logits(loaded), build.logits, **SAME_LOGITS)
    save_adapter(loaded, tmp_path)
    theirs, *ours = (
        peft.LoraConfig.from_pretrained(folder).to_dict()
        for folder in (build.peft_folder, build.folder, tmp_path)
    )
    different = {key for config in ours for key in config if config[key] != theirs[key]}
    assert different <= {"target_modules", "peft_version", "auto_mapping"}  # the same layers


def test_peft_loads_an_adapter_of_4_bit_gpt2_over_conv1d(checkpoints, tmp_path):
    """GPT-2's layers are (in, out) on disk and in PEFT's model, (out, in) in 4 bits."""
    model = ours(four_bit(checkpoints("gpt2")))
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"]
    theirs = peft.PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path).base_model.model
    for name, layer in lora_layers(model).items():
        exact = theirs.get_submodule(name).get_delta_weight("default").T
        assert torch.allclose(layer.get_delta_weight("default"), exact, rtol=1e-5, atol=1e-7)


def test_transformers_loads_ours_from_its_folder(checkpoints, tmp_path):
    model = ours(AutoModelForCausalLM.from_pretrained(checkpoints("llama")))
    save_adapter(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(logits(loaded), logits(model), **SAME_LOGITS)


def test_the_folder_holds_two_files_and_a_record_of_the_base(checkpoints, tmp_path):
    save_adapter(ours(r=2), tmp_path)  # is replaced
    base = checkpoints("llama")
    save_adapter(ours(four_bit(base)), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    text = (tmp_path / CONFIG).read_text()
    values = json.loads(text)
    assert text == json.dumps(values, indent=2, sort_keys=True) + "\n"
    assert (values["base_model_name_or_path"], values["r"]) == (str(base), 4)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    expected = {"quant_type": "nf4", "blocksize": 64, "double_quant": True, "skip_modules": []}
    expected["fingerprint"] = Checkpoint(base).fingerprint
    assert expected.items() <= json.loads(metadata["qlora"]).items()


DOWN_1 = [f"model.layers.{name}" for name in ("0.mlp.up_proj", "1.mlp.down_proj", "1.mlp.up_proj")]


@pytest.mark.parametrize(
    ("targets", "narrowed", "suffixes"),
    [
        (("q_proj", "v_proj"), {}, ["q_proj", "v_proj"]),
        (("up_proj", "layers.1.mlp.down_proj"), {}, DOWN_1),
        (("q_proj", "k_proj"), {"exclude_modules": ("k_proj", "1.self_attn.q_proj")}, [Q]),
        (("q_proj",), {"layers_to_transform": (0,)}, [Q]),
    ],
    ids=str,
)
def test_targets_are_written_as_a_list_that_matches_these_layers_only(targets, narrowed, suffixes):
    model = apply_lora(tiny_model("llama"), LoraConfig(target_modules=targets, **narrowed))
    assert target_suffixes(model, list(lora_layers(model))) == suffixes


def test_another_adapter_is_saved_in_a_sub_folder_in_its_dtype(tmp_path):
    model, other = ours(), LoraConfig(r=2, target_modules=("q_proj",), adapter_dtype="bf16")
    apply_lora(model, other, adapter_name="other")
    randomize_adapter(model, seed=5)
    save_adapter(model, tmp_path)
    assert save_adapter(model, tmp_path, adapter_name="other") == tmp_path / "other"
    for name, folder in [("default", tmp_path), ("other", tmp_path / "other")]:
        set_adapter(model, name)
        assert torch.equal(logits(load_adapter(tiny_model("llama"), folder)), logits(model))
    dtypes = {t.dtype for t in load_file(tmp_path / "other" / WEIGHTS).values()}
    assert dtypes == {torch.bfloat16}
    with pytest.raises(UserError, match="no adapter 'x' on the model, which has: default, other"):
        save_adapter(model, tmp_path / "out", adapter_name="x")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("trainable", [False, True])
def test_a_loaded_adapter_trains_if_trainable(adapter, trainable):
    model = load_adapter(tiny_model("llama"), adapter, trainable=trainable)
    assert all(p.requires_grad == (trainable and "lora_" in n) for n, p in model.named_parameters())
    leaves = tuple(sorted({name.rpartition(".")[2] for name in lora_layers(model)}))
    config = LoraConfig(**SETTINGS, target_modules=leaves, task_type="CAUSAL_LM")
    assert adapter_configs(model)["default"] == config
    assert {layer.dropout["default"] for layer in lora_layers(model).values()} == {0.1}


def test_a_second_adapter_is_loaded_beside_the_first(adapter):
    model = ours()
    with refused(model, "already has an adapter 'default': choose another name"):
        load_adapter(model, adapter)
    load_adapter(model, adapter, adapter_name="second")
    assert {layer.active_adapters for layer in lora_layers(model).values()} == {("second",)}
    assert torch.equal(logits(model), logits(load_adapter(tiny_model("llama"), adapter)))


def test_the_smallest_config_that_peft_loads_is_enough(adapter, copy):
    targets = json.loads((copy / CONFIG).read_text())["target_modules"]
    small = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets}
    (copy / CONFIG).write_text(json.dumps(small))
    read, whole = (load_adapter(tiny_model("llama"), folder) for folder in (copy, adapter))
    assert torch.equal(logits(read), logits(whole))
    for init in ("gaussian", "eva", "orthogonal", False):  # they leave the base unchanged
        change_config(copy, {"init_lora_weights": init})
        assert read_adapter(copy).config.r == 4


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_files_hold_the_values_of_their_casts(dtype, copy, adapter):
    tensors = {name: t.to(dtype) for name, t in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, copy / WEIGHTS)
    read = read_adapter(copy).tensors
    assert all(torch.equal(read[name], tensors[name].float()) for name in tensors)
    assert logits(load_adapter(tiny_model("llama"), copy)).isfinite().all()


def pickled(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def short_biases(folder):
    change_config(folder, {"lora_bias": True})
    change_tensors(folder, lambda t: t.update({Q_BIAS: torch.ones(3)}))


BAD_TENSORS = [
    (lambda t: t.pop(Q_A), rf"missing {Q_A}"),
    (lambda t: t.update({Q_A.replace("weight", "bias"): torch.ones(4)}), r"unexpected .*bias"),
    (lambda t: t.update({Q_A[17:]: t.pop(Q_A)}), rf"unexpected model.*; missing {Q_A}"),
    (lambda t: t[Q_A][0, :1].fill_(torch.nan), rf"{Q_A} holds NaN or infinity"),
    (lambda t: t[Q_B][0, :1].fill_(torch.inf), rf"{Q_B} holds NaN or infinity"),
    (lambda t: t.update({Q_A: torch.ones(5, 64)}), r"A.weight has shape \(5, 64\), .*r=4"),
    (lambda t: t.update({Q_B: torch.ones(64, 5)}), r"B.weight has shape \(64, 5\), .*r=4"),
    (lambda t: t.update({Q_A: torch.ones(4)}), r"A.weight has shape \(4,\), .*r=4"),
    (lambda t: t.update({Q_A: torch.tensor(1.0)}), r"A.weight has shape \(\), .*r=4"),
    (lambda t: t.update({Q_B: torch.ones(64, 4, 3)}), r"B.weight has shape \(64, 4, 3\), .*r=4"),
    (lambda t: t.update({Q_BIAS: torch.ones(64)}), rf"unexpected {Q_BIAS}"),
    (lambda t: t.clear(), r"no lora_A or lora_B tensor"),
    (lambda t: t.update(extra=t.pop(Q_B)), rf"tensors: unexpected extra; missing {Q_B}"),
    (lambda t: [t.pop(k) for k in list(t) if "lora_B" in k], r"missing .*; and 6 more\. Save"),
    (
        lambda t: t.update({Q_A: torch.ones(4, 32), Q_B: torch.ones(48, 4)}),
        rf"{Q} is \(64, 64\) in this model, the adapter wants \(48, 32\)",
    ),
]
BAD_CONFIGS = [
    ({"peft_type": "IA3"}, r"is no LoRA adapter: peft_type must be 'LORA', got 'IA3'"),
    ({"use_dora": True}, r"missing .*lora_magnitude_vector, its config says use_dora=True"),
    ({"modules_to_save": ["lm_head"]}, r"missing lm_head"),
    ({"lora_bias": True}, r"missing .*q_proj.lora_B.bias"),
    ({"rank_pattern": {"q_proj": 2}}, r"q_proj.* has shape .*r=2"),
    ({"trainable_token_indices": [1]}, "missing the rows of trainable_token_indices"),
    ({"r": 0}, r"r must be .* above 0, got 0"),
    ({"r": None}, r"r must be .* got None"),
    # what PEFT 0.21 computes differently
    ({"layer_replication": [[0, 1]]}, r"not supported: layer_replication=.*without it"),
    ({"use_qalora": True, "arrow_config": {"x": 1}}, "use_qalora=True, arrow_config="),
    ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens="),
    ({"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2}}, "use_bdlora="),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' .it changes"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq' .it changes"),
    ({"init_lora_weights": "corda"}, "init_lora_weights='corda' .it changes"),
    ({"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga' .it changes"),
]
BAD_FILES = [
    (lambda f: (f / CONFIG).write_text("{"), rf"{CONFIG} is not a JSON object: "),
    (lambda f: (f / CONFIG).write_text("[]"), rf"{CONFIG} is not a JSON object: .* list"),
    (lambda f: (f / CONFIG).unlink(), rf"copy holds no {CONFIG}: give the folder"),
    (lambda f: (f / WEIGHTS).unlink(), rf"copy holds no {WEIGHTS}$"),
    (shutil.rmtree, rf"copy does not exist: give the folder with {CONFIG}"),
    (pickled, rf"holds no {WEIGHTS} \(adapter_model.bin is a pickle and is not opened"),
    (short_biases, rf"{Q_BIAS} has shape \(3,\), wanted \(64,\)"),
]
SHORT = r"is damaged or cut short \(.+\): copy it again"
BAD = [
    *((change_tensors, *case) for case in BAD_TENSORS),
    *((change_config, *case) for case in BAD_CONFIGS),
    *((lambda folder, change: change(folder), *case) for case in BAD_FILES),
    *((cut_short, keep, SHORT) for keep in (0, 4, 100, -1)),
]


@pytest.mark.parametrize(("spoil", "change", "message"), BAD, ids=[case[2] for case in BAD])
def test_bad_files_are_refused(copy, spoil, change, message):
    spoil(copy, change)
    with refused(model := tiny_model("llama"), message):
        load_adapter(model, copy)


def test_another_base_is_refused(adapter, checkpoints, tmp_path):
    with refused(phi := tiny_model("phi"), r"0.mlp.gate_proj is no layer of this model that"):
        load_adapter(phi, adapter)
    base, other = checkpoints("llama"), tiny_model("llama")
    save_adapter(ours(four_bit(base)), tmp_path)
    state_of(other).fingerprint = "0123456789abcdef"
    message = rf"belongs to another base: it was trained on {base} .*model is 0123456789ab\."
    with refused(other, message):
        load_adapter(other, tmp_path)


def test_load_adapter_weights_keeps_the_tensors(adapter):
    model = ours()
    move({name: p for name, p in model.named_parameters() if "lora_" in name})
    before = snapshot(model)
    load_adapter_weights(model, adapter)
    assert torch.equal(logits(model), logits(load_adapter(tiny_model("llama"), adapter)))
    assert snapshot(model) == before  # an optimizer still holds the same tensors


@pytest.mark.parametrize(
    ("settings", "saved", "message"),
    [
        ({"target_modules": ("q_proj",)}, {}, "mlp.gate_proj has no adapter on the model"),
        ({}, {"target_modules": ("q_proj",)}, "mlp.gate_proj is not in the files"),
        ({"lora_alpha": 16}, {}, r"no checkpoint of this run: r=4 and scaling=2 in the files"),
        ({}, {"r": 1, "lora_alpha": 2}, "r=1 .* in the files, r=4"),
        ({}, {"use_dora": True}, "use_dora=True in the files, False on the model"),
        (None, {}, "no adapter 'default'"),
    ],
    ids=str,
)
def test_weights_of_another_run_are_refused(settings, saved, message, tmp_path):
    save_adapter(ours(**saved), tmp_path)
    model = tiny_model("llama") if settings is None else ours(**settings)
    with refused(model, message):
        load_adapter_weights(model, tmp_path)


def test_swap_adapter_replaces_the_old_or_changes_nothing(tmp_path):
    saved = ours(target_modules=("up_proj", "q_proj"), r=7, use_dora=True)
    new = save_adapter(saved, tmp_path / "new")
    model = ours(target_modules=("q_proj", "v_proj"))
    apply_lora(model, LoraConfig(r=3, target_modules=("v_proj",)), adapter_name="other")
    set_adapter(model, ["default", "other"])
    randomize_adapter(model)
    merge_adapter(model, "default")
    with refused(model, "is merged: unmerge_adapter"):
        load_adapter_weights(model, new)
    for name, message in (("default", "is merged: unmerge_adapter"), ("none", "no adapter 'none'")):
        with refused(model, message):
            swap_adapter(model, new, adapter_name=name)
    damaged = shutil.copytree(new, tmp_path / "damaged")
    change_tensors(damaged, lambda t: t.clear())
    with refused(model, "no lora_A or lora_B tensor"):
        swap_adapter(model, damaged, adapter_name="other")
    swap_adapter(unmerge_adapter(model), new)
    for name, layer in lora_layers(model).items():
        own = {"v_proj": ("other",)}.get(name.rpartition(".")[2], ("default",))
        assert layer.active_adapters == own and set(layer.lora_A) == set(own)
        trained = [p.requires_grad for p in layer.parameters_of(own[0]).values()]
        assert all(trained) is (own == ("other",))  # as it was
    set_adapter(model, "default")
    assert torch.equal(logits(model), logits(load_adapter(tiny_model("llama"), new)))
    set_adapter(model, "other")
    before = logits(model)
    swap_adapter(model, new)  # an idle one stays idle
    assert torch.equal(logits(model), before)
