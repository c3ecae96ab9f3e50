"""The benchmarks: both sides take the same steps, no run is repeated, pages have the figures."""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import on_gpu, with_folders
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora.adapters.apply import apply_lora, trainable_parameters
from qlora.config import LoraConfig

ROOT = Path(__file__).parents[2]
SMOLLM2_135M = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The benchmarks can be imported, and have a results folder of their own."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import results

    monkeypatch.setattr(results, "RESULTS", tmp_path)
    return results


@pytest.fixture
def quality(results: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    import quality

    monkeypatch.setattr(quality, "FILE", tmp_path / "quality.jsonl")
    return quality


def test_targets_have_the_published_number_of_parameters(quality):
    # LoRA of rank 16 on SmolLM2-135M by PEFT: all linear, attention, MLP
    for place, wanted in (("all", 4_884_480), ("attention", 1_843_200), ("mlp", 3_041_280)):
        with torch.device("meta"):  # shapes alone
            model = AutoModelForCausalLM.from_config(SMOLLM2_135M)
        apply_lora(model, LoraConfig(r=16, **quality.PLACES[place]))
        assert trainable_parameters(model)[0] == wanted
    per_rank = {"all": 305_280, "attention": 115_200, "mlp": 190_080}
    matched = [r * per_rank[place] for place, r in quality.QUESTIONS["place"]]
    assert max(matched) / min(matched) < 1.03


def test_recorded_runs_are_not_repeated(quality, checkpoints, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data.txt"
    data.write_text("".join(f"name : {i}||{i} is a cafe .\n" for i in range(40)))
    flags = ["--train", str(data), "--test", str(data), "--model", str(checkpoints("llama"))]
    command = ["quality.py", *flags, "--steps", "2", "--questions", "rate", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", command)
    # three rates each, whatever the tiny model's losses are
    monkeypatch.setattr(quality, "next_k", lambda found: None if len(found) > 2 else max(found) + 2)
    quality.main()
    lines = quality.FILE.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["place"] for row in rows] == ["full"] * 3 + ["all"] * 3
    assert quality.FILE.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    quality.FILE.write_text("\n".join(lines[:4]) + "\n")  # as if stopped there
    capsys.readouterr()
    quality.main()
    again = [json.loads(line) for line in quality.FILE.read_text().splitlines()]
    a_line_a_run, table = capsys.readouterr().out.split("\n\n")
    assert len(a_line_a_run.splitlines()) == 2 and "after 2 steps" in table
    assert [row["test_loss"] for row in again] == [row["test_loss"] for row in rows]


TINY = "--shape tiny --seq 32 --batch 2 --one-process --dtype fp32"


@pytest.fixture
def step(results: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import step

    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)  # a side switches it off
    return step


@pytest.fixture
def measure(step, monkeypatch, tmp_path) -> Callable[[str, str], dict]:
    """`measure(flags, name)`: run the benchmark, and return its record in NAME.jsonl."""

    def call(flags: str, name: str = "step") -> dict:
        monkeypatch.setattr(sys, "argv", ["step.py", *flags.split()])
        step.main()
        return json.loads((tmp_path / f"{name}.jsonl").read_text())

    return call


def test_sides_take_the_same_steps(measure, capsys):
    row = measure(f"{TINY} --rounds 2 --sides ours peft dense")
    ours, peft, dense = row["sides"].values()
    # fp32 throughout; 1e-4 is a tenth of the smallest change between two of these steps
    assert ours["loss"] == pytest.approx(peft["loss"], rel=1e-4)
    assert ours["loss"] < dense["loss"] - 0.01  # adapters were trained, from the same weights
    assert row["loss_apart"] < 1e-4
    for side in (ours, peft, dense):
        assert len(side["seconds"]) == 2
        assert side["above_loaded_bytes"] > 2 * 32 * 64 * 4  # a hidden state at least
    assert (ours["adapter_dtype"], dense["adapter_dtype"]) == ("float32", None)
    assert row["command"].startswith("python benchmarks/step.py --shape tiny")
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["ours", "peft", "dense"]


def test_ablation_turns_off_one_part_at_a_time(measure):
    from step_sides import PARTS

    row = measure(f"{TINY} --rounds 1 --ablate", "step_ablation")
    assert list(row["sides"]) == ["ours", *(f"ours, no {part}" for part in PARTS)]
    assert row["loss_apart"] < 1e-2  # a part may round differently; nothing else changes


@on_gpu
def test_offloading_changes_no_number(measure):
    row = measure(f"{TINY} --rounds 2 --sides ours ours-offloading")
    ours, offloading = row["sides"].values()
    assert ours["loss"] == offloading["loss"]


def test_saved_tensors_of_a_layer(measure):
    row = measure(f"{TINY} --count --no-checkpointing", "step_saved")
    for side in row["saved"].values():
        assert 2 * 32 * 64 * 4 <= side["layer_bytes"] < side["all_bytes"]
        # the saved tensors are nearly all that is alive
        assert side["held_bytes"] == pytest.approx(side["all_bytes"], rel=0.2)


def test_shapes_have_the_published_number_of_parameters(step):
    from shapes import SHAPES, linear_parameters, on_meta

    published = {
        "llama2-7b": 6_738_415_616, "llama3.1-8b": 8_030_261_248, "llama3.2-1b": 1_235_814_400,
        "mistral-7b": 7_248_023_552, "qwen2.5-0.5b": 494_032_768, "qwen2.5-7b": 7_615_616_512,
        "qwen3-8b": 8_190_735_360, "gemma2-9b": 9_241_705_984, "smollm2-135m": 134_515_008,
    }  # fmt: skip
    assert set(published) == set(SHAPES) - {"tiny"}
    for name, count in published.items():
        assert sum(p.numel() for p in on_meta(SHAPES[name]).parameters()) == count
    # Llama-2-7B: all but the embedding and 65 norms
    assert linear_parameters(SHAPES["llama2-7b"]) == 6_738_415_616 - 32000 * 4096 - 65 * 4096


def test_object_in_its_own_process(step):
    from turns import Apart, ApartError

    with Apart(Counter, "aab") as counter:
        with pytest.raises(ApartError, match="no attribute 'missing'"):
            counter("missing")
        assert counter("most_common", 1) == [("a", 2)]  # the process continues


def test_page_has_the_tables_of_the_records(step):
    from step_table import PAGE, with_tables

    text = PAGE.read_text("utf-8")
    rewritten = with_tables(text, ROOT / "benchmarks" / "results")
    assert text == rewritten, "python benchmarks/step_table.py rewrites the table"


GIB = 1 << 30
CONTEXT = GIB // 2  # about the memory of the CUDA context
LLAMA_8B = "llama3.1-8b --r 32 --offload"


@pytest.mark.parametrize(
    "card, flags, tokens",
    [
        (6, "llama2-7b", 2048),
        pytest.param(8, LLAMA_8B, 8192, marks=pytest.mark.full),
        pytest.param(12, LLAMA_8B, 24576, marks=pytest.mark.full),
        pytest.param(24, LLAMA_8B, 86016, marks=pytest.mark.full),
    ],
)
def test_page_has_the_counted_memory_and_it_fits(card, flags, tokens):
    command = [sys.executable, str(ROOT / "benchmarks" / "step_memory.py"), *flags.split()]
    ran = subprocess.run(
        [*command, "--seq", str(tokens)],
        env=with_folders(ROOT),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    counted = json.loads(ran.stdout.splitlines()[-1])
    page = (ROOT / "docs/measured.md").read_text("utf-8")
    (loaded, peak), *_ = re.findall(rf"{tokens:,} tokens.* \| ([\d.]+) GiB \| ([\d.]+) GiB", page)
    assert counted["loaded"] == pytest.approx(float(loaded) * GIB, rel=0.01)
    assert counted["peak"] == pytest.approx(float(peak) * GIB, rel=0.01)
    assert counted["peak"] < card * GIB - CONTEXT
