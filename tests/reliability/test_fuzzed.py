"""Settings, adapters and records with random values: a UserError, or they are read.

tests/reliability/fuzz.py does the same with bytes.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import RECORDS, ROWS, tiny_model, tiny_tokenizer
from damage import ALPACA, CHAT, HOSTILE, TOOLS, changed, places_in
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora import LoraConfig, TrainConfig, apply_lora, save_adapter
from qlora.adapters.format import CONFIG, read_adapter
from qlora.cli import parse
from qlora.data.rows import prepare_data
from qlora.errors import UserError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
WORDS = st.sampled_from(["role", "content", "type", "text", "function", "name", "arguments", "x"])
VALUES = st.sampled_from(HOSTILE) | st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
RECIPE = {
    "model": "m", "output_dir": "o", "data": ["a.jsonl", "b.jsonl"], "data_weights": [0.5, 0.5],
    "r": 8, "rank_pattern": {"q_proj": 4}, "trainer": {"adam_beta2": 0.9}, "roles": {"bot": "user"},
    "target_modules": ["q_proj"], "eval_share": 0.1, "trainable_token_indices": [1, 2],
}  # fmt: skip
COUNTS = [25, pytest.param(5000, marks=pytest.mark.reliability)]


@st.composite
def spoilt(draw: Any, goods: list[Any]) -> Any:
    """One of the good values, with other values in one or two places."""
    value = draw(st.sampled_from(goods))
    for _ in range(draw(st.integers(1, 2))):
        value = changed(value, draw(st.sampled_from(list(places_in(value)))), draw(VALUES))
    return value


def fuzz(count: int, goods: list[Any], read: Any) -> None:
    @settings(max_examples=count, deadline=None, database=None, derandomize=count < 1000,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(spoilt(goods))
    def check(value: Any) -> None:
        with suppress(UserError):
            read(value)

    check()


@pytest.mark.parametrize("count", COUNTS)
def test_any_record_is_read_or_refused(count, tmp_path):
    tokenizer, path = tiny_tokenizer(), tmp_path / "a.jsonl"
    rows = [ROWS[1], CHAT, TOOLS, TOOLS, ALPACA, RECORDS["seq-cls"](1)]

    def read(value: Any) -> None:
        path.write_text(json.dumps(value) + "\n")
        prepare_data(str(path), tokenizer, max_length=64)

    fuzz(count, rows, read)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("task", ["seq2seq", "seq-cls", "token-cls"])
def test_any_row_of_a_task_is_read_or_refused(task, count, tmp_path):
    tokenizer, path = tiny_tokenizer(), tmp_path / "a.jsonl"

    def read(value: Any) -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in (value, RECORDS[task](2))))
        prepare_data(str(path), tokenizer, max_length=64, task=task)

    fuzz(count // 2, [RECORDS[task](1)], read)


@pytest.mark.parametrize("count", COUNTS)
def test_any_recipe_is_read_or_refused(count, tmp_path):
    path = tmp_path / "recipe.yaml"

    def read(value: Any) -> None:
        path.write_text(yaml.safe_dump(value))
        parse(TrainConfig, ["--config", str(path)], prog="train.py")

    fuzz(count // 5, [RECIPE, {"config": RECIPE, "base": {"x": 1}}], read)


@pytest.mark.parametrize("count", COUNTS)
def test_any_adapter_config_is_read_or_refused(count, tmp_path):
    adapter = apply_lora(tiny_model("llama"), LoraConfig(r=1, target_modules=("q_proj",)))
    save_adapter(adapter, tmp_path)
    good = json.loads(Path(tmp_path / CONFIG).read_text())

    def read(value: Any) -> None:
        (tmp_path / CONFIG).write_text(json.dumps(value))
        adapter = read_adapter(tmp_path)
        _ = adapter.task, adapter.labels, adapter.quantization

    fuzz(count, [good], read)
