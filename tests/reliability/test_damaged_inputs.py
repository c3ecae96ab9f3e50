"""Damaged and hostile files of every kind: one line, or the same meaning; no hang, nothing written.

`make test` reads a seeded sample, `make reliability` all of them.
"""

import gzip
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from runpy import run_path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from conftest import FP32, tiny_model, tiny_tokenizer, write_rows
from damage import (
    OTHER_FILES,
    Outcome,
    Read,
    cut,
    flipped,
    hostile_tensors,
    hostile_values,
    read_all,
    write_gguf,
)
from pyarrow import parquet

from qlora import LoraConfig, TrainConfig, apply_lora, load_base, save_adapter
from qlora.adapters.files import check_fits
from qlora.adapters.format import CONFIG, WEIGHTS, read_adapter, read_files
from qlora.adapters.portable import portable_subset, problems
from qlora.apps.report import page, read_merge, read_run
from qlora.base.checkpoint import Checkpoint, resolve
from qlora.base.load import load_tokenizer
from qlora.base.shards import INDEX, SINGLE
from qlora.cli import parse
from qlora.data.objectives import encode_chat
from qlora.data.rows import prepare_data
from qlora.errors import UserError
from qlora.files import GENERATION, MERGE_REPORT
from qlora.training.checkpoints import (
    HASHES,
    OPTIMIZER,
    RANDOM,
    random_states,
    read_state,
    resumable,
    seal,
    set_random_states,
    write_state,
)


def read_adapter_folder(model: Any) -> Read:
    def read(folder: Path) -> Any:
        adapter = read_adapter(folder)
        check_fits(model, adapter)
        values, tensors, _ = read_files(folder)
        problems(values, tensors)
        with suppress(UserError):
            portable_subset(values, tensors, folder)
        facts = adapter.task, adapter.labels, adapter.quantization, adapter.stop_ids, adapter.config
        sums = {name: tensor.double().sum().item() for name, tensor in adapter.tensors.items()}
        return facts, adapter.base, adapter.base_model, adapter.revision, adapter.targets, sums

    return read


def read_base(folder: Path) -> Any:
    checkpoint = Checkpoint.open(str(folder))
    facts = checkpoint.labels, checkpoint.vocab_size, checkpoint.max_positions
    model = load_base(checkpoint)
    with torch.no_grad():
        logits = model(torch.arange(4)[None]).logits
    stops = model.generation_config.eos_token_id
    return facts, checkpoint.fingerprint, float(logits.double().sum()), stops


def read_tokenizer(folder: Path) -> Any:
    tokenizer = load_tokenizer(folder)
    rows = encode_chat({"prompt": "What? <bos> é", "completion": "This.\n"}, tokenizer, 64)
    return rows, tokenizer.decode(rows[0]["input_ids"]), tokenizer.pad_token_id


def read_recipe(folder: Path) -> Any:
    return parse(TrainConfig, ["--config", str(folder / "recipe.yaml")], prog="train.py")


def read_report(folder: Path) -> Any:
    run = read_run(folder)
    merge = read_merge(folder, str(folder))
    return page(run, merge)


def read_data(tokenizer: Any, name: str) -> Read:
    def read(folder: Path) -> Any:
        rows, stats = prepare_data(str(folder / name), tokenizer, max_length=64)
        return list(rows), stats

    return read


def read_checkpoint(output: Path) -> Any:
    folder, faults = resumable(output)
    states = [read_state(folder / name) for name in (OPTIMIZER, RANDOM)] if folder else []
    return folder, faults, states


def read_states(folder: Path) -> Any:
    set_random_states(read_state(folder / RANDOM))


# ---- good files of every kind


def adapter_folder(folder: Path, base: Path) -> Read:
    model: Any = load_base(str(base), FP32)
    apply_lora(model, LoraConfig(r=2, lora_alpha=4, target_modules=("q_proj",)))
    save_adapter(model, folder)
    (folder / GENERATION).write_text('{"eos_token_id": [1, 2]}')
    return read_adapter_folder(load_base(str(base), FP32))


def base_folder(folder: Path, base: Path) -> Read:
    shutil.copytree(base, folder, dirs_exist_ok=True)
    return read_base


def tokenizer_folder(folder: Path, base: Path) -> Read:
    tiny_tokenizer().save_pretrained(folder)
    return read_tokenizer


def shards_folder(folder: Path, base: Path) -> Read:
    tiny_model("llama").save_pretrained(folder, max_shard_size="150KB")
    return read_base


def four_bit_folder(folder: Path, base: Path) -> Read:
    load_base(str(base), FP32).save_pretrained(folder)
    return read_base


def gguf_folder(folder: Path, base: Path) -> Read:
    write_gguf(folder / "model.gguf")

    def read(folder: Path) -> Any:
        converted = resolve(str(folder / "model.gguf"))
        shapes = Checkpoint(converted).tensors
        shutil.rmtree(converted)
        return [(name, header.shape) for name, header in shapes.items()]

    return read


def recipe_folder(folder: Path, base: Path) -> Read:
    settings = {
        "model": "m", "output_dir": "o", "data": ["a.jsonl", "b.jsonl"], "r": 8, "lora_alpha": 1.5,
        "packing": True, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4},
        "max_steps": 9, "trainer": {"adam_beta2": 0.9}, "revision": "1.10",
        "template": {"enable_thinking": False},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return read_recipe


def run_folder(folder: Path, base: Path) -> Read:
    good = run_path(str(Path(__file__).parents[1] / "apps" / "test_report.py"))
    (folder / "run.yaml").write_text(yaml.safe_dump(good["FACTS"]))
    write_rows(folder / "metrics.jsonl", good["LOGGED"])
    write_rows(folder / "samples.jsonl", good["SAMPLES"])
    (folder / MERGE_REPORT).write_text(json.dumps(good["MERGE"]))
    return read_report


def checkpoint_folder(folder: Path, base: Path) -> Read:
    step = folder / "checkpoint-4"
    step.mkdir()
    parameter = torch.nn.Parameter(torch.ones(8))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(8)
    optimizer.step()
    write_state(step / OPTIMIZER, {"optimizer": optimizer.state_dict(), "lr_scheduler": {}})
    write_state(step / RANDOM, random_states())
    (step / "trainer_state.json").write_text('{"global_step": 4, "log_history": []}')
    seal(step)
    return read_checkpoint


def states_folder(folder: Path, base: Path) -> Read:
    write_state(folder / RANDOM, random_states())
    return read_states


CHATS = [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "Yes."}]}
    for i in range(12)
]


def data_folder(name: str) -> Callable[[Path, Path], Read]:
    def make(folder: Path, base: Path) -> Read:
        path, text = folder / name, "".join(json.dumps(row) + "\n" for row in CHATS).encode()
        if ".csv" in name:
            text = b"prompt,completion\n" + b'"What, 1?",Two\n' * 12
        if ".txt" in name:
            text = "Some words é\n".encode() * 12
        if name.endswith(".json"):
            text = json.dumps(CHATS).encode()
        if name.endswith(".gz"):
            text = gzip.compress(text)
        path.write_bytes(text)
        if name.endswith(".parquet"):
            parquet.write_table(pa.Table.from_pylist(CHATS), path)
        if name.endswith(".zst"):
            with pa.CompressedOutputStream(str(path), "zstd") as out:
                out.write(text)
        return read_data(tiny_tokenizer(), name)

    return make


KINDS: dict[str, tuple[Callable[[Path, Path], Read], str]] = {  # a good folder, the file to damage
    "adapter config": (adapter_folder, CONFIG),
    "adapter": (adapter_folder, WEIGHTS),
    "adapter's generation config": (adapter_folder, GENERATION),
    "base config": (base_folder, "config.json"),
    "base": (base_folder, SINGLE),
    "base's generation config": (base_folder, GENERATION),
    "index": (shards_folder, INDEX),
    "4-bit base": (four_bit_folder, SINGLE),
    "4-bit config": (four_bit_folder, "config.json"),
    "gguf": (gguf_folder, "model.gguf"),
    "tokenizer": (tokenizer_folder, "tokenizer.json"),
    "tokenizer config": (tokenizer_folder, "tokenizer_config.json"),
    "template": (tokenizer_folder, "chat_template.jinja"),
    "recipe": (recipe_folder, "recipe.yaml"),
    "run file": (run_folder, "run.yaml"),
    "metrics": (run_folder, "metrics.jsonl"),
    "samples": (run_folder, "samples.jsonl"),
    "merge report": (run_folder, MERGE_REPORT),
    "hashes": (checkpoint_folder, f"checkpoint-4/{HASHES}"),
    "trainer state": (checkpoint_folder, "checkpoint-4/trainer_state.json"),
    "optimizer": (checkpoint_folder, f"checkpoint-4/{OPTIMIZER}"),
    "states": (states_folder, RANDOM),
    **{name: (data_folder(name), name) for name in (
        "a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet", "a.jsonl.gz", "a.jsonl.zst",
    )},
}  # fmt: skip


def damaged(good: bytes, file: str, rng: random.Random) -> Iterator[tuple[str, bytes | None]]:
    yield "missing", None
    for i, content in enumerate(OTHER_FILES):
        yield f"other {i} {content[:20]!r}", content
    yield from cut(good, 20, rng)
    yield from flipped(good, 100, rng)
    ending = Path(file).suffix
    if ending in (".json", ".yaml", ".jsonl") and file != "a.json":
        yield from hostile_values(good, ending)
    if ending == ".safetensors":
        yield from hostile_tensors(good)


def show(outcomes: dict[str, Outcome], bad: dict[str, Outcome]) -> None:
    """With SHOW=1 the faults by kind, with SHOW=2 all outcomes."""
    print(Counter(outcome.kind for outcome in outcomes.values()))
    faults: dict[tuple[str, str], list[str]] = {}
    for what, outcome in bad.items():
        faults.setdefault((outcome.kind, outcome.text[-300:]), []).append(what)
    for whats in faults.values():
        print(f"===== {len(whats)} {whats[:3]}\n{outcomes[whats[0]].text}")
    if os.environ["SHOW"] == "2":
        for what, (kind, text) in outcomes.items():
            print(f"{kind} {what}: {text[:200]}")


@pytest.mark.parametrize("count", [3, pytest.param(None, marks=pytest.mark.reliability)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_one_line(kind, count, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    make, file = KINDS[kind]
    folder = tmp_path / "folder"
    folder.mkdir()
    read = make(folder, checkpoints("llama"))
    rng = random.Random(0)
    contents = list(damaged((folder / file).read_bytes(), file, rng))
    contents = contents if count is None else rng.sample(contents, count)
    outcomes = read_all(folder, file, read, contents)
    bad = {what: o for what, o in outcomes.items() if o.kind not in ("refused", "same", "other")}
    if os.environ.get("SHOW"):
        show(outcomes, bad)
    assert not bad, f"{len(bad)} of {len(outcomes)}: {list(bad)[:5]}"
