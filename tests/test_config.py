"""The dataclasses: inert, frozen, and a wrong value is refused with what was wanted and came."""

import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest

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


def train_config(**settings):
    return TrainConfig(model="base", output_dir="out", data=DataConfig("rows.jsonl"), **settings)


def test_defaults_are_those_of_the_papers():
    config = train_config()
    assert (config.quant.quant_type, config.quant.blocksize) == ("nf4", 64)
    assert config.quant.double_quant
    assert (config.lora.target_modules, config.lora.lora_alpha) == ("all-linear", 32)
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 16
    assert (config.max_grad_norm, config.lr_scheduler_type) == (0.3, "linear")


@pytest.mark.parametrize(
    ("use_rslora", "scaling"),
    [(False, 2.0), (True, 8.0)],  # 32 / 16; 32 / sqrt(16)
)
def test_scaling(use_rslora, scaling):
    assert LoraConfig(r=16, lora_alpha=32, use_rslora=use_rslora).scaling == scaling


def test_the_names_of_inits_say_what_they_want():
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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantConfig(quant_type="nf5"), "quant_type must be nf4 or fp4, got 'nf5'"),
        (
            lambda: QuantConfig(blocksize=65),
            "blocksize must be one of 32, 64, 128, 256, 512, 1024, 2048, 4096, got 65",
        ),
        (
            lambda: QuantConfig(compute_dtype="int8"),
            "compute_dtype must be auto, bf16, fp16 or fp32, got 'int8'",
        ),
        (lambda: LoraConfig(r=0), "r must be a whole number above 0, got 0"),
        (lambda: LoraConfig(lora_alpha=0), "lora_alpha must be a number above 0, got 0"),
        (lambda: LoraConfig(lora_dropout=1), "lora_dropout must be at least 0 and below 1, got 1"),
        (
            lambda: LoraConfig(target_modules=()),
            "target_modules is empty: name at least one module",
        ),
        (
            lambda: LoraConfig(adapter_dtype="fp16"),
            "adapter_dtype must be auto, bf16 or fp32, got 'fp16'",
        ),
        (
            lambda: LoraConfig(init_lora_weights="pisa"),
            "init_lora_weights must be true, gaussian, pissa, pissa_niter_N, olora, loftq or eva, "
            "got 'pisa'",
        ),
        (
            lambda: LoraConfig(init_lora_weights=False),
            "init_lora_weights must be true, gaussian, pissa, pissa_niter_N, olora, loftq or eva, "
            "got False",
        ),
        (
            lambda: LoraConfig(lora_bias=True, use_dora=True),
            "lora_bias is not there with use_dora, in PEFT neither: take one of them",
        ),
        (
            lambda: LoraConfig(init_lora_weights="pissa", use_dora=True),
            "use_dora is not there with init_lora_weights='pissa': take one of them",
        ),
        (
            lambda: LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_iter": 6}),
            "loftq_iter must be a whole number from 1 to 5, got 6",
        ),
        (
            lambda: LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 8}),
            "loftq_bits must be 4, as the base is, got 8",
        ),
        (
            lambda: LoraConfig(init_lora_weights="loftq", loftq_config={"iter": 2}),
            "loftq_config takes loftq_bits and loftq_iter, not iter",
        ),
        (
            lambda: LoraConfig(loftq_config={"loftq_iter": 2}),
            "loftq_config is for init_lora_weights=loftq: give both",
        ),
        (
            lambda: LoraConfig(init_lora_weights="gaussian", target_parameters=("experts.down",)),
            "target_parameters have no other start than true, and init_lora_weights is "
            "'gaussian': leave one of them out",
        ),
        (
            lambda: LoraConfig(init_lora_weights="eva", eva_config={"rho": 0.5}),
            "rho must be a number from 1 on, got 0.5",
        ),
        (
            lambda: LoraConfig(init_lora_weights="eva", eva_config=2),
            "eva_config must be NAME: NUMBER pairs, got 2",
        ),
        (
            lambda: ChatConfig(),
            "give either --adapter, a folder that train.py wrote, or --model, a whole model; "
            "got neither",
        ),
        (
            lambda: EvaluateConfig(data="x", adapter="a", model="b"),
            "give either --adapter, a folder that train.py wrote, or --model, a whole model; "
            "got both",
        ),
        (
            lambda: ChatConfig(model="a", base_model="b"),
            "base_model goes with --adapter alone: leave it out",
        ),
        (
            lambda: ChatConfig(adapter="a", load_in_4bit=True),
            "load_in_4bit goes with --model alone: leave it out",
        ),
        (
            lambda: ChatConfig(model="a", compare=True),
            "compare shows the base beside its adapter: give --adapter, not --model",
        ),
        (
            lambda: ChatConfig(model="a", temperature=-0.1),
            "temperature must be at least 0, got -0.1",
        ),
        (
            lambda: ChatConfig(model="a", max_new_tokens=0),
            "max_new_tokens must be at least 1, got 0",
        ),
        (lambda: EvaluateConfig(data="x", model="a", limit=0), "limit must be at least 1, got 0"),
        (
            lambda: EvaluateConfig(data="x", model="a", max_length=7),
            "max_length must be at least 8, got 7",
        ),
        (lambda: DataConfig("x", max_length=7), "max_length must be at least 8, got 7"),
        (
            lambda: train_config(task="cls"),
            "task must be causal-lm, seq2seq, seq-cls or token-cls, got 'cls'",
        ),
        (lambda: train_config(save_steps=0), "save_steps must be at least 1, got 0"),
        (lambda: train_config(eval_steps=0), "eval_steps must be at least 1, got 0"),
        (lambda: train_config(learning_rate=0.0), "learning_rate must be above 0, got 0.0"),
        (
            lambda: train_config(warmup_ratio=1.0),
            "warmup_ratio must be at least 0 and below 1, got 1.0",
        ),
        (
            lambda: TrainConfig("base", "out", DataConfig("x", packing=True), task="seq2seq"),
            "packing is for task causal-lm, and task is seq2seq: leave it out",
        ),
        (lambda: train_config(num_train_epochs=0), "num_train_epochs must be above 0, got 0"),
        (
            lambda: MergeConfig("adapter", "out", onto="gguf"),
            "onto must be nf4, original or auto, got 'gguf'",
        ),
        (
            lambda: MergeConfig("adapter", "out", onto="auto"),
            "onto auto measures both on the data of verify: give it too",
        ),
        (
            lambda: MergeConfig("adapter", "out", calibration="rows.jsonl"),
            "calibration and blocksize are for format nf4, and format is bf16: drop them, or "
            "choose nf4",
        ),
        (
            lambda: MergeConfig("adapter", "out", format="nf4", blocksize=100),
            "blocksize must be one of 32, 64, 128, 256, 512, 1024, 2048, 4096, got 100",
        ),
        (
            lambda: train_config(offload_activations=True, gradient_checkpointing=False),
            "offload_activations moves what gradient_checkpointing keeps, and that is off: turn it "
            "on, or leave offload_activations out",
        ),
        (
            lambda: MergeConfig("adapter", "out", min_kept=0.9),
            "min_kept is measured on the data of verify: give both",
        ),
        (
            lambda: MergeConfig("adapter", "out", verify="x", min_kept=95),
            "min_kept must be above 0 and at most 1, got 95",
        ),
    ],
)
def test_a_wrong_value_is_refused(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == message


def test_steps_stand_in_for_epochs():
    assert train_config(max_steps=5, num_train_epochs=0).max_steps == 5


@pytest.mark.parametrize(
    "make",
    [
        lambda: train_config(plan=True),
        lambda: train_config(gpu_memory="8GB"),
    ],
)
def test_what_is_not_there_yet_says_so(make):
    with pytest.raises(UserError, match="not there yet: "):
        make()


def test_a_user_error_is_one_line():
    assert str(UserError("first\n   second")) == "first second"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("lora_alhpa", " Did you mean lora_alpha?"), ("zzz", "")],
)
def test_did_you_mean(name, hint):
    assert did_you_mean(name, ["lora_alpha", "r"]) == hint


def test_importing_the_settings_is_light():
    heavy = "import qlora.cli, sys; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
