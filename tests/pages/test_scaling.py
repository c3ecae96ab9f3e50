"""The benchmark of ranks and the arithmetic of nodes: small runs, and figures by other ways."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import with_folders

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import scaling

    return scaling


@pytest.fixture
def nodes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import nodes

    return nodes


def scaled(folder: Path, flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks/scaling.py", *flags.split()]
    variables = {"BENCHMARK_RESULTS": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, env=with_folders(ROOT) | variables, capture_output=True, text=True, check=False
    )


@pytest.mark.full
def test_one_and_two_ranks_are_measured_on_the_same_rows(tmp_path):
    flags = "--shape tiny --ranks 2 1 --seq 32 --rows 2 --steps 4 --rounds 1"
    done = scaled(tmp_path, flags)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "scaling.jsonl").read_text().splitlines()]
    said = [(row["growth"], row["ranks"], row["rows_a_step"]) for row in rows]
    rank, batch = "same rows a rank", "same global batch"
    assert said == [(rank, 1, 2), (rank, 2, 4), (batch, 1, 4), (batch, 2, 4)]
    assert rows[1]["rates"] == rows[3]["rates"]  # the same run
    for one, two in (rows[:2], rows[2:]):
        assert one["efficiency"] == 1
        assert two["efficiency"] == two["rates"][0] / one["rates"][0] / 2
        assert one["peak_bytes"] > 100 << 20  # torch alone is more
    assert rows[0]["command"] == f"python benchmarks/scaling.py {flags}"
    assert done.stdout.count("| ddp |") == 4


def test_efficiency_is_against_one_rank_of_the_same_round(scaling):
    names = ("growth", "sharding", "ranks", "rates")
    weak, strong = scaling.GROWTHS
    rows = [
        dict(zip(names, row, strict=True))
        for row in ((weak, "ddp", 1, [100.0, 50.0, 80.0]), (weak, "ddp", 2, [100.0, 90.0, 96.0]),
                    (strong, "ddp", 1, [200.0, 45.0, 100.0]))
    ]  # fmt: skip
    found = [(r["growth"], r["ranks"], r["efficiency"]) for r in scaling.with_efficiency(rows)]
    wanted = [(weak, 1, 1.0), (weak, 2, 0.6), (strong, 1, 1.0), (strong, 2, 0.48)]
    assert found == [(growth, n, pytest.approx(share)) for growth, n, share in wanted]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--ranks 2 4", "--ranks must have 1, the others are compared with it, got [2, 4]"),
        ("--ranks 1 2 3", "--ranks must divide the most of them, 3: not [2]"),
        ("--steps 2", "--steps must be above 2, got 2"),
        ("--model no/such/one --ranks 1", "1 ranks, ddp: error: model no/such/one"),
    ],
)
def test_what_cannot_be_measured_is_one_line(flags, said, scaling, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(scaling, "record", None)
    monkeypatch.setattr(sys, "argv", ["scaling.py", *flags.split()])
    with pytest.raises(SystemExit) as ended:
        scaling.main()
    told = capsys.readouterr()
    assert ended.value.code == 2 and told.out == "" and told.err.count("\n") == 1
    assert told.err.startswith(f"error: {said}")


# ---- docs/many_nodes.md


def test_page_has_the_tables(nodes):
    text = nodes.PAGE.read_text("utf-8")
    assert text == nodes.with_tables(text), "python benchmarks/nodes.py --write rewrites them"


def test_adapter_has_pefts_number_of_parameters(nodes):
    assert nodes.adapter_parameters() == 39_976_960  # PEFT: rank 16, all linear of Llama-2-7B


@pytest.mark.parametrize("gpus", [2, 3, 8])
def test_a_ring_sends_what_the_formula_says(nodes, gpus):
    """The ring, played: pieces of integers pass on until all have all sums."""
    values = [[rank * gpus + piece for piece in range(gpus)] for rank in range(gpus)]
    sums = [sum(column) for column in zip(*values, strict=True)]
    sent = [0] * gpus
    for turn in range(2 * (gpus - 1)):
        before = [list(own) for own in values]
        for rank in range(gpus):
            piece, to = (rank - turn) % gpus, (rank + 1) % gpus
            summed = before[to][piece] * (turn < gpus - 1)
            values[to][piece] = before[rank][piece] + summed
            sent[rank] += 1
    assert values == [sums] * gpus
    assert sent == [pytest.approx(nodes.sent_bytes(gpus, gpus))] * gpus  # of pieces of a byte


def test_times_are_those_of_worked_examples(nodes):
    # 160 MB at 25 Gb/s, sent 1.998 times half of it: 51.2 ms, and 20 waits of 20 us
    seconds = nodes.transfer_seconds(80e6, 1000, 25)
    assert seconds == pytest.approx(0.0512 * 0.999 + 2 * 9.97 * 20e-6, rel=1e-3)
    assert nodes.transfer_seconds(80e6, 1, 25) == 0
    # 6 × 6.6e9 weights × 16,384 tokens at 150e12 products a second
    assert nodes.step_seconds(16) == pytest.approx(4.33, rel=1e-2)
