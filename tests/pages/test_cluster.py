"""docs/cluster.md: its jobs are the files of cluster/, and start what torchrun and train.py know.
The Dockerfile's install lines work in a clean environment."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.run import parse_args

from qlora.cli import parse
from qlora.config import TrainConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cluster.md").read_text("utf-8")
SLURM, SKYPILOT, KUBERNETES = (
    ROOT / "cluster" / name for name in ("slurm.sh", "skypilot.yaml", "kubernetes.yaml")
)
DOCKERFILE = ROOT / "Dockerfile"


def tool(name: str) -> str:
    """A program of the test packages; the test skips itself where there is none."""
    found = shutil.which(name, path=Path(sys.executable).parent) or shutil.which(name)
    return found or pytest.skip(f"{name} is not installed")


def run(*command: object, **given: Any) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **given)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- jobs


@pytest.mark.parametrize("path", [SLURM, SKYPILOT, KUBERNETES], ids=lambda path: path.name)
def test_page_shows_the_file(path):
    assert f"```{path.suffix[1:]}\n{path.read_text('utf-8')}```" in PAGE


def commands_of_jobs() -> dict[str, list[str]]:
    """The words of each job's torchrun, with what its scheduler sets."""
    sky = yaml.safe_load(SKYPILOT.read_text("utf-8"))
    (container,) = job()["containers"]
    flags = "--config configs/7b_12gb.yaml --data mine.jsonl --output-dir out/mine"
    slurm = SLURM.read_text("utf-8").replace('"$@"', flags)
    assert f"sbatch cluster/slurm.sh {flags}" in PAGE
    texts = {"skypilot": sky["run"], "slurm": slurm[slurm.index("srun ") :]}
    plain = {
        name: shlex.split(re.sub(r"\$\w+", "8", text.replace("\\\n", " ")))
        for name, text in texts.items()
    }
    return plain | {"kubernetes": [*container["command"], *container["args"]]}


def job() -> dict[str, Any]:
    return yaml.safe_load(KUBERNETES.read_text("utf-8"))["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", ["slurm", "skypilot", "kubernetes"])
def test_torchrun_and_train_know_the_words(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = commands_of_jobs()[name]
    (at,) = [i for i, word in enumerate(words) if word.endswith("torchrun")]
    launch = parse_args(words[at + 1 :])
    assert launch.nproc_per_node == "8" and launch.max_restarts == 3
    assert launch.standalone or (launch.rdzv_backend == "c10d" and launch.rdzv_endpoint)
    assert launch.training_script == "train.py"
    config = parse(TrainConfig, launch.training_script_args, prog="train.py")
    assert config.resume and config.model == "Qwen/Qwen2.5-7B-Instruct"  # of the recipe
    assert config.output_dir.startswith(("/shared/", "out/"))


def test_slurm_script_is_bash_and_warns_before_its_end():
    run(shutil.which("bash"), "-n", SLURM)
    run(tool("shellcheck"), SLURM)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", SLURM.read_text("utf-8"), re.M))
    assert options["signal"] == "TERM@120" and "requeue" in options
    assert options["ntasks-per-node"] == "1"  # torchrun starts the ranks


def test_skypilot_job_has_shell_and_a_folder_that_outlives_it():
    sky = yaml.safe_load(SKYPILOT.read_text("utf-8"))
    for part in ("setup", "run"):
        run(shutil.which("bash"), "-n", "-c", sky[part])
    assert sky["file_mounts"]["/shared"]["mode"] == "MOUNT_CACHED"  # MOUNT cannot append


def test_kubernetes_job_has_the_images_user_and_mounts():
    pod = job()
    (container,), names = pod["containers"], {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == names
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert pod["restartPolicy"] == "Never"  # which podFailurePolicy needs
    assert pod["securityContext"]["runAsUser"] == int(instructions()["USER"][0])
    assert pod["terminationGracePeriodSeconds"] > 30  # torchrun's own, after a signal


# ---- the image


def instructions() -> dict[str, list[str]]:
    """The values of each instruction, continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text("utf-8").splitlines() if line[:1] not in "#"]
    found: dict[str, list[str]] = {}
    for line in filter(None, "\n".join(lines).replace("\\\n", " ").splitlines()):
        name, value = line.split(maxsplit=1)
        found.setdefault(name, []).append(" ".join(value.split()))
    return found


def image_files() -> list[Path]:
    """What COPY brings: the files in git that .dockerignore names."""
    rules = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    kept = [rule[1:] for rule in rules if rule.startswith("!")]
    assert all((ROOT / name).exists() for name in kept) and "*" in rules
    listed = run("git", "ls-files", "--", *kept, cwd=ROOT).splitlines()
    return [Path(name) for name in listed]


def test_dockerfile_passes_the_linter():
    assert run(tool("hadolint"), DOCKERFILE) == ""


def test_image_is_pinned_and_has_no_root_or_weights():
    said = instructions()
    (base,), (user,) = said["FROM"], said["USER"]
    version = re.fullmatch(r"nvidia/cuda:(\d+\.\d+)\.\d+-base-ubuntu[\d.]+", base)
    assert version and user.isdecimal() and int(user) > 0
    if torch.version.cuda:  # the libraries that torch brings, on a machine with them
        assert version[1] == torch.version.cuda
    installs = [line for line in said["RUN"] if "pip install" in line]
    assert len(installs) == 2
    assert all("pip install --no-cache-dir --constraint constraints.txt" in i for i in installs)
    names = {str(path) for path in image_files()}
    assert {"train.py", "merge_dequant.py", "pyproject.toml", "qlora/apps/report.html"} <= names
    assert not [name for name in names if name.endswith((".safetensors", ".gguf", ".jsonl"))]


@pytest.mark.full
def test_install_lines_work_in_a_clean_environment(tmp_path):
    """Those of the image, on its files alone; torch is the build that this environment has."""
    (build := tmp_path / "build.txt").write_text(f"torch=={torch.__version__}\n")
    pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    pip |= {"PIP_CONSTRAINT": str(build), "PIP_RETRIES": "0"}
    probe = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", tmp_path, "torch"]
    if subprocess.run([*map(str, probe)], env=os.environ | pip, capture_output=True).returncode:
        pytest.skip("pip does not find this build of torch")
    for path in image_files():
        (tmp_path / "image" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / "image" / path)
    venv = tmp_path / "venv"
    own = {"PATH": f"{venv}/bin:/usr/local/bin:/usr/bin:/bin", "HOME": str(tmp_path), **pip}
    given: Any = {"cwd": tmp_path / "image", "env": own}
    lines = [line for line in instructions()["RUN"] if "pip install" in line]
    for line in lines:
        line = line.replace("python3 -m venv", f"{sys.executable} -m venv")
        run("bash", "-ec", line.replace("/opt/venv", str(venv)), **given)
    (command,) = instructions()["CMD"]
    assert "--output-dir" in run(*yaml.safe_load(command), **given)
    for program in ("torchrun", "accelerate", "qlora"):
        run(venv / "bin" / program, "--help", **given)
    pins = dict(re.findall(r"^([\w.-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.M))
    code = (
        "from importlib.metadata import distributions as d\nfor p in d(): print(p.name, p.version)"
    )
    listed = run(venv / "bin/python", "-c", code, **given).lower().splitlines()
    found = {name.replace("_", "-"): version for name, version in map(str.split, listed)}
    others = {name for name in found if pins.get(name) != found[name].partition("+")[0]}
    of_torch = {name for name in others if name.startswith(("cuda-", "nvidia-", "triton"))}
    assert others - of_torch <= {"qlora", "pip", "setuptools"}, others
