"""Adapters go to PEFT and come back; what is wrong with a file is said, and changes no model."""

import json
import shutil

import peft
import pytest
import torch
from conftest import FP32, randomize_adapter, tiny_model, token_ids
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora.adapters.apply import adapter_configs, apply_lora, set_adapter
from qlora.adapters.files import (
    CONFIG,
    WEIGHTS,
    load_adapter,
    load_adapter_weights,
    read_adapter,
    save_adapter,
    swap_adapter,
    target_suffixes,
)
from qlora.adapters.fuse import merge_adapter
from qlora.adapters.lora import lora_layers
from qlora.base.checkpoint import Checkpoint
from qlora.base.load import load_base
from qlora.config import LoraConfig
from qlora.errors import UserError

# transformers 5.23 deprecates a property that PEFT 0.21 asks for.
from_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")

SETTINGS = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
TARGETS = ["all-linear", ["q_proj", "v_proj"], r".*layers\.1.*(up|down)_proj"]
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = Q_A.replace("lora_A", "lora_B")
Q_BIAS = Q_B.removesuffix("weight") + "bias"
# fp32: PEFT adds scaling * B A x in another order
SAME_LOGITS = {"rtol": 0, "atol": 1e-5}


def ours(model=None, *, targets="all-linear", **settings):
    """`model` (a tiny llama) with an adapter of ours that is not idle."""
    targets = targets if isinstance(targets, str) else tuple(targets)
    config = LoraConfig(**{**SETTINGS, **settings}, target_modules=targets)
    model = apply_lora(tiny_model("llama") if model is None else model, config).eval()
    randomize_adapter(model)
    return model


def theirs(model=None, *, targets="all-linear", **settings):
    """The same by PEFT."""
    config = peft.LoraConfig(**{**SETTINGS, **settings}, target_modules=targets)
    adapted = peft.get_peft_model(tiny_model("llama") if model is None else model, config).eval()
    torch.manual_seed(2)
    for layer in peft_layers(adapted).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    return adapted


def peft_layers(model):
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def snapshot(model):
    modules = {name: type(module) for name, module in model.named_modules()}
    parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    return modules, parameters, dict(adapter_configs(model))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The folder of a good adapter over a tiny llama; not to be changed."""
    return save_adapter(ours(), tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def copy(adapter, tmp_path):
    return shutil.copytree(adapter, tmp_path / "copy")


def change_config(folder, **values):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **values}))


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


# ---- there and back ----


@from_peft
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_keys_and_shapes_are_those_that_peft_saves(tmp_path, targets, use_rslora):
    save_adapter(ours(targets=targets, use_rslora=use_rslora), tmp_path / "ours")
    theirs(targets=targets, use_rslora=use_rslora).save_pretrained(tmp_path / "theirs")
    shapes, wanted = (
        {key: (t.shape, t.dtype) for key, t in load_file(tmp_path / who / WEIGHTS).items()}
        for who in ("ours", "theirs")
    )
    assert shapes == wanted


@from_peft
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_the_config_says_what_pefts_says(tmp_path, targets):
    save_adapter(ours(targets=targets), tmp_path / "ours")
    theirs(targets=targets).save_pretrained(tmp_path / "theirs")
    config, wanted = (peft.LoraConfig.from_pretrained(tmp_path / w) for w in ("ours", "theirs"))
    different = {key for key, value in config.to_dict().items() if value != wanted.to_dict()[key]}
    # ours says it is a causal language model; the targets name the same layers (tested below)
    assert different <= {"task_type", "target_modules", "peft_version", "auto_mapping"}
    assert config.task_type == peft.TaskType.CAUSAL_LM


@from_peft
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_peft_loads_ours_and_computes_the_same(tmp_path, targets, use_rslora):
    model = ours(targets=targets, use_rslora=use_rslora)
    save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert set(peft_layers(loaded)) == set(lora_layers(model))
    assert not torch.allclose(logits(model), logits(tiny_model("llama")), rtol=0, atol=1e-2)
    assert torch.allclose(logits(loaded), logits(model), **SAME_LOGITS)


@from_peft
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_we_load_pefts_and_compute_the_same(tmp_path, targets, use_rslora):
    model = theirs(targets=targets, use_rslora=use_rslora)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(tiny_model("llama"), tmp_path)
    assert set(lora_layers(loaded)) == set(peft_layers(model))
    assert torch.allclose(logits(loaded), logits(model), **SAME_LOGITS)


UNEVEN = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\..*down_proj": 6},
    "alpha_pattern": {"v_proj": 3.5, "0.mlp.up_proj": 16},
}


@from_peft
@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_alphas_of_their_own_go_both_ways(tmp_path, use_rslora):
    model = ours(use_rslora=use_rslora, **UNEVEN)
    save_adapter(model, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "ours")
    assert torch.allclose(logits(loaded), logits(model), **SAME_LOGITS)
    assert torch.equal(logits(load_adapter(tiny_model("llama"), tmp_path / "ours")), logits(model))
    model = theirs(use_rslora=use_rslora, **UNEVEN)
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_adapter(tiny_model("llama"), tmp_path / "theirs")
    assert torch.allclose(logits(loaded), logits(model), **SAME_LOGITS)
    files = [load_file(tmp_path / who / WEIGHTS) for who in ("ours", "theirs")]
    shapes, wanted = ({key: t.shape for key, t in file.items()} for file in files)
    assert shapes == wanted
    save_adapter(loaded, tmp_path / "again")
    again = peft.LoraConfig.from_pretrained(tmp_path / "again")
    assert (again.rank_pattern, again.alpha_pattern) == (*UNEVEN.values(),)


@from_peft
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, UNEVEN], ids=["", "rs", "uneven"])
def test_dora_goes_both_ways(tmp_path, settings):
    model = ours(use_dora=True, **settings)
    save_adapter(model, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "ours").eval()
    assert torch.allclose(logits(loaded), logits(model), **SAME_LOGITS)
    assert torch.equal(logits(load_adapter(tiny_model("llama"), tmp_path / "ours")), logits(model))
    loaded.save_pretrained(tmp_path / "theirs")
    again = load_adapter(tiny_model("llama"), tmp_path / "theirs")
    assert torch.equal(logits(again), logits(model))
    files = [load_file(tmp_path / who / WEIGHTS) for who in ("ours", "theirs")]
    shapes, wanted = ({key: (t.shape, t.dtype) for key, t in file.items()} for file in files)
    assert shapes == wanted
    resumed = ours(use_dora=True, **settings)
    randomize_adapter(resumed, seed=8)
    load_adapter_weights(resumed, tmp_path / "ours")
    assert torch.equal(logits(resumed), logits(model))
    with pytest.raises(UserError, match="use_dora=True in the files, False on the model"):
        load_adapter_weights(ours(**settings), tmp_path / "ours")


@from_peft
@pytest.mark.parametrize(
    "chosen",
    [{"exclude_modules": ["mlp.up_proj", "k_proj"]}, {"layers_to_transform": [1]}],
    ids=str,
)
def test_peft_loads_some_of_the_layers(tmp_path, chosen):
    model = ours(targets=("q_proj", "k_proj", "up_proj"), **chosen)
    save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert set(peft_layers(loaded)) == set(lora_layers(model))
    assert torch.allclose(logits(loaded), logits(model), **SAME_LOGITS)


@from_peft
@pytest.mark.parametrize("family", ["qwen2", "gemma", "phi"])
def test_peft_loads_ours_over_another_family(checkpoints, tmp_path, family):
    model = ours(load_base(str(checkpoints(family)), FP32, device="cpu"))
    save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path)
    exact = {name: layer.get_delta_weight("default") for name, layer in peft_layers(loaded).items()}
    assert set(exact) == set(lora_layers(model))
    for name, layer in lora_layers(model).items():
        assert torch.allclose(layer.delta_weight("default"), exact[name], rtol=1e-5, atol=1e-7)


@from_peft
def test_peft_loads_ours_over_gpt2_the_right_way_round(checkpoints, tmp_path):
    """GPT-2's layers are (in, out) on disk and in PEFT's model, (out, in) in 4 bits."""
    model = ours(load_base(str(checkpoints("gpt2")), FP32, device="cpu"))
    save_adapter(model, tmp_path)
    assert read_adapter(tmp_path).fan_in_fan_out
    loaded = peft_layers(peft.PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path))
    assert set(loaded) == set(lora_layers(model))
    for name, layer in lora_layers(model).items():
        exact = loaded[name].get_delta_weight("default").T
        assert torch.allclose(layer.delta_weight("default"), exact, rtol=1e-5, atol=1e-7)


@from_peft
def test_transformers_loads_ours_from_its_folder(checkpoints, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(checkpoints("llama"))
    model = ours(base)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(checkpoints("llama"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(logits(loaded), logits(model), **SAME_LOGITS)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_round_trip_over_a_4_bit_base_changes_no_bit(checkpoints, tmp_path, family):
    folder = str(checkpoints(family))
    model = ours(load_base(folder, FP32, device="cpu"))
    save_adapter(model, tmp_path)
    loaded = load_adapter(load_base(folder, FP32, device="cpu"), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_a_bf16_adapter_stays_one(tmp_path):
    model = ours(adapter_dtype="bf16")
    save_adapter(model, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
    assert torch.equal(logits(load_adapter(tiny_model("llama"), tmp_path)), logits(model))


# ---- what is written ----


def test_the_folder_holds_the_two_files_and_nothing_else(adapter):
    assert sorted(p.name for p in adapter.iterdir()) == [CONFIG, WEIGHTS]


def test_the_metadata_says_pt_and_what_the_base_was(checkpoints, tmp_path):
    base = load_base(str(checkpoints("llama")), FP32, device="cpu")
    save_adapter(ours(base), tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    expected = {
        "fingerprint": Checkpoint(checkpoints("llama")).fingerprint,
        "quant_type": "nf4", "blocksize": 64, "double_quant": True, "skip_modules": [],
    }  # fmt: skip
    assert expected.items() <= json.loads(metadata["qlora"]).items()
    assert read_adapter(tmp_path).base_model == str(checkpoints("llama"))


def test_the_config_is_sorted_and_indented(adapter):
    text = (adapter / CONFIG).read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


@pytest.mark.parametrize(
    ("targets", "portable"),
    [
        (("q_proj", "v_proj"), ["q_proj", "v_proj"]),
        (("layers.0.self_attn.q_proj",), ["model.layers.0.self_attn.q_proj"]),
        (("up_proj", "layers.1.mlp.down_proj"), [
            "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj",
            "model.layers.1.mlp.up_proj",
        ]),
    ],
)  # fmt: skip
def test_targets_are_written_as_a_list_that_means_just_these_layers(targets, portable):
    model = apply_lora(tiny_model("llama"), LoraConfig(target_modules=targets))
    assert target_suffixes(model, list(lora_layers(model))) == portable


def test_another_adapter_goes_into_a_sub_folder(tmp_path):
    model = ours()
    apply_lora(model, LoraConfig(r=2, target_modules=("q_proj",)), adapter_name="other")
    randomize_adapter(model, seed=5)
    save_adapter(model, tmp_path)
    assert save_adapter(model, tmp_path, adapter_name="other") == tmp_path / "other"
    for name, folder in [("default", tmp_path), ("other", tmp_path / "other")]:
        set_adapter(model, name)
        assert torch.equal(logits(load_adapter(tiny_model("llama"), folder)), logits(model))


def test_saving_again_replaces_the_files(copy):
    model = ours(r=2)
    save_adapter(model, copy)
    assert read_adapter(copy).config.r == 2
    assert sorted(p.name for p in copy.iterdir()) == [CONFIG, WEIGHTS]


def test_an_unknown_adapter_cannot_be_saved(tmp_path):
    with pytest.raises(UserError, match="no adapter 'x' to save; the model has: default"):
        save_adapter(ours(), tmp_path / "out", adapter_name="x")
    assert not (tmp_path / "out").exists()


# ---- what is read ----


def test_an_adapter_is_read_as_it_was(adapter):
    read = read_adapter(adapter)
    model = ours()
    leaves = tuple(sorted({n.rpartition(".")[2] for n in read.pairs}))
    assert read.config == LoraConfig(**SETTINGS, target_modules=leaves, task_type="CAUSAL_LM")
    assert set(read.pairs) == set(lora_layers(model))
    for lora_A, lora_B, *_ in read.pairs.values():
        assert (lora_A.shape[0], lora_B.shape[1]) == (4, 4)


def test_a_loaded_adapter_is_frozen_unless_asked_for(adapter):
    frozen = load_adapter(tiny_model("llama"), adapter)
    assert not any(p.requires_grad for p in frozen.parameters())
    model = load_adapter(tiny_model("llama"), adapter, trainable=True)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }
    assert adapter_configs(model)["default"].lora_dropout == 0.1
    assert {layer.dropout["default"] for layer in lora_layers(model).values()} == {0.1}


def test_the_smallest_config_that_peft_loads_is_enough(copy):
    targets = json.loads((copy / CONFIG).read_text())["target_modules"]
    small = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets}
    (copy / CONFIG).write_text(json.dumps(small))
    assert torch.equal(logits(load_adapter(tiny_model("llama"), copy)), logits(ours_again(copy)))


def ours_again(folder):
    """A fresh model with the values in `folder`, by hand."""
    model, tensors = ours(), load_file(folder / WEIGHTS)
    for name, layer in lora_layers(model).items():
        layer.lora_A["default"].data = tensors[f"base_model.model.{name}.lora_A.weight"]
        layer.lora_B["default"].data = tensors[f"base_model.model.{name}.lora_B.weight"]
    return model


# ---- what is refused, and leaves the model as it was ----


def refuses(folder, message, *, model=None, **kwargs):
    model = tiny_model("llama") if model is None else model
    before, values = snapshot(model), logits(model)
    with pytest.raises(UserError, match=message):
        load_adapter(model, folder, **kwargs)
    assert snapshot(model) == before
    assert torch.equal(logits(model), values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q_B), rf"missing {Q_B}"),
        (lambda t: t.pop(Q_A), rf"missing {Q_A}"),
        (lambda t: t.update(extra=torch.ones(2)), r"safetensors: unexpected extra"),
        (lambda t: t.update({Q_A.replace("weight", "bias"): torch.ones(4)}), r"unexpected .*bias"),
        (lambda t: t.update({Q_A[17:]: t.pop(Q_A)}), rf"unexpected model.*; missing {Q_A}"),
        (lambda t: t[Q_A][0, :1].fill_(torch.nan), rf"{Q_A} holds NaN or infinity"),
        (lambda t: t[Q_B][0, :1].fill_(torch.inf), rf"{Q_B} holds NaN or infinity"),
        (lambda t: t.update({Q_A: torch.ones(5, 64)}), r"A.weight has shape \(5, 64\), .*r=4"),
        (lambda t: t.update({Q_B: torch.ones(64, 5)}), r"B.weight has shape \(64, 5\), .*r=4"),
        (lambda t: t.update({Q_A: torch.ones(4)}), r"A.weight has shape \(4,\), .*r=4"),
        (
            lambda t: t.update({Q_B: torch.ones(64, 4, 3)}),
            r"B.weight has shape \(64, 4, 3\), .*r=4",
        ),
        (lambda t: t.update({Q_BIAS: torch.ones(64)}), rf"unexpected {Q_BIAS}"),
        (lambda t: t.clear(), r"no lora_A or lora_B tensor"),
        (
            lambda t: (t.pop(Q_B), t.update(extra=torch.ones(2))),  # all of them at once
            rf"unexpected extra; missing {Q_B}",
        ),
    ],
)
def test_bad_tensors_are_refused(copy, change, message):
    change_tensors(copy, change)
    refuses(copy, message)


def test_a_bias_of_another_length_is_refused(tmp_path):
    model = apply_lora(tiny_model("qwen2"), LoraConfig(target_modules=("q_proj",), lora_bias=True))
    save_adapter(model, tmp_path)
    change_tensors(tmp_path, lambda t: t.update({Q_BIAS: torch.ones(3)}))
    message = rf"{Q_BIAS} has shape \(3,\), wanted \(64,\)"
    refuses(tmp_path, message, model=tiny_model("qwen2"))


def test_a_scalar_is_refused(copy):
    change_tensors(copy, lambda t: t.update({Q_A: torch.tensor(1.0)}))
    refuses(copy, r"A.weight has shape \(\), .*r=4")


def test_many_faults_are_counted(copy):
    change_tensors(copy, lambda t: [t.pop(key) for key in list(t) if "lora_B" in key])
    refuses(copy, r"missing .*; and 6 more\. Save the adapter again")  # of 14, 8 are named


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, r"is no LoRA adapter: peft_type is 'IA3'"),
        ({"peft_type": None}, r"is no LoRA adapter: peft_type is None"),
        ({"use_dora": True}, r"has no lora_magnitude_vector, its config says use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, r"missing lm_head, which its config says"),
        ({"lora_bias": True}, r"missing .*q_proj.lora_B.bias"),
        ({"rank_pattern": {"q_proj": 2}}, r"q_proj.* has shape .*, its config says r=2"),
        ({"layer_replication": [[0, 1]]}, r"not supported: layer_replication=.*without it"),
        ({"trainable_token_indices": [1]}, "missing the rows of trainable_token_indices"),
        ({"arrow_config": {"x": 1}}, "arrow_config="),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"init_lora_weights": "pissa_niter_4"}, r"init_lora_weights='pissa_niter_4' \(it changes"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"use_qalora": True, "arrow_config": {"x": 1}}, "use_qalora=True, arrow_config="),
        ({"r": 8}, r"its config says r=8"),
        ({"r": 0}, r"r must be a whole number above 0, got 0"),
        ({"lora_alpha": "16"}, r"lora_alpha must be a number above 0, got '16'"),
        ({"rank_pattern": {"q_proj": 2.5}}, r"q_proj in rank_pattern must be a whole number"),
        ({"alpha_pattern": {"*_proj": 2}}, r"'\*_proj' in alpha_pattern is no regular expression"),
        ({"alpha_pattern": [2]}, r"alpha_pattern must be NAME: NUMBER pairs, got \[2\]"),
    ],
    ids=str,
)
def test_configs_that_ask_for_more_are_refused(copy, values, message):
    change_config(copy, **values)
    refuses(copy, message)


@pytest.mark.parametrize(
    "values",
    [
        {"alora_invocation_tokens": [5, 6]},  # acts only after these tokens
        {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2}},  # block-diagonal
        {"arrow_config": {"top_k": 1}},  # routed between experts
        {"init_lora_weights": "lora_ga"},  # changes the base weights
    ],
    ids=lambda values: next(iter(values)),
)
def test_what_peft_0_21_computes_differently_is_refused(copy, values):
    change_config(copy, **values)
    refuses(copy, next(iter(values)))


@pytest.mark.parametrize("init", ["gaussian", "eva", "orthogonal", False])
def test_inits_that_leave_the_base_alone_are_no_obstacle(copy, init):
    change_config(copy, init_lora_weights=init)
    assert torch.equal(logits(load_adapter(tiny_model("llama"), copy)), logits(ours()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON object: "),
        ("[]", "is no JSON object: it holds a"),
        ("", "is no JSON object: "),
    ],
)
def test_a_broken_config_is_refused(copy, text, message):
    (copy / CONFIG).write_text(text)
    refuses(copy, rf"{CONFIG} {message}")


@pytest.mark.parametrize("r", [None, "4"])
def test_a_rank_that_is_no_number_is_refused(copy, r):
    change_config(copy, r=r)
    refuses(copy, "r must be")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_cut_short_is_refused(copy, keep):
    data = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(data[:keep])
    refuses(copy, rf"{WEIGHTS} is damaged or cut short \(.+\): copy it again")


def test_a_missing_folder_is_refused(tmp_path):
    refuses(tmp_path / "absent", rf"absent does not exist: give the folder with {CONFIG}")


def test_a_folder_without_a_config_is_refused(copy):
    (copy / CONFIG).unlink()
    refuses(copy, rf"copy holds no {CONFIG}: give the folder")


def test_a_folder_without_weights_is_refused(copy):
    (copy / WEIGHTS).unlink()
    refuses(copy, rf"copy holds no {WEIGHTS}$")


def test_a_pickled_adapter_is_not_opened(copy):
    torch.save(load_file(copy / WEIGHTS), copy / "adapter_model.bin")
    (copy / WEIGHTS).unlink()
    refuses(copy, rf"holds no {WEIGHTS} \(adapter_model.bin is a pickle and is not opened")


def test_shapes_of_another_model_are_refused(copy):
    def swap(tensors):
        tensors[Q_A] = torch.ones(4, 32)
        tensors[Q_B] = torch.ones(48, 4)

    change_tensors(copy, swap)
    refuses(
        copy,
        r"does not fit this model: model.layers.0.self_attn.q_proj is \(64, 64\) in this model, "
        r"the adapter wants \(48, 32\)",
    )


def test_layers_that_the_model_lacks_are_refused(adapter):
    refuses(
        adapter,
        r"model.layers.0.mlp.gate_proj is no layer of this model that takes A and B",
        model=tiny_model("phi"),
    )


def test_another_base_is_refused(checkpoints, tmp_path):
    save_adapter(ours(load_base(str(checkpoints("llama")), FP32, device="cpu")), tmp_path / "a")
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "base")
    other = load_base(str(tmp_path / "base"), FP32, device="cpu")
    have = Checkpoint(tmp_path / "base").fingerprint[:12]
    refuses(
        tmp_path / "a",
        rf"belongs to another base: it was trained on {checkpoints('llama')} .*model is {have}",
        model=other,
    )


def test_a_taken_name_is_refused(adapter):
    refuses(adapter, "already has an adapter 'default': choose another name", model=ours())


@pytest.mark.parametrize("name", ["a.b", "", "train"])
def test_bad_names_are_refused(adapter, name):
    refuses(adapter, "adapter_name must be", adapter_name=name)


def test_a_second_adapter_is_put_beside_the_first(adapter):
    model = load_adapter(ours(), adapter, adapter_name="second")
    assert {layer.active_adapters for layer in lora_layers(model).values()} == {("second",)}
    alone = load_adapter(tiny_model("llama"), adapter)
    assert torch.equal(logits(model), logits(alone))


# ---- values of an adapter the model already has ----


def test_load_adapter_weights_restores_values(tmp_path):
    model = ours()
    save_adapter(model, tmp_path)
    before, parameters = logits(model), snapshot(model)
    for layer in lora_layers(model).values():
        layer.lora_A["default"].data.add_(1)
        layer.lora_B["default"].data.zero_()
    assert not torch.equal(logits(model), before)
    load_adapter_weights(model, tmp_path)
    assert torch.equal(logits(model), before)
    assert snapshot(model) == parameters  # an optimizer still holds the same tensors


def refuses_weights(model, folder, message):
    before = logits(model)
    with pytest.raises(UserError, match=message):
        load_adapter_weights(model, folder)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ("q_proj",)}, "mlp.gate_proj has no adapter on the model"),
        ({"lora_alpha": 16}, r"is no checkpoint of this run: r=4 and scaling=2 in the files"),
    ],
)
def test_weights_of_another_run_are_refused(adapter, settings, message):
    refuses_weights(ours(**settings), adapter, message)


def test_weights_that_lack_a_layer_are_refused(tmp_path):
    save_adapter(ours(targets=("q_proj",)), tmp_path)
    refuses_weights(ours(), tmp_path, "mlp.gate_proj is not in the files")


@pytest.mark.parametrize("r", [1, 2])
def test_weights_of_another_rank_are_refused(tmp_path, r):
    save_adapter(ours(r=r, lora_alpha=2 * r), tmp_path)
    refuses_weights(ours(r=4, lora_alpha=8), tmp_path, "shape|r=")


def test_weights_for_an_adapter_that_is_not_there_are_refused(adapter):
    refuses_weights(tiny_model("llama"), adapter, "no adapter")


# ---- one in the place of another ----


@pytest.fixture
def pair(tmp_path):
    """A model with "default" and "other", both active, and the folder of an adapter to swap in."""
    save_adapter(ours(targets=("up_proj", "q_proj"), r=7, use_dora=True), tmp_path / "new")
    model = ours(targets=("q_proj", "v_proj"))
    apply_lora(model, LoraConfig(r=3, target_modules=("v_proj",)), adapter_name="other")
    set_adapter(model, ["default", "other"])
    randomize_adapter(model)
    return model, tmp_path / "new"


def test_a_swapped_adapter_takes_the_place_of_the_old(pair):
    model, new = pair
    swap_adapter(model, new)
    layers = lora_layers(model)
    for name, layer in layers.items():
        own = {"v_proj": ("other",)}.get(name.rpartition(".")[2], ("default",))
        assert layer.active_adapters == own and set(layer.lora_A) == set(own)
        trained = [p.requires_grad for p in layer.parameters_of(own[0]).values()]
        assert all(trained) is (own == ("other",))  # as it was
    set_adapter(model, "default")
    wanted = logits(load_adapter(tiny_model("llama"), new))
    assert torch.equal(logits(model), wanted)


def test_an_idle_one_stays_idle(pair):
    model, new = pair
    set_adapter(model, "other")
    before = logits(model)
    swap_adapter(model, new)
    assert torch.equal(logits(model), before)


def test_what_cannot_be_swapped_leaves_the_model_alone(pair):
    model, new = pair
    merge_adapter(model, "default")
    before, values = snapshot(model), logits(model)
    with pytest.raises(UserError, match="is merged: unmerge_adapter"):
        load_adapter_weights(model, new)
    for name, message in (("default", "is merged: unmerge_adapter"), ("none", "no adapter 'none'")):
        with pytest.raises(UserError, match=message):
            swap_adapter(model, new, adapter_name=name)
    change_tensors(new, lambda tensors: tensors.clear())
    with pytest.raises(UserError, match="no lora_A or lora_B tensor"):
        swap_adapter(model, new, adapter_name="other")
    assert snapshot(model) == before and torch.equal(logits(model), values)
