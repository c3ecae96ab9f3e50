"""The benchmarks of a day on a GPU: what a CPU can run of them, and the page with their figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import with_folders

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_day.py"
# packages of the tests that a machine lent for half an hour need not have
MISSING = ("diffusers", "jupytext", "nbclient", "nbformat", "pdoc", "rouge_score")


@pytest.fixture
def gpu_day(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu_day

    return gpu_day


def run(*flags, folders=()):
    return subprocess.run(
        [sys.executable, SCRIPT, *flags], env=with_folders(*folders), capture_output=True,
        text=True, check=False,
    )  # fmt: skip


def test_a_dry_day_runs_on_a_cpu_without_the_packages_that_few_have(gpu_day, tmp_path):
    for name in MISSING:
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError(name={name!r})")
    out = tmp_path / "out"
    done = run("--out", out, "--dry", folders=[tmp_path])
    rows = {row["step"]: row for row in gpu_day.read(out / "day.jsonl")}
    assert done.returncode == 0, [row["output"] for row in rows.values() if row["exit"]]
    assert [*rows] == [step.name for step in gpu_day.STEPS if step.dry]
    assert rows["step-1x2048"]["records"][0]["sides"].keys() == {"ours", "peft"}
    table = done.stdout.split("| step |")[1]
    assert all(f"| {name} | done |" in table for name in rows)


def test_a_step_that_fails_or_hangs_stops_nothing(gpu_day, tmp_path, monkeypatch, capsys):
    steps = [("fails", 9, "-c 1/0"), ("hangs", 1, "-m http.server 0"), ("works", 9, "--version")]
    steps = [gpu_day.Step(*step, dry=step[2]) for step in steps]
    monkeypatch.setattr(gpu_day, "STEPS", steps)
    monkeypatch.setattr(
        sys, "argv", ["gpu_day.py", "--out", str(tmp_path), "--dry", "--from", "fails"]
    )
    with pytest.raises(SystemExit) as ended:
        gpu_day.main()
    assert ended.value.code == 1
    rows = gpu_day.read(tmp_path / "day.jsonl")
    assert [row["exit"] for row in rows] == [1, -9, 0]
    assert "ZeroDivisionError" in rows[0]["output"][-1]
    assert "Keyboard interrupt received" in rows[1]["output"][-1]  # it could tell what it had
    assert "killed at its limit" in capsys.readouterr().out


def test_no_step_begins_for_which_no_time_is_left(gpu_day, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    steps = [gpu_day.Step("short", 2, "--version"), gpu_day.Step("long", 500, "--version")]
    monkeypatch.setattr(gpu_day, "STEPS", steps)
    monkeypatch.setattr(
        sys, "argv", ["gpu_day.py", "--out", str(tmp_path), "--from", "short", "--budget", "60"]
    )
    with pytest.raises(SystemExit):
        gpu_day.main()
    assert "go on with --from long" in capsys.readouterr().out
    assert [row["step"] for row in gpu_day.read(tmp_path / "day.jsonl")] == ["short"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "error: --out is missing: a folder for the records"),
        (["--out", "x"], "error: no GPU is to be seen: --dry runs what a CPU can"),
        (["--out", "x", "--from", "y"], "error: --from y is no step. The steps: machine, smoke"),
    ],
)
def test_why_the_day_cannot_begin_is_one_line(flags, said):
    done = run(*flags)
    assert done.returncode == 2 and done.stderr.startswith(said) and done.stderr.count("\n") == 1


def test_page_has_the_last_day_and_every_step(gpu_day):
    text = gpu_day.PAGE.read_text("utf-8")
    day = ROOT / "benchmarks" / "results" / "gpu" / "day.jsonl"
    assert text == gpu_day.with_table(text, day)
    named = text.partition("| step | shows |")[2].partition("## The last day")[0]
    assert all(step.name in named for step in gpu_day.STEPS)


def test_table_of_a_day(gpu_day):
    side = {
        "tokens_per_second": {"median": 9000.4},
        "share_of_ceiling": 0.46,
        "peak_bytes": 5 << 30,
    }
    record = {"name": "step", "sides": {"ours": side, "peft": {"out_of_memory": True}}}
    row = {"step": "step-1x2048", "exit": 0, "seconds": 99.6, "records": [record], "output": []}
    shown = "ours 9,000 tokens/s, 46% of the ceiling, 5.00 GiB; peft out of memory"
    assert gpu_day.table([json.loads(json.dumps(row))]).endswith(
        f"| step-1x2048 | done | 100 | {shown} |"
    )
