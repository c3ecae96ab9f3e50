"""The dataclasses: a wrong value is refused with what was wanted and came."""

import re
from functools import partial
from itertools import product
from pathlib import Path

import pytest

import qlora.adapters
from qlora import DataConfig, LoraConfig, MergeConfig, QuantConfig, TrainConfig, UserError
from qlora.config import ChatConfig, EvaluateConfig
from qlora.errors import did_you_mean

train_config = partial(TrainConfig, "base", "out")
trains = partial(train_config, DataConfig("rows.jsonl"))


def test_defaults_are_those_of_the_papers():
    config = trains(max_steps=5, num_train_epochs=0)  # one of them is enough
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 16
    assert (config.max_grad_norm, config.lr_scheduler_type) == (0.3, "linear")
    assert LoraConfig() == LoraConfig(16, 32, 0.0, "all-linear")
    assert QuantConfig() == QuantConfig("nf4", 64, double_quant=True)


def test_iterations_of_pissa():
    assert LoraConfig(init_lora_weights="pissa_niter_16").pissa_niter == 16
    assert LoraConfig(init_lora_weights="pissa").pissa_niter is None


@pytest.mark.parametrize("use_rslora", [False, True])
def test_other_ranks_keep_the_scaling(use_rslora):
    patterns = {"rank_pattern": {"q": 6}, "alpha_pattern": {"q": 9}}
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=use_rslora, **patterns)
    doubled = config.with_ranks(2)
    for name in ("q", "k"):
        assert doubled.of(name).r == 2 * config.of(name).r
        assert doubled.of(name).scaling == pytest.approx(config.of(name).scaling)


merge_config = partial(MergeConfig, "adapter", "out")
verified = partial(merge_config, verify="x")
chat = partial(ChatConfig, model="a")
evaluate = partial(EvaluateConfig, data="x", model="a")
eva = partial(LoraConfig, init_lora_weights="eva")
loftq = partial(LoraConfig, init_lora_weights="loftq")
experts = partial(LoraConfig, target_parameters=("experts.down",))
regex = partial(LoraConfig, target_modules=".*q")
packed = partial(train_config, DataConfig("x", packing=True))
offloading = partial(trains, offload_activations=True)


@pytest.mark.parametrize(
    ("make", "names", "values", "wanted"),
    [
        (QuantConfig, "blocksize", [65], "32 4096"),
        (LoraConfig, "r", [0, 8.5, True], "whole number above 0"),
        (LoraConfig, "lora_alpha", [0, "16"], "a number above 0"),
        (LoraConfig, "lora_dropout", [1], "at least 0 below 1"),
        (LoraConfig, "adapter_dtype", ["fp16"], "auto bf16 fp32"),
        (LoraConfig, "task_type", ["CLS"], "SEQ_CLS QUESTION_ANS"),
        (LoraConfig, "trainable_token_indices", [(1, 1)], "distinct"),
        (LoraConfig, "init_lora_weights", ["pisa", "corda", False], "true pissa_niter_N eva"),
        (eva, "eva_config", [2], "NAME: NUMBER"),
        (chat, "temperature", [-0.1], "at least 0"),
        (chat, "max_new_tokens", [0], "at least 1"),
        (evaluate, "limit", [0], "at least 1"),
        (evaluate, "max_length", [7], "at least 8"),
        (partial(DataConfig, "x"), "max_length", [7], "at least 8"),
        (trains, "task", ["cls"], "causal-lm seq2seq seq-cls token-cls"),
        (trains, "save_steps eval_steps", [0], "at least 1"),
        (trains, "learning_rate loraplus_lr_ratio", [0.0], "number above 0"),
        (trains, "warmup_ratio", [1.0], "below 1"),
        (trains, "weight_decay samples", [-1], "at least 0"),
        (trains, "max_steps", [0], "above 0 -1 num_train_epochs"),
        (trains, "num_train_epochs", [0], "above 0"),
        (verified, "min_kept", [95], "above 0 at most 1"),
    ],
)
def test_a_wrong_value_is_refused(make, names, values, wanted):
    for name, value in product(names.split(), values):
        refuses(partial(make, **{name: value}), f"{name} {wanted}", repr(value))


def refuses(make, words, *more):
    with pytest.raises(UserError) as error:
        make()
    assert [part for part in (*words.split(), *more) if part not in str(error.value)] == []


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (LoraConfig, {"target_modules": ()}, "target_modules is empty"),
        (LoraConfig, {"target_modules": ("all-linear", "lm_head")}, "beside lm_head: leave lm_"),
        (LoraConfig, {"rank_pattern": {"q": 0}}, "q in rank_pattern whole above 0"),
        (LoraConfig, {"rank_pattern": {"(": 4}}, "'(' rank_pattern regular expression"),
        (LoraConfig, {"layers_pattern": ("h",)}, "layers_pattern layers_to_transform give both"),
        (regex, {"layers_to_transform": (0,)}, "layers_to_transform target_modules regular"),
        (LoraConfig, {"trainable_token_indices": {"e": ()}}, "trainable_token_indices ()"),
        (experts, {"use_dora": True}, "target_parameters use_dora lora_bias lora_dropout"),
        (experts, {"init_lora_weights": "gaussian"}, "target_parameters weights 'gaussian'"),
        (LoraConfig, {"lora_bias": True, "use_dora": True}, "lora_bias use_dora"),
        (LoraConfig, {"init_lora_weights": "pissa", "use_dora": True}, "use_dora 'pissa'"),
        (loftq, {"loftq_config": {"loftq_iter": 6}}, "loftq_iter from 1 to 5 6"),
        (loftq, {"loftq_config": {"loftq_bits": 8}}, "loftq_bits 4 8"),
        (loftq, {"loftq_config": {"iter": 2}}, "loftq_config loftq_bits loftq_iter iter"),
        (LoraConfig, {"loftq_config": {"loftq_iter": 2}}, "loftq_config init_lora_weights=loftq"),
        (eva, {"eva_config": {"rho": 0.5}}, "rho 1 0.5"),
        (ChatConfig, {}, "either --adapter --model neither"),
        (evaluate, {"adapter": "a"}, "--adapter --model both"),
        (chat, {"base_model": "b"}, "base_model --adapter"),
        (ChatConfig, {"adapter": "a", "load_in_4bit": True}, "load_in_4bit --model"),
        (chat, {"compare": True}, "compare --adapter --model"),
        (trains, {"eval_steps": 5}, "eval_steps eval_data give both"),
        (packed, {"task": "seq2seq"}, "packing seq2seq"),
        (offloading, {"gradient_checkpointing": False}, "offload_ gradient_checkpointing"),
        (trains, {"gpu_memory": "8GB"}, "--gpu-memory needs --plan"),
        (merge_config, {"onto": "auto"}, "onto auto verify"),
        (merge_config, {"calibration": "rows.jsonl"}, "calibration 4-bit bf16"),
        (merge_config, {"min_kept": 0.9}, "min_kept verify"),
        (merge_config, {"weights": (1.0, 2.0)}, "weights 1 adapters 2 weights"),
        (MergeConfig, {"adapter": (), "output_dir": "x"}, "adapter names no folder"),
        (MergeConfig, {"adapter": ("a", "a"), "output_dir": "x"}, "adapter names a folder twice"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(make, settings, words):
    refuses(partial(make, **settings), words)


def test_type_checkers_and_python_find_the_same_names():
    checked = re.findall(r"from (\S+) import (\w+) as \2\n", Path(qlora.__file__).read_text())
    checked += [("qlora.adapters", name) for name in qlora.adapters.__all__]
    assert {name: package for package, name in checked} == qlora._PACKAGE_OF


def test_messages():
    assert str(UserError("first\n   second")) == "first second"
    assert did_you_mean("lora_alhpa", ["lora_alpha", "r"]) == " Did you mean lora_alpha?"
    assert did_you_mean("zzz", ["lora_alpha", "r"]) == ""
