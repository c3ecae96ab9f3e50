"""benchmarks/step.py: both sides take the same steps, and its figures follow from measurements."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import on_gpu

ROOT = Path(__file__).parents[2]
TINY = "--shape tiny --seq 32 --batch 2 --one-process --dtype fp32"


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The benchmark, with a results folder of its own."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import results
    import step

    monkeypatch.setattr(results, "RESULTS", tmp_path)
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
