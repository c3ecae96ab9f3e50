"""benchmarks/step.py: sides that train alike, figures that follow from what was measured."""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import NEEDS_GPU
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The benchmark, with a results folder of its own."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import results
    import step

    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)  # a side switches it off
    return step


def command(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["step.py", *flags])


TINY = ("--shape", "tiny", "--seq", "32", "--batch", "2", "--one-process")


# ---- the command ----


def test_both_sides_take_the_same_steps(step, monkeypatch, tmp_path, capsys):
    rounds = ("--rounds", "2", "--dtype", "fp32", "--sides", "ours", "peft", "dense")
    command(monkeypatch, *TINY, *rounds)
    step.main()
    row = json.loads((tmp_path / "step.jsonl").read_text())
    ours, peft, dense = row["sides"].values()
    # fp32 throughout; 1e-4 is a tenth of the smallest change between two of these steps
    assert ours["loss"] == pytest.approx(peft["loss"], rel=1e-4)
    assert ours["loss"] < dense["loss"] - 0.01  # they learned, from the same weights
    assert row["loss_apart"] < 1e-4
    for side in (ours, peft, dense):
        assert len(side["seconds"]) == 2
        assert side["above_loaded_bytes"] > 2 * 32 * 64 * 4  # a hidden state at least
        assert side["tokens_per_second"]["median"] > 0
    assert (ours["adapter_dtype"], dense["adapter_dtype"]) == ("float32", None)
    assert (row["model"], row["random_weights"], row["seq"]) == ("tiny", True, 32)
    assert row["command"].startswith("python benchmarks/step.py --shape tiny")
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines()[1:4]] == ["ours", "peft", "dense"]


def test_ablation_takes_parts_away_one_at_a_time(step, monkeypatch, tmp_path):
    from step_sides import PARTS

    command(monkeypatch, *TINY, "--rounds", "1", "--ablate")
    step.main()
    row = json.loads((tmp_path / "step_ablation.jsonl").read_text())
    assert list(row["sides"]) == ["ours", *(f"ours, no {part}" for part in PARTS)]
    assert row["loss_apart"] < 1e-2  # a part may round otherwise; it changes nothing else


@pytest.mark.gpu
@NEEDS_GPU
def test_offloading_changes_no_number(step, monkeypatch, tmp_path):
    rounds = ("--rounds", "2", "--dtype", "fp32", "--sides", "ours", "ours-offloading")
    command(monkeypatch, *TINY, *rounds)
    step.main()
    ours, offloading = json.loads((tmp_path / "step.jsonl").read_text())["sides"].values()
    assert ours["loss"] == offloading["loss"]


def test_what_a_layer_keeps(step, monkeypatch, tmp_path, capsys):
    command(monkeypatch, *TINY, "--count", "--no-checkpointing", "--dtype", "fp32")
    step.main()
    ours, peft = json.loads((tmp_path / "step_saved.jsonl").read_text())["saved"].values()
    x = 2 * 32 * 64 * 4  # bytes of a hidden state
    for side in (ours, peft):
        assert x <= side["layer_bytes"] < side["all_bytes"]
        # what autograd was told of is nearly all that is there
        assert side["held_bytes"] == pytest.approx(side["all_bytes"], rel=0.2)
    assert "in all" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--shape lama3.1-8b", r"--shape lama3.1-8b is not known. Did you mean llama3.1-8b\?"),
        ("--shape tiny --seq 129", "--seq 129 is more than the 128 positions of the model"),
        ("--shape tiny --model x", "--model and --shape both say what to train"),
        ("--sides our", r"--sides our is not known. Did you mean ours\?"),
        ("--rounds 0", "--rounds must be at least 1, got 0"),
        ("--rounds five", "argument --rounds: invalid int value: 'five'"),
        ("--gpu-memory lots", "size must look like 5GB or 500MB, got 'lots'"),
        ("--gpu-memory 0.5GiB", "--gpu-memory 0.5GiB is what the CUDA context takes"),
        ("--shape tiny --seq 8 --count", "--count sees nothing inside of checkpoints"),
    ],
)
def test_a_mistake_is_one_line(step, monkeypatch, capsys, flags, message):
    command(monkeypatch, *flags.split())
    with pytest.raises(SystemExit) as ended:
        step.main()
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert told.startswith("error: ") and told.count("\n") == 1
    assert re.search(message, told), told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "flags", ["--gpu-memory 8GiB", "--longest", "--sides ours-offloading peft"]
)
def test_memory_of_a_gpu_wants_one(step, monkeypatch, capsys, flags):
    command(monkeypatch, *flags.split())
    with pytest.raises(SystemExit):
        step.main()
    assert "there is none here" in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_named(step, monkeypatch, capsys):
    import step_flags

    monkeypatch.setattr(
        step_flags, "missing", lambda name: ["unsloth"] if name == "unsloth" else []
    )
    command(monkeypatch, "--shape", "tiny", "--seq", "8", "--sides", "ours", "unsloth")
    with pytest.raises(SystemExit):
        step.main()
    assert "unsloth (pip install unsloth)" in capsys.readouterr().err


# ---- its parts ----


def test_shapes_have_the_published_number_of_parameters(step):
    from shapes import SHAPES, linear_parameters, on_meta

    published = {
        "llama2-7b": 6_738_415_616,
        "llama3.1-8b": 8_030_261_248,
        "llama3.2-1b": 1_235_814_400,
        "mistral-7b": 7_248_023_552,
        "qwen2.5-0.5b": 494_032_768,
        "qwen2.5-7b": 7_615_616_512,
        "qwen3-8b": 8_190_735_360,
        "gemma2-9b": 9_241_705_984,
        "smollm2-135m": 134_515_008,
    }
    assert set(published) == set(SHAPES) - {"tiny"}
    for name, wanted in published.items():
        model = on_meta(SHAPES[name])
        assert sum(p.numel() for p in model.parameters()) == wanted
    # Llama-2-7B: all but the embedding and 65 norms
    assert linear_parameters(SHAPES["llama2-7b"]) == 6_738_415_616 - 32000 * 4096 - 65 * 4096


@pytest.mark.parametrize("most", [0, 1, 255, 256, 257, 1000, 1024, 5000, 65536, 70000])
def test_the_longest_row_is_found_in_few_tries(step, most):
    from longest import longest

    tried = []

    def fits(tokens: int) -> bool:
        tried.append(tokens)
        return tokens <= most

    assert longest(fits, unit=256, limit=65536) == min(most, 65536) // 256 * 256
    assert len(tried) == len(set(tried)) <= 18


def test_rates_follow_from_seconds(step):
    row = {"seconds": [2.0, 1.0, 4.0]}
    found = {"sides": {"ours": row}, "ceiling_flops": 6e6}
    step.with_rates(found, tokens=1000, flops_a_token=6 * 500)
    assert row["tokens_per_second"] == {"median": 500, "min": 250, "max": 1000}
    assert row["share_of_ceiling"] == 0.25  # 500 tokens x 3,000 FLOP of 6 MFLOP


def test_a_side_that_runs_out_of_memory_does_not_stop_the_others(step, monkeypatch, capsys):
    from turns import ApartError

    order = []

    def side(name: str) -> Callable[[str], object]:
        def call(method: str) -> object:
            order.append(name)
            return {"above_loaded_bytes": 8} if method == "warm_up" else (0.5, 2.0)

        return call

    def too_large(method: str) -> object:
        raise ApartError("OutOfMemoryError", "a traceback")

    sides = {"ours": side("ours"), "peft": too_large, "dense": side("dense")}
    monkeypatch.setattr(step, "runners", lambda *_, **__: nullcontext(sides))
    monkeypatch.setattr(step, "product", lambda *_, **__: nullcontext(lambda method: 100.0))
    given = argparse.Namespace(rounds=3, alone=False, one_process=False)
    found = step.by_turns(list(sides), None, given)
    assert found["sides"]["peft"] == {"out_of_memory": True}
    assert found["sides"]["dense"]["seconds"] == [0.5] * 3
    assert order[2:] == ["ours", "dense", "dense", "ours", "ours", "dense"]  # by turns
    assert found["ceiling_flops"] == 100.0
    assert "peft: out of memory" in capsys.readouterr().out

    def broken(method: str) -> object:
        raise ApartError("KeyError", "a traceback")

    sides["peft"] = broken
    with pytest.raises(ApartError, match="a traceback"):
        step.by_turns(list(sides), None, given)


class Block(nn.Module):
    """Saves its input, for its weight's gradient, and its output, for the sigmoid's."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.linear(x))


def test_memory_that_two_tensors_share_is_counted_once(step):
    from saved import OUTSIDE, Kept, saved_tensors

    model = nn.Module()
    model.layers = nn.ModuleList([Block(), Block()])
    x = torch.randn(3, 4)

    def forward() -> Tensor:
        first, second = model.layers
        return second(first(x)).exp()

    kind = "float32 (3, 4)"
    # x and the first output; the second; exp keeps its result
    wanted = [Kept(0, kind, 48), Kept(0, kind, 48), Kept(1, kind, 48), Kept(OUTSIDE, kind, 48)]
    assert saved_tensors(model, forward) == wanted


def test_an_object_in_its_own_process(step):
    from turns import Apart, ApartError

    with Apart(Counter, "aab") as counter:
        assert counter("most_common", 1) == [("a", 2)]
        with pytest.raises(ApartError, match="no attribute 'missing'") as raised:
            counter("missing")
        assert raised.value.kind == "AttributeError"
        assert counter("total") == 3  # it goes on
    with pytest.raises(ApartError, match="invalid literal"), Apart(int, "x") as number:
        number.ready()


# ---- the table ----


def run(seq: int, *, ours: float, gpu_memory: str | None = None) -> dict[str, object]:
    """A record, as far as tables read it."""
    sides = {
        name: {
            "seconds": [1.0],
            "tokens_per_second": {"median": rate, "min": rate, "max": rate},
            "share_of_ceiling": 0.5,
            "above_loaded_bytes": held,
        }
        for name, rate, held in (("ours", ours, 3 << 30), ("peft", 1000.0, 4 << 30))
    }
    return {
        "device": "A card", "model": "llama3.1-8b", "dtype": "bfloat16", "batch": 1, "seq": seq,
        "r": 16, "checkpointing": True, "gpu_memory": gpu_memory, "ceiling_flops": 1e12,
        "loss_apart": 0.0, "sides": {**sides, "trl": {"out_of_memory": True}},
    }  # fmt: skip


def write(file: Path, rows: list[dict[str, object]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_tables_are_made_of_the_last_record_of_a_question(step, tmp_path):
    from step_table import tables

    assert tables(tmp_path) == ""
    rows = [run(512, ours=1100.0), run(1024, ours=1500.0), run(512, ours=1200.0)]
    write(tmp_path / "step.jsonl", rows)
    whose = "A card: llama3.1-8b, bfloat16, 1 x 512, r 16, checkpointing"
    lines = tables(tmp_path).splitlines()
    assert len(lines) == 2 + 2 * 3
    assert lines[2] == f"| {whose} | ours | 1,200 | 1.20 | 50% | 3.00 GiB | 0.75 |"
    assert lines[3] == f"| {whose} | peft | 1,000 | 1.00 | 50% | 4.00 GiB | 1.00 |"
    assert lines[4].startswith(f"| {whose} | trl | out of memory |")
    longest = {k: v for k, v in run(0, ours=1.0, gpu_memory="8GiB").items() if k != "sides"}
    write(tmp_path / "step_longest.jsonl", [{**longest, "tokens": {"ours": 4096, "peft": 0}}])
    card = "A card as 8GiB: llama3.1-8b, bfloat16, 1 rows, r 16, checkpointing"
    assert tables(tmp_path).splitlines()[-1] == f"| {card} | 4,096 | does not fit |"


def test_the_page_says_what_the_records_say(step):
    from step_table import BEGIN, END, PAGE, with_tables

    text = PAGE.read_text("utf-8")
    assert text.count(BEGIN) == text.count(END) == 1, "docs/measured.md has lost its markers"
    wanted = with_tables(text, ROOT / "benchmarks" / "results")
    assert text == wanted, "python benchmarks/step_table.py writes the table anew"
