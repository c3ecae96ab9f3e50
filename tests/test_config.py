"""The dataclasses: inert, frozen, and a wrong value is refused with what was wanted and came."""

import re
import subprocess
import sys
from dataclasses import FrozenInstanceError
from functools import partial
from pathlib import Path

import pytest

import qlora.adapters
from qlora.config import (
    ChatConfig,
    DataConfig,
    EvaluateConfig,
    LoraConfig,
    MergeConfig,
    QuantConfig,
    TrainConfig,
)
from qlora.errors import UserError, did_you_mean

train_config = partial(TrainConfig, "base", "out")
trains = partial(train_config, DataConfig("rows.jsonl"))


def test_defaults_are_those_of_the_papers():
    config = trains()
    assert (config.quant.quant_type, config.quant.blocksize) == ("nf4", 64)
    assert config.quant.double_quant
    assert (config.lora.target_modules, config.lora.lora_alpha) == ("all-linear", 32)
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 16
    assert (config.max_grad_norm, config.lr_scheduler_type) == (0.3, "linear")


def test_scaling():
    assert LoraConfig(r=16, lora_alpha=32).scaling == 32 / 16
    assert LoraConfig(r=16, lora_alpha=32, use_rslora=True).scaling == 32 / 16**0.5


def test_the_table_of_initialisations():
    loftq = LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_iter": 2})
    assert (loftq.starts_from_weights, loftq.rebases, loftq.loftq_iter) == (True, True, 2)
    assert not LoraConfig(init_lora_weights="loftq").rebases
    assert LoraConfig(init_lora_weights="pissa_niter_16").pissa_niter == 16
    assert LoraConfig(init_lora_weights="pissa").pissa_niter is None
    assert not LoraConfig(init_lora_weights="eva").starts_from_weights


@pytest.mark.parametrize("use_rslora", [False, True])
def test_other_ranks_keep_the_scaling(use_rslora):
    patterns = {"rank_pattern": {"q": 6}, "alpha_pattern": {"q": 9}}
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=use_rslora, **patterns)
    doubled = config.with_ranks(2)
    for name in ("q", "k"):
        assert doubled.of(name).r == 2 * config.of(name).r
        assert doubled.of(name).scaling == pytest.approx(config.of(name).scaling)


def test_a_config_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        LoraConfig().r = 8


merge_config = partial(MergeConfig, "adapter", "out")
loftq = partial(LoraConfig, init_lora_weights="loftq")
experts = partial(LoraConfig, target_parameters=("experts.down",))
regex = partial(LoraConfig, target_modules=".*q")
packed = partial(train_config, DataConfig("x", packing=True))
offloading = partial(trains, offload_activations=True)


@pytest.mark.parametrize(
    ("make", "settings", "parts"),
    [
        (QuantConfig, {"quant_type": "nf5"}, "quant_type nf4 fp4 'nf5'"),
        (QuantConfig, {"blocksize": 65}, "blocksize 32 4096 65"),
        (QuantConfig, {"compute_dtype": "int8"}, "compute_dtype auto bf16 fp16 fp32 'int8'"),
        (LoraConfig, {"r": 0}, "r whole above 0"),
        (LoraConfig, {"r": 8.5}, "r whole above 0 8.5"),
        (LoraConfig, {"r": True}, "r whole above 0 True"),
        (LoraConfig, {"lora_alpha": 0}, "lora_alpha number above 0"),
        (LoraConfig, {"lora_alpha": "16"}, "lora_alpha number '16'"),
        (LoraConfig, {"lora_dropout": 1}, "lora_dropout at least 0 below 1"),
        (LoraConfig, {"target_modules": ()}, "target_modules is empty"),
        (LoraConfig, {"adapter_dtype": "fp16"}, "adapter_dtype auto bf16 fp32 'fp16'"),
        (LoraConfig, {"task_type": "CLS"}, "task_type SEQ_CLS QUESTION_ANS 'CLS'"),
        (LoraConfig, {"bias": "some"}, "bias none all lora_only 'some'"),
        (LoraConfig, {"rank_pattern": {"q": 0}}, "q in rank_pattern whole above 0"),
        (LoraConfig, {"rank_pattern": {"(": 4}}, "'(' rank_pattern regular expression"),
        (LoraConfig, {"alpha_pattern": [2]}, "alpha_pattern NAME: NUMBER [2]"),
        (LoraConfig, {"layers_pattern": ("h",)}, "layers_pattern layers_to_transform give both"),
        (regex, {"layers_to_transform": (0,)}, "layers_to_transform target_modules regular"),
        (LoraConfig, {"trainable_token_indices": (1, 1)}, "token_indices distinct (1, 1)"),
        (LoraConfig, {"trainable_token_indices": {"e": ()}}, "trainable_token_indices ()"),
        (experts, {"use_dora": True}, "target_parameters use_dora lora_bias lora_dropout"),
        (experts, {"init_lora_weights": "gaussian"}, "target_parameters weights 'gaussian'"),
        (LoraConfig, {"init_lora_weights": "pisa"}, "init_lora_weights pissa_niter_N eva 'pisa'"),
        (LoraConfig, {"init_lora_weights": "corda"}, "init_lora_weights pissa_niter_N eva 'corda'"),
        (LoraConfig, {"init_lora_weights": False}, "init_lora_weights true False"),
        (LoraConfig, {"lora_bias": True, "use_dora": True}, "lora_bias use_dora"),
        (LoraConfig, {"init_lora_weights": "pissa", "use_dora": True}, "use_dora 'pissa'"),
        (loftq, {"loftq_config": {"loftq_iter": 6}}, "loftq_iter from 1 to 5 6"),
        (loftq, {"loftq_config": {"loftq_bits": 8}}, "loftq_bits 4 8"),
        (loftq, {"loftq_config": {"iter": 2}}, "loftq_config loftq_bits loftq_iter iter"),
        (LoraConfig, {"loftq_config": {"loftq_iter": 2}}, "loftq_config init_lora_weights=loftq"),
        (LoraConfig, {"init_lora_weights": "eva", "eva_config": {"rho": 0.5}}, "rho 1 0.5"),
        (LoraConfig, {"init_lora_weights": "eva", "eva_config": 2}, "eva_config NAME: NUMBER 2"),
        (ChatConfig, {}, "either --adapter --model neither"),
        (EvaluateConfig, {"data": "x", "adapter": "a", "model": "b"}, "--adapter --model both"),
        (ChatConfig, {"model": "a", "base_model": "b"}, "base_model --adapter"),
        (ChatConfig, {"adapter": "a", "load_in_4bit": True}, "load_in_4bit --model"),
        (ChatConfig, {"model": "a", "compare": True}, "compare --adapter --model"),
        (ChatConfig, {"model": "a", "temperature": -0.1}, "temperature at least 0 -0.1"),
        (ChatConfig, {"model": "a", "max_new_tokens": 0}, "max_new_tokens at least 1 0"),
        (EvaluateConfig, {"data": "x", "model": "a", "limit": 0}, "limit at least 1 0"),
        (EvaluateConfig, {"data": "x", "model": "a", "max_length": 7}, "max_length at least 8 7"),
        (DataConfig, {"data": "x", "max_length": 7}, "max_length at least 8 7"),
        (trains, {"task": "cls"}, "task causal-lm seq2seq seq-cls token-cls 'cls'"),
        (trains, {"save_steps": 0}, "save_steps at least 1 0"),
        (trains, {"eval_steps": 0}, "eval_steps at least 1 0"),
        (trains, {"eval_steps": 5}, "eval_steps eval_data give both"),
        (trains, {"learning_rate": 0.0}, "learning_rate above 0 0.0"),
        (trains, {"loraplus_lr_ratio": 0}, "loraplus_lr_ratio number above 0"),
        (trains, {"warmup_ratio": 1.0}, "warmup_ratio below 1 1.0"),
        (trains, {"weight_decay": -1}, "weight_decay at least 0 -1"),
        (trains, {"max_steps": 0}, "max_steps above 0 -1 num_train_epochs"),
        (trains, {"samples": -1}, "samples at least 0 -1"),
        (packed, {"task": "seq2seq"}, "packing seq2seq"),
        (trains, {"num_train_epochs": 0}, "num_train_epochs above 0"),
        (offloading, {"gradient_checkpointing": False}, "offload_ gradient_checkpointing"),
        (trains, {"plan": True}, "--plan not supported yet"),
        (trains, {"gpu_memory": "8GB"}, "--gpu-memory not supported yet"),
        (merge_config, {"onto": "gguf"}, "onto nf4 original auto 'gguf'"),
        (merge_config, {"onto": "auto"}, "onto auto verify"),
        (merge_config, {"calibration": "rows.jsonl"}, "calibration nf4 bf16"),
        (merge_config, {"format": "nf4", "blocksize": 100}, "blocksize 32 4096 100"),
        (merge_config, {"min_kept": 0.9}, "min_kept verify"),
        (merge_config, {"verify": "x", "min_kept": 95}, "min_kept above 0 at most 1 95"),
        (merge_config, {"weights": (1.0, 2.0)}, "weights 1 adapters 2 weights"),
        (MergeConfig, {"adapter": (), "output_dir": "x"}, "adapter names no folder"),
        (MergeConfig, {"adapter": ("a", "a"), "output_dir": "x"}, "adapter names a folder twice"),
    ],
)
def test_a_wrong_value_is_refused(make, settings, parts):
    """The message names the field, what was wanted and what came."""
    with pytest.raises(UserError) as error:
        make(**settings)
    assert [part for part in parts.split() if part not in str(error.value)] == []


def test_max_steps_may_replace_epochs():
    assert trains(max_steps=5, num_train_epochs=0).max_steps == 5


def test_type_checkers_and_python_find_the_same_names():
    checked = re.findall(r"from (\S+) import (\w+) as \2\n", Path(qlora.__file__).read_text())
    checked += [("qlora.adapters", name) for name in qlora.adapters.__all__]
    assert {name: package for package, name in checked} == qlora._PACKAGE_OF


def test_a_user_error_is_one_line():
    assert str(UserError("first\n   second")) == "first second"


def test_did_you_mean():
    assert did_you_mean("lora_alhpa", ["lora_alpha", "r"]) == " Did you mean lora_alpha?"
    assert did_you_mean("zzz", ["lora_alpha", "r"]) == ""


def test_importing_the_settings_is_light():
    heavy = "import qlora.cli, sys; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
