"""Runs on two nodes, as docs/many_nodes.md and cluster/slurm.sh type them: two agents of torchrun,
each with a rank. Losses and adapters are those of one process."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import axis, losses, read_rows, with_folders
from safetensors.torch import load_file
from several import SECONDS, free_port

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "many_nodes.md"
TORCHRUN = Path(sys.executable).with_name("torchrun")
NODES = 2
# What a node runs before its command: a host name, the other's name, and a cable when it is there.
# {0} is its number. On standard output it says when its network is there.
OWN_HOST = """
hostname node{0}
mount --bind "$1" /etc/hosts
ip link set lo up
echo ready && read -r
ip addr add 10.77.0.$((1 + {0}))/24 dev eth0
ip link set eth0 up
shift && exec "$@"
"""
UNSHARED = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child",
            "--mount-proc", "bash", "-ec")  # fmt: skip
HOSTS = "127.0.0.1 localhost\n10.77.0.1 node0\n10.77.0.2 node1\n"


@pytest.fixture(scope="session")
def few_steps(checkpoints, few) -> list[str]:
    return list(map(str, [
        "--model", checkpoints("llama"), "--data", few, "--max-length", 128, "--logging-steps", 1,
        "--compute-dtype", "fp32", "--samples", 0, "--per-device-train-batch-size", 2,
        "--max-steps", 4, "--optim", "adamw_torch", "--gradient-accumulation-steps", 1,
    ]))  # fmt: skip


@pytest.fixture(scope="session")
def of_one_process(few_steps, tmp_path_factory) -> Path:
    """The same rows a step in one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    words = [*few_steps[:-1], str(NODES), "--output-dir", str(folder)]  # accumulation
    train = [sys.executable, str(REPOSITORY / "train.py"), *words]
    subprocess.run(train, env=environment(), check=True)
    return folder


def environment() -> dict[str, str]:
    return with_folders(REPOSITORY) | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def require_same_run(output: Path, one: Path) -> None:
    """A rank sums in another order: fp32 rounding, over 4 steps."""
    assert losses(output) == pytest.approx(losses(one), abs=1e-5) and len(losses(one)) == 4
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (output, one))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).norm() <= 1e-4 * value.norm(), name


def typed(number: int) -> list[str]:
    """The page's first or second command without train.py's flags, for a rank a node."""
    blocks = re.findall(r"```\n(torchrun .*?)```", PAGE.read_text("utf-8"), re.S)
    words = shlex.split(blocks[number].replace("\\\n", " "))
    words = words[: words.index("train.py")]
    words[words.index("--nproc-per-node") + 1] = "1"
    assert words[words.index("--nnodes") + 1] == str(NODES)
    return [str(TORCHRUN), *words[1:], str(REPOSITORY / "train.py")]


@contextmanager
def started(commands: list[list[str]], variables: dict[str, str]) -> Iterator[list[Any]]:
    """Processes of these commands; none of them, or of their children, is left."""
    given: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes: list[Any] = []
    try:
        for command in commands:
            processes.append(subprocess.Popen(command, text=True, env=variables, **given))
        yield processes
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                pipe.close()


def require_success(processes: list[Any]) -> list[str]:
    """What each of them said; the others are written by one of them alone."""
    said = [process.communicate(timeout=SECONDS) for process in processes]
    assert [p.returncode for p in processes] == [0] * len(processes), said
    assert sum("An example row" in out for out, _ in said) == 1, said
    return [out for out, _ in said]


@pytest.mark.parametrize("number", axis(0, 1))
def test_the_pages_commands_on_one_machine(number, few_steps, of_one_process, tmp_path):
    port = str(free_port())
    places = {"node0:29500": f"127.0.0.1:{port}", "10.0.0.1": "127.0.0.1", "29500": port}
    commands = []
    for node in range(NODES):
        words = [places.get(word, word) for word in typed(number)]
        if "--node-rank" in words:
            words[words.index("--node-rank") + 1] = str(node)
        commands.append([*words, *few_steps, "--output-dir", str(tmp_path / "run"), "--resume"])
    with started(commands, environment()) as nodes:
        require_success(nodes)
    require_same_run(tmp_path / "run", of_one_process)


def can_make_hosts() -> bool:
    """Whether this process may make networks, on a system that has these."""
    if not all(map(shutil.which, ("unshare", "ip", "hostname", "mount"))):
        return False
    probe = [
        *UNSHARED,
        'hostname node0 && ip link add probe0 type veth peer name probe1 && test -e "$0"',
    ]
    return subprocess.run([*probe, sys.executable], capture_output=True).returncode == 0


@pytest.mark.full
@pytest.mark.skipif(not can_make_hosts(), reason="needs the right to make network namespaces")
def test_the_pages_command_on_two_hosts(few_steps, of_one_process, tmp_path):
    """Each node has a network, a host name and a process table of its own."""
    (hosts := tmp_path / "hosts").write_text(HOSTS)
    train = [*typed(0), *few_steps, "--output-dir", str(tmp_path / "run"), "--resume"]
    commands = [
        [*UNSHARED, OWN_HOST.format(node), "bash", str(hosts), *train] for node in range(NODES)
    ]
    with started(commands, environment()) as nodes:
        assert [node.stdout.readline() for node in nodes] == ["ready\n"] * NODES
        first, second = (str(node.pid) for node in nodes)
        cable = ["eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second]
        subprocess.run(["ip", "link", "add", *cable], check=True)
        for node in nodes:
            print(file=node.stdin, flush=True)
        require_success(nodes)
    require_same_run(tmp_path / "run", of_one_process)


# ---- cluster/slurm.sh

SRUN = """#!/bin/sh
# srun's part: the command on each node, and the first failure
[ "$1" = --kill-on-bad-exit=1 ] && shift
"$@" & first=$!
"$@" & second=$!
wait $first && wait $second
"""
SCONTROL = """#!/bin/sh
[ "$*" = "show hostnames node[0-1]" ] && echo 127.0.0.1 && echo 127.0.0.2
"""


def job_number() -> int:
    """One whose port, 20000 + its last four digits, is free."""
    for number in range(os.getpid(), os.getpid() + 10_000):
        with suppress(OSError), socket.socket() as one:
            one.bind(("127.0.0.1", 20_000 + number % 10_000))
            return number
    raise AssertionError("no port is free")


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.full
def test_the_slurm_script_starts_two_nodes_and_goes_on(few_steps, of_one_process, tmp_path):
    """Its first start ends after two steps, as at the end of its time."""
    (programs := tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/torchrun").symlink_to(TORCHRUN)
    (tmp_path / "train.py").symlink_to(REPOSITORY / "train.py")
    variables = environment() | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": str(NODES), "SLURM_GPUS_ON_NODE": "1",
        "SLURM_JOB_ID": str(job_number()),
    }  # fmt: skip
    job = ["bash", str(REPOSITORY / "cluster/slurm.sh"), *few_steps, "--output-dir", "run"]
    for steps in (2, 4):
        with started([[*job, "--max-steps", str(steps)]], variables) as jobs:
            (said,) = require_success(jobs)
    assert "training: 2 steps after step 2" in said
    assert [row["step"] for row in read_rows(tmp_path / "run/metrics.jsonl")] == [1, 2, 3, 4]
