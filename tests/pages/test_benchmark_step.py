"""benchmarks/step.py: both sides take the same steps, and its figures follow from measurements."""

import argparse
import json
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


@pytest.mark.gpu
@NEEDS_GPU
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


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--shape lama3.1-8b", "--shape lama3.1-8b / Did you mean llama3.1-8b?"),
        ("--shape tiny --seq 129", "--seq 129 / 128 positions"),
        ("--shape tiny --model x", "--model / --shape"),
        ("--sides our", "--sides our / Did you mean ours?"),
        ("--rounds 0", "--rounds / at least 1 / 0"),
        ("--rounds five", "--rounds / 'five'"),
        ("--gpu-memory lots", "5GB / 'lots'"),
        ("--gpu-memory 0.5GiB", "--gpu-memory 0.5GiB / CUDA context"),
        ("--shape tiny --seq 8 --count", "--count / checkpoints"),
        ("--gpu-memory 8GiB", "there is none here"),
        ("--longest", "there is none here"),
        ("--sides ours-offloading peft", "there is none here"),
    ],
)
def test_bad_flags_exit_with_one_line(step, monkeypatch, capsys, flags, words):
    if words == "there is none here" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["step.py", *flags.split()])
    with pytest.raises(SystemExit) as ended:
        step.main()
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert message.startswith("error: ") and message.count("\n") == 1
    assert all(word in message for word in words.split(" / ")), message


def test_missing_peer_is_named(step, monkeypatch, capsys):
    import step_flags

    monkeypatch.setattr(step_flags, "missing", lambda name: [name] * (name == "unsloth"))
    monkeypatch.setattr(
        sys, "argv", ["step.py", "--shape", "tiny", "--seq", "8", "--sides", "ours", "unsloth"]
    )
    with pytest.raises(SystemExit):
        step.main()
    assert "unsloth (pip install unsloth)" in capsys.readouterr().err


# ---- its parts


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
    for name, count in published.items():
        assert sum(p.numel() for p in on_meta(SHAPES[name]).parameters()) == count
    # Llama-2-7B: all but the embedding and 65 norms
    assert linear_parameters(SHAPES["llama2-7b"]) == 6_738_415_616 - 32000 * 4096 - 65 * 4096


@pytest.mark.parametrize("most", [0, 255, 256, 257, 5000, 65536, 70000])
def test_longest_row_is_found_in_few_tries(step, most):
    from longest import longest

    tried: list[int] = []

    def fits(tokens: int) -> bool:
        tried.append(tokens)
        return tokens <= most

    assert longest(fits, unit=256, limit=65536) == min(most, 65536) // 256 * 256
    assert len(tried) == len(set(tried)) <= 18


def test_rates_follow_from_seconds(step):
    row = {"seconds": [2.0, 1.0, 4.0]}
    step.with_rates({"sides": {"ours": row}, "ceiling_flops": 6e6}, tokens=1000, flops_a_token=3000)
    assert row["tokens_per_second"] == {"median": 500, "min": 250, "max": 1000}
    assert row["share_of_ceiling"] == 0.25  # 500 tokens x 3,000 FLOP of 6 MFLOP


def test_a_side_out_of_memory_does_not_stop_the_others(step, monkeypatch, capsys):
    from turns import ApartError

    order: list[str] = []

    def side(name: str) -> Callable[[str], object]:
        def call(method: str) -> object:
            order.append(name)
            return {"above_loaded_bytes": 8} if method == "warm_up" else (0.5, 2.0)

        return call

    def fails(kind: str) -> Callable[[str], object]:
        def call(method: str) -> object:
            raise ApartError(kind, "a traceback")

        return call

    sides = {"ours": side("ours"), "peft": fails("OutOfMemoryError"), "dense": side("dense")}
    monkeypatch.setattr(step, "runners", lambda *_, **__: nullcontext(sides))
    monkeypatch.setattr(step, "product", lambda *_, **__: nullcontext(lambda method: 100.0))
    flags = argparse.Namespace(rounds=3, alone=False, one_process=False)
    measured = step.by_turns(list(sides), None, flags)
    assert measured["sides"]["peft"] == {"out_of_memory": True}
    assert measured["sides"]["dense"]["seconds"] == [0.5] * 3
    assert order[2:] == ["ours", "dense", "dense", "ours", "ours", "dense"]  # alternating
    assert "peft: out of memory" in capsys.readouterr().out
    sides["peft"] = fails("KeyError")
    with pytest.raises(ApartError, match="a traceback"):
        step.by_turns(list(sides), None, flags)


class Block(nn.Module):
    """Saves its input, for its weight's gradient, and its output, for the sigmoid's."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.linear(x))


def test_shared_memory_is_counted_once(step):
    from saved import OUTSIDE, Kept, saved_tensors

    model = nn.Module()
    model.layers = nn.ModuleList([Block(), Block()])
    x = torch.randn(3, 4)
    kind = "float32 (3, 4)"
    # x and the first output; the second; exp keeps its result
    wanted = [Kept(0, kind, 48), Kept(0, kind, 48), Kept(1, kind, 48), Kept(OUTSIDE, kind, 48)]
    first, second = model.layers
    assert saved_tensors(model, lambda: second(first(x)).exp()) == wanted


def test_object_in_its_own_process(step):
    from turns import Apart, ApartError

    with Apart(Counter, "aab") as counter:
        assert counter("most_common", 1) == [("a", 2)]
        with pytest.raises(ApartError, match="no attribute 'missing'") as raised:
            counter("missing")
        assert raised.value.kind == "AttributeError"
        assert counter("total") == 3  # the process continues


# ---- the table


def test_tables_take_the_last_record_of_each_setting(step, tmp_path):
    from step_table import tables

    def run(seq: int, ours: float) -> dict:
        def side(rate: float, gib: int) -> dict:
            rates = dict.fromkeys(("median", "min", "max"), rate)
            return {"tokens_per_second": rates, "share_of_ceiling": 0.5, "seconds": [1.0],
                    "above_loaded_bytes": gib << 30}  # fmt: skip

        sides = {"ours": side(ours, 3), "peft": side(1000.0, 4), "trl": {"out_of_memory": True}}
        return {"device": "A card", "model": "llama3.1-8b", "dtype": "bfloat16", "batch": 1,
                "seq": seq, "r": 16, "checkpointing": True, "gpu_memory": None, "sides": sides,
                "ceiling_flops": 1e12, "loss_apart": 0.0}  # fmt: skip

    rows = [run(512, 1100.0), run(1024, 1500.0), run(512, 1200.0)]
    (tmp_path / "step.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = tables(tmp_path).splitlines()
    assert len(lines) == 2 + 2 * 3
    setting = "A card: llama3.1-8b, bfloat16, 1 x 512, r 16, checkpointing"
    assert lines[2] == f"| {setting} | ours | 1,200 | 1.20 | 50% | 3.00 GiB | 0.75 |"
    assert lines[4].startswith(f"| {setting} | trl | out of memory |")


def test_page_has_the_tables_of_the_records(step):
    from step_table import PAGE, with_tables

    text = PAGE.read_text("utf-8")
    rewritten = with_tables(text, ROOT / "benchmarks" / "results")
    assert text == rewritten, "python benchmarks/step_table.py rewrites the table"
