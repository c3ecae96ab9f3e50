"""Ranks as torchrun and accelerate start them: restarts, errors in one line, and variables that a
launcher sets."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import axis, losses, quick_config, read_rows, refuses, with_folders
from several import SECONDS, At, free_port, in_ranks, trained

from qlora.cli import parse
from qlora.config import TrainConfig

REPOSITORY = Path(__file__).parents[2]
START = "start them with `torchrun --nproc-per-node N train.py"
PLACE = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}


@pytest.mark.parametrize(
    ("variables", "words"),
    [({}, ("RANK and LOCAL_RANK and MASTER_ADDR and MASTER_PORT not set", START)),
     (PLACE, ("MASTER_PORT not set", START)),
     (PLACE | {"RANK": "2", "MASTER_PORT": "1"}, ("RANK must be from 0 to 1, got 2", START)),
     (PLACE | {"MASTER_PORT": "x"}, ("MASTER_PORT must be from 1 to 65535, got 'x'", START)),
     ({"WORLD_SIZE": ""}, ("WORLD_SIZE must be a whole number, got '': unset it",)),
     ({"ACCELERATE_USE_FSDP": "true"}, ("ACCELERATE_USE_FSDP is set", "multi-GPU without it"))],
)  # fmt: skip
def test_variables_of_a_launcher_that_are_refused(
    variables, words, checkpoints, few, tmp_path, monkeypatch
):
    from qlora.training import train

    for name, value in {"WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    with refuses(tmp_path / "run", *words):
        train(quick_config(checkpoints("llama"), few, tmp_path / "run"))


@pytest.mark.parametrize(
    ("variables", "words"),
    [({"RANK": "0"}, "1/2 clients joined"), ({"RANK": "1"}, "Connection refused"),
     ({"RANK": "1", "MASTER_ADDR": "no.such.host.invalid"}, "no.such.host.invalid")],
)  # fmt: skip
def test_a_rank_that_finds_no_other_ends(variables, words, checkpoints, few, tmp_path, monkeypatch):
    from qlora.training import ranks, train

    monkeypatch.setattr(ranks, "JOIN", timedelta(seconds=1))
    others = {"WORLD_SIZE": "2", "MASTER_PORT": str(free_port())}
    for name, value in (PLACE | others | variables).items():
        monkeypatch.setenv(name, value)
    with refuses(tmp_path / "run", "the 2 processes do not find each other at", words):
        train(quick_config(checkpoints("llama"), few, tmp_path / "run"))


# ---- launchers


LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2",
                   "--main_process_port=0"),
}  # fmt: skip
SCRIPT = """
import os, sys
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    sys.exit("the first start fails")
from qlora.__main__ import run
run("train", prog="train.py")
"""


def launched(launcher: str, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Two processes of a script, by a launcher; none of them is left."""
    command = [sys.executable, "-m", *LAUNCHERS[launcher], *map(str, words)]
    given: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = with_folders(REPOSITORY) | {"OMP_NUM_THREADS": "1", **variables}
    with subprocess.Popen(command, env=environment, **given) as process:
        try:
            said, errors = process.communicate(timeout=SECONDS)
        finally:
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
    return subprocess.CompletedProcess(command, process.returncode, said, errors)


def flags(base: Path, rows: Path, output: Path, *more: object) -> list[object]:
    return [
        "--model", base, "--data", rows, "--eval-data", rows, "--output-dir", output,
        "--max-length", 128, "--logging-steps", 1, "--compute-dtype", "fp32", "--samples", 0,
        "--per-device-train-batch-size", 2, *more,
    ]  # fmt: skip


def commanded(words: list[object], callback: Any = None) -> None:
    trained(parse(TrainConfig, [*map(str, words)], prog="train.py"), callback=callback)


@pytest.mark.parametrize("launcher", axis(*LAUNCHERS))
def test_a_launcher_restarts_a_run_from_its_last_checkpoint(launcher, checkpoints, few, tmp_path):
    """A run in which a rank was killed after step 3."""
    (script := tmp_path / "script.py").write_text(SCRIPT)
    output, more = tmp_path / "run", ("--max-steps", 4, "--save-steps", 2)
    words = flags(checkpoints("llama"), few, output, *more)
    first, second = in_ranks(2, commanded, words, At(1, 3, signal.SIGKILL))
    assert second.code == -signal.SIGKILL and first.error != "it hangs"
    name = "--max_restarts=1" if launcher == "accelerate" else "--max-restarts=1"
    done = launched(launcher, name, script, *words, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert "training: 2 steps after step 2" in done.stdout
    assert done.stdout.count("An example row") == 1  # of one rank
    steps = [row["step"] for row in read_rows(output / "metrics.jsonl")]
    assert steps == [1, 2, 2, 3, 4, 4]  # epochs end at 2 and 4, with an evaluation


def test_an_error_of_all_ranks_is_printed_by_the_first(tmp_path):
    done = launched("torchrun", REPOSITORY / "train.py", "--sead", 7)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: unknown flag --sead. Did you mean --seed?"]
    assert re.findall(r"exitcode *: 2 ", done.stderr) and done.returncode == 1


def planned_slowly(config: TrainConfig) -> None:
    from qlora.errors import OWN_SECONDS
    from qlora.plan import run

    run.planned_bytes = lambda _: time.sleep(OWN_SECONDS + 1) if os.environ["RANK"] == "0" else None
    run.run(config)


def test_an_error_of_all_ranks_is_told_by_the_first_after_its_plan(checkpoints, few, tmp_path):
    settings: Any = {"sharding": "fsdp", "offload_base": True}  # without a GPU
    config = quick_config(checkpoints("llama"), few, tmp_path / "run", **settings)
    first, second = in_ranks(2, planned_slowly, config)
    told = "UserError: --offload-base wants a CUDA GPU, and torch finds none here: leave it out"
    assert first.error == told and not second.error.startswith("RankError")


def test_an_error_of_another_rank_is_printed_too():
    command, others = [sys.executable, "train.py", "--sead", "7"], {"WORLD_SIZE": "2", "RANK": "1"}
    environment = with_folders(REPOSITORY) | others
    given: Any = {"env": environment, "cwd": REPOSITORY, "capture_output": True, "text": True}
    done = subprocess.run(command, **given)
    said = "error: unknown flag --sead. Did you mean --seed?\n"
    assert (done.returncode, done.stderr) == (2, said)


OTHER_SEED = """
import os, sys
from qlora.__main__ import run
sys.argv += ["--seed", os.environ["RANK"]]
run("train", prog="train.py")
"""


@pytest.mark.full
def test_other_settings_of_a_rank_are_one_line_of_the_first(checkpoints, few, tmp_path):
    (script := tmp_path / "script.py").write_text(OTHER_SEED)
    words = flags(checkpoints("llama"), few, tmp_path / "run")
    done = launched("torchrun", script, *words, CUDA_VISIBLE_DEVICES="")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "rank 1 has other settings, seed 1, not 0 as rank 0" in errors[0]
    assert re.findall(r"exitcode *: 2 ", done.stderr) and done.returncode == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one(checkpoints, few, tmp_path):
    """In fp32; products of other sizes have other sums, as TF32 would make worse."""
    more = ("--max-steps", 10, "--optim", "adamw_torch", "--gradient-accumulation-steps")
    run = flags(checkpoints("llama"), few, tmp_path / "two", *more, 1)
    assert launched("torchrun", REPOSITORY / "train.py", *run).returncode == 0
    run = flags(checkpoints("llama"), few, tmp_path / "one", *more, 2)
    one = [sys.executable, REPOSITORY / "train.py", *map(str, run)]
    subprocess.run(one, env=with_folders(REPOSITORY), check=True)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
