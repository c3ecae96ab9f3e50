"""README.md, CONTRIBUTING.md and docs/: their commands and Python blocks run, their links resolve.

Everything runs in this process, on tiny models, in a copy of a folder with the files that the pages
name. The tables below hold every substitution.
"""

import importlib.util
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from markdown_it import MarkdownIt
from markdown_it.token import Token
from safetensors.torch import load_file, save_file

from qlora import UserError

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

INSTEAD = {  # a name on a page -> the tiny one that is used
    "Qwen/Qwen2.5-7B-Instruct": "base",
    "answerdotai/ModernBERT-base": "encoder",
    "path-or-hub-name": "base",
    "BASE": "base",
}
ALSO = {  # part of a command -> flags added to it, so that it takes seconds
    "train.py": "--max-steps 2 --max-length 128 --compute-dtype fp32",
    "--config configs/": "--model base",
    "-m qlora.chat": "--max-new-tokens 4",
    "-m qlora.evaluate": "--max-new-tokens 4",
}
NOT_RUN = {  # start of a command -> why it is not run
    "make": "minutes, or the whole of a check: make --dry-run instead",
    "pip install": "changes the environment: its packages are looked up",
    "python3 -m venv": "changes the environment",
    ". .venv": "changes the environment",
    "python -m demo": "minutes: `make demo`",
    "python -m pytest": "is running already: the files it names are looked up",
    "python benchmarks/": "minutes to hours: its flags are looked up",
    "python docs/api.py": "tests/pages/test_docs.py runs it",
    "python train.py --plan": "exits at once: tests/plan/test_command.py runs it",
    "torchrun": "several processes: tests/training/test_launchers.py starts them",
    "sbatch": "another program: tests/training/test_nodes.py runs the script",
    "sky": "another program: tests/pages/test_cluster.py reads its files",
    "kubectl": "another program: tests/pages/test_cluster.py reads its files",
    "docker": "another program: tests/pages/test_cluster.py reads the Dockerfile",
    "accelerate": "several processes: tests/training/test_launchers.py starts them",
    "vllm serve": "another program, needs a GPU",
    "python merge_dequant.py --format gguf-q4_k_m": "llama.cpp has to know the tokenizer",
    "python -m qlora.portable --adapter out/mine --gguf": "llama.cpp has to know the tokenizer",
    "llama-cli": "another program, llama.cpp",
    "llama-server": "another program, llama.cpp",
    "ollama": "another program",
    "hf": "needs an account",
    "nvidia-smi": "needs a GPU",
}
FOREIGN = {  # flags of other programs
    "--extra-index-url": "pip",
    "--max-lora-rank": "vLLM",
    "--max-restarts": "torchrun",
    "--node-rank": "torchrun",
    "--rdzv-id": "torchrun",
    "--account": "sbatch",
    "--partition": "sbatch",
    "--requeue": "sbatch",
    "--user": "docker run",
}
NEEDS_A_GPU = {"offload_activations()": "GPU"}  # Python -> a word of its error without a GPU
PROGRAMS = ("train.py", "merge_dequant.py", "benchmarks/step.py", "-m qlora.portable",
            "-m qlora.chat", "-m qlora.evaluate", "-m qlora.report")  # fmt: skip
TYPED = "What is the capital of France?\n"  # on standard input


def tokens(page: Path) -> Iterator[Token]:
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text("utf-8")):
        yield token
        yield from token.children or ()


def blocks(page: Path, kind: str) -> list[str]:
    return [t.content for t in tokens(page) if t.type == "fence" and t.info == kind]


def spans(page: Path) -> list[str]:
    return [t.content for t in tokens(page) if t.type == "code_inline"]


def commands(page: Path) -> list[str]:
    """Lines of blocks without a language, and spans that begin like a command."""
    typed = [re.sub(r" \\\n +", " ", block) for block in blocks(page, "")]  # continued lines
    lines = [line for block in typed for line in block.splitlines()]
    starts = tuple({name.split()[0] + " " for name in (*NOT_RUN, "python ")})
    lines += [span for span in spans(page) if span.startswith(starts)]
    return [one for line in lines for one in line.split(" && ")]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    found = [t.attrGet("href") or t.attrGet("src") for t in tokens(page)]
    return [str(link) for link in found if link and not re.match(r"https?:", str(link))]


def of_all_pages(what) -> list:
    """(page, item) for each item that `what` finds on a page."""
    return [
        pytest.param(page, one, id=f"{page.name}: {one}")
        for page in PAGES
        for one in dict.fromkeys(what(page))
    ]


def all_commands(*, run: bool) -> list:
    """(page, command) of the commands that are run, or are not, each on its first page."""
    found = {param.values[1]: param for param in reversed(of_all_pages(commands))}
    return [
        param for command, param in reversed(found.items()) if (why_not(command) is None) == run
    ]


def why_not(command: str) -> str | None:
    return next((start for start in NOT_RUN if f"{command} ".startswith(start)), None)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with all files that the pages name: models, data, recipes, and outputs."""
    folder = tmp_path_factory.mktemp("world")
    for name, family in {"base": "llama", "encoder": "modernbert"}.items():
        tiny_model(family).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    rows = [{"prompt": f"double {i}", "completion": str(2 * i)} for i in range(24)]
    films = [{"text": f"film {i}", "label": ("bad", "good")[i % 2]} for i in range(24)]
    for name, some in {"mine": rows, "held_out": rows[:8], "films": films}.items():
        text = "".join(json.dumps(row) + "\n" for row in some)
        (folder / f"{name}.jsonl").write_text(text)
    shutil.copytree(ROOT / "configs", folder / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("python train.py --model base --data mine.jsonl --output-dir out/mine", patch)
        run("python merge_dequant.py --adapter out/mine --output-dir out/mine-merged", patch)
        for name, more in {"4bit": "nf4", "int4": "int4 --calibration none"}.items():
            merge = "python merge_dequant.py --adapter out/mine --output-dir out/mine-"
            run(f"{merge}{name} --format {more}", patch)
    made = ("mine-gguf/Modelfile", "mine-gguf/mine-gguf-Q4_K_M.gguf", "mine-gguf/adapter.gguf",
            "base-gguf/base.gguf", "base/config.json")  # fmt: skip
    for file in (folder / "out" / name for name in made):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    for name in "ab":
        shutil.copytree(folder / "out/mine", folder / "out" / name)
    weights = shutil.copytree(folder / "out/mine", folder / "theirs") / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt"})  # as PEFT has it
    return folder


@pytest.fixture
def here(world, tmp_path, monkeypatch) -> Path:
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def instead(text: str) -> str:
    for said, meant in INSTEAD.items():
        text = text.replace(said, meant)
    return text


def run(command: str, patch: pytest.MonkeyPatch) -> None:
    """Run a command in this process; an exit code above 0 is an error."""
    words = shlex.split(instead(command))
    words += [word for part, more in ALSO.items() if part in command for word in more.split()]
    if "--output-dir" in words and "--resume" not in words:  # an earlier command wrote it
        shutil.rmtree(words[words.index("--output-dir") + 1], ignore_errors=True)
    assert words[0] == "python", f"neither run nor in NOT_RUN: {command}"
    patch.syspath_prepend(str(ROOT))
    patch.setattr(sys, "argv", words[2:] if words[1].startswith("-") else words[1:])
    patch.setattr(sys, "stdin", io.StringIO(TYPED))
    try:
        if words[1] == "-c":
            exec(words[2], {})
        elif words[1] == "-m":
            module = importlib.util.find_spec(words[2])
            assert module and module.origin, f"no module {words[2]}"
            runpy.run_path(module.origin, run_name="__main__")
        else:
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, f"{command}: exit code {stop.code}"


@pytest.mark.parametrize("page, command", all_commands(run=True))
def test_command_runs(page, command, here, monkeypatch):
    run(command, monkeypatch)


@pytest.mark.parametrize("page, command", all_commands(run=False))
def test_files_and_flags_of_other_commands_exist(page, command, world):
    words = shlex.split(command)
    for word in words:  # the output of an earlier command, or a file of the project
        if match := re.match(r"(out|benchmarks|tests|docs|demo)/", word):
            assert ((world if match[1] == "out" else ROOT) / word).exists(), word
    match words:
        case ["make", *targets]:
            said = subprocess.run(
                ["make", "--dry-run", *targets], cwd=ROOT, capture_output=True, text=True
            )
            assert said.returncode == 0, said.stderr
        case ["pip", "install", *packages]:
            known = (ROOT / "constraints.txt").read_text()
            for name in packages:
                if re.fullmatch(r"[\w-]+", name) and not name.startswith("-"):
                    assert f"\n{name}==" in known, f"{name} is not in constraints.txt"
            assert packages[packages.index("-c") + 1] == "constraints.txt"
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module)
        case ["python", script, *more] if script.startswith("benchmarks/"):
            flags = [word for word in more if word.startswith("--")]
            assert not flags or set(flags) <= flags_of(script)


def flags_of(program: str) -> set[str]:
    about, said = "--help" if program.startswith("benchmarks/") else "--help-all", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setenv("COLUMNS", "200")
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        run(f"python {program} {about}", patch)
    return set(re.findall(r"--[a-z][\w-]*", said.getvalue()))


def flags(page: Path) -> list[str]:
    found = [re.match(r"--[a-z][\w-]*", span) for span in spans(page)]
    return [match[0] for match in found if match]


@cache
def known_flags() -> set[str]:
    return set(FOREIGN).union(*map(flags_of, PROGRAMS))


@pytest.mark.parametrize("page, flag", of_all_pages(flags))
def test_flag_exists(page, flag):
    switch = flag.replace("--no-", "--")  # the help says that --no-NAME turns a switch off
    assert {flag, switch} & known_flags() or flag == "--trainer"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")],
                         ids=lambda page: page.name)  # fmt: skip
def test_python_runs(page, here):
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        said = [line for code, line in NEEDS_A_GPU.items() if code in block]
        is_refused = said and not torch.cuda.is_available()
        with pytest.raises(UserError, match=said[0]) if is_refused else nullcontext():
            exec(instead(block), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_have_a_tested_language_and_named_files_exist(page):
    assert {t.info for t in tokens(page) if t.type == "fence"} <= {
        "",
        "python",
        "json",
        "sh",
        "yaml",
    }
    for block in blocks(page, "json"):
        assert all(json.loads(line) for line in block.splitlines())
    ours = re.compile(r"(qlora|tests|benchmarks|configs|demo|docs)/[\w./-]+")
    named = [span for span in spans(page) if ours.fullmatch(span)]
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("page, link", of_all_pages(links))
def test_link_resolves(page, link):
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    assert target.is_relative_to(ROOT) and target.exists(), f"{link}: no such file"
    assert not anchor or anchor in anchors(target), f"{link}: {target.name} has no such heading"


def test_quoted_messages_are_in_the_code():
    """A quotation in “” is a part of an error message."""
    sources = "".join(path.read_text("utf-8") for path in (ROOT / "qlora").rglob("*.py"))
    said = re.sub(r'"\n +f?"', "", sources)
    quoted = re.findall("“(.+?)”", (ROOT / "README.md").read_text("utf-8"))
    assert len(quoted) > 8
    assert not [words for words in quoted if words not in said]


def test_names_in_contributing_exist_and_every_package_is_listed():
    files = [path for top in ("qlora", "tests") for path in (ROOT / top).rglob("*.py")]
    code = "".join(path.read_text("utf-8") for path in files if path != Path(__file__))
    _, steps = (ROOT / "CONTRIBUTING.md").read_text("utf-8").split("## Where to add", 1)
    names = {name.rpartition(".")[2] for name in re.findall(r"`([A-Za-z_.]+)`", steps)}
    assert len(names) > 20
    assert not [name for name in names if not re.search(rf"\b{name}\b", code)]
    packages = {path.parent.name for path in (ROOT / "qlora").glob("*/__init__.py")}
    named = {span.strip("/").removeprefix("qlora/") for span in spans(ROOT / "CONTRIBUTING.md")}
    assert not packages - named


def test_readme_links_to_every_page():
    assert {page.resolve() for page in PAGES[1:]} <= {
        (ROOT / link.partition("#")[0]).resolve() for link in links(PAGES[0])
    }
