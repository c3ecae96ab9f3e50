"""The plan of a run on a CPU, against a real step there, whose tensors are counted."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import SIZES, with_folders

from qlora import LoraConfig, QuantConfig, apply_lora, load_base
from qlora.config import DataConfig, TrainConfig
from qlora.data.objectives import OBJECTIVES
from qlora.fast.attention import rows_collator
from qlora.plan.estimate import ALLOWANCE, CONTEXT, FILES, PROCESS, Planner
from qlora.plan.meter import WORKSPACES, Meter
from qlora.plan.optimizer import STATE
from qlora.plan.start import COMPILER, UNUSED
from qlora.training import prepare_for_training

ROOT = Path(__file__).parents[2]
ROWS, TOKENS = 3, 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = SIZES | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 5}
    config = transformers.LlamaConfig(**sizes | {"vocab_size": 8192})
    path = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def counted(config: TrainConfig) -> int:
    """The bytes of all tensors at the peak of a step on the CPU; of the 4-bit codes without their
    statistics."""
    model = load_base(config.model, config.quant, device="cpu")
    apply_lora(model, config.lora)
    prepare_for_training(model, config.gradient_checkpointing, fast_path=config.fast_path)
    collate = rows_collator(model, packing=False, fast_path=True, pad_token_id=0)
    row = {"input_ids": [5] * TOKENS, "labels": [5] * TOKENS}
    meter = Meter("all", workspace=0, device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        meter._note(tensor)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        meter.begin("step", "all")
        with meter:
            batch = dict(collate([row] * ROWS))
            batch.pop("attention_mask")
            labels = batch.pop("labels")
            loss = OBJECTIVES["causal-lm"].loss(model(**batch), labels, torch.tensor(1))
            loss.backward()
    return meter.segments[-1].peak.total()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_plan_is_what_a_step_on_the_cpu_allocates(dtype, checkpointing, folder):
    data, quant = DataConfig("rows.jsonl", max_length=TOKENS), QuantConfig(compute_dtype=dtype)
    config = TrainConfig(
        model=str(folder), output_dir="out", data=data, quant=quant, lora=LoraConfig(r=8),
        gradient_checkpointing=checkpointing, per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=1,
    )  # fmt: skip
    plan = Planner(config, device="cpu").plan()
    steps = [s for s in plan.segments if s.name not in ("loading", "optimizer step")]
    ours = max(s.peak.total() - s.peak[PROCESS] - s.peak[STATE] for s in steps)
    assert ours == pytest.approx(counted(config), rel=0.03)  # statistics are 3 % of the codes


def test_plan_of_a_run_on_the_cpu_has_no_gpu_parts(folder):
    data = DataConfig("rows.jsonl", max_length=64)
    config = TrainConfig(model=str(folder), output_dir="out", data=data)
    plan = Planner(config, device="cpu").plan()
    loading = plan.segments[0]
    files = (folder / "model.safetensors").stat().st_size
    assert loading.name == "loading" and loading.peak[FILES] == files
    counted = sum(plan.parts.values()) - plan.parts[ALLOWANCE]
    assert counted == max(segment.peak.total() for segment in plan.segments)
    assert not {CONTEXT, WORKSPACES} & plan.parts.keys() and plan.fits
    larger = replace(config, per_device_train_batch_size=64)
    assert Planner(larger, device="cpu").plan().peak_bytes > plan.peak_bytes


def test_the_command_imports_only_what_a_plan_uses(folder):
    code = f"""
import os, sys
from qlora.plan.start import import_without_unused
import_without_unused()
from qlora.cli import parse
from qlora.config import TrainConfig
from qlora.plan.command import show_plan
show_plan(parse(TrainConfig, sys.argv[1:], prog="train.py"))
names = {(*UNUSED, "matplotlib", "pyarrow", f"{COMPILER}.utils")!r}
print([name for name in names if name in sys.modules])
sys.stdout.flush()
os._exit(0)
"""
    flags = f"--plan --model {folder} --data rows.jsonl --output-dir out".split()
    ran = subprocess.run(
        [sys.executable, "-c", code, *flags],
        cwd=ROOT, env=with_folders(ROOT), capture_output=True, text=True,
    )  # fmt: skip
    assert ran.stdout.splitlines()[-1] == "[]", ran.stdout + ran.stderr
