"""Fuzz the readers of adapters, settings and records with atheris, which is no dependency:

    pip install atheris
    PYTHONPATH=.:tests python tests/reliability/fuzz.py records CORPUS -max_total_time=1200

The readers are adapter, settings and records. CORPUS is a folder, which gets good files at the
start; anything but a UserError is a finding.
Results: benchmarks/results/fuzzing.md.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["qlora", "yaml", "json"]):
    from qlora.adapters.format import CONFIG, WEIGHTS, read_adapter
    from qlora.cli import parse
    from qlora.config import TrainConfig
    from qlora.data.rows import prepare_data
    from qlora.errors import UserError
    from qlora.files import read_metrics, read_run_file

from conftest import RECORDS, ROWS, tiny_model, tiny_tokenizer
from damage import ALPACA, CHAT, TOOLS

FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))


def adapter() -> tuple[dict[str, bytes], Callable[[str, bytes], None]]:
    """Contents of adapter_config.json, or of adapter_model.safetensors, beside a good other one."""
    from qlora import LoraConfig, apply_lora, save_adapter

    save_adapter(
        apply_lora(tiny_model("llama"), LoraConfig(r=1, target_modules=["q_proj"])), FOLDER
    )
    good = {name: (FOLDER / name).read_bytes() for name in (CONFIG, WEIGHTS)}

    def read(name: str, content: bytes) -> None:
        for each, text in (good | {name: content}).items():
            (FOLDER / each).write_bytes(text)
        adapter = read_adapter(FOLDER)
        _ = adapter.quantization, adapter.task, adapter.labels

    return good, read


def settings() -> tuple[dict[str, bytes], Callable[[str, bytes], None]]:
    """A recipe, a run.yaml and a metrics.jsonl."""
    recipes = sorted(Path("configs").rglob("*.yaml"))
    good = {f"recipe{i}.yaml": path.read_bytes() for i, path in enumerate(recipes)}
    good["run.yaml"] = b"config: {model: m, data: a.jsonl, output_dir: o, r: 8}\nbase: {a: 1}\n"
    good["metrics.jsonl"] = b'{"step": 1, "loss": 2.5, "epoch": 0.1}\n' * 2

    def read(name: str, content: bytes) -> None:
        (FOLDER / name).write_bytes(content)
        if name == "metrics.jsonl":
            read_metrics(FOLDER)
            return
        if name == "run.yaml":
            with suppress(UserError):
                read_run_file(FOLDER)
        parse(TrainConfig, ["--config", str(FOLDER / name)], prog="train.py")

    return good, read


def records() -> tuple[dict[str, bytes], Callable[[str, bytes], None]]:
    """Files of data, to token ids and labels."""
    tokenizer = tiny_tokenizer()
    rows = [*ROWS[:2], CHAT, TOOLS, ALPACA, *(make(1) for make in RECORDS.values())]
    good = {f"a{i}.jsonl": json.dumps(row).encode() for i, row in enumerate(rows)}
    good["a.json"] = json.dumps([CHAT, TOOLS]).encode()
    good["a.csv"] = b'prompt,completion\n"a, b",2\nc,d\n'

    def read(name: str, content: bytes) -> None:
        path = FOLDER / f"a{Path(name).suffix}"
        path.write_bytes(content)
        prepare_data(str(path), tokenizer, max_length=64)

    return good, read


def main() -> None:
    target, corpus, *_ = sys.argv[1:]
    good, read = {"adapter": adapter, "settings": settings, "records": records}[target]()
    names = list(good)
    Path(corpus).mkdir(parents=True, exist_ok=True)
    for i, content in enumerate(good.values()):
        Path(corpus, f"good{i}").write_bytes(bytes([i]) + content)

    def run(content: bytes) -> None:
        if content:
            with suppress(UserError):
                read(names[content[0] % len(names)], content[1:])

    atheris.Setup([sys.argv[0], *sys.argv[2:]], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
