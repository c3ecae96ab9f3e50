"""benchmarks/families.py: what it sweeps, what it finds, and some families with a tiny model."""

from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).parents[2]
FEW = [("gpt2", "default"), ("bart", "default")]
EVERY_NIGHT = [
    ("mixtral", "default"), ("falcon", "default"), ("mamba", "default"), ("llama4_text", "default"),
    ("gemma3", "default"), ("nemotron_h", "default"), ("deepseek_v3", "default"),
    ("mllama", "default"), ("t5", "trained shared"), ("mbart", "trained head"),
    ("pegasus", "token rows"),
]  # fmt: skip


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import families

    return families


@pytest.mark.parametrize(
    "kind, adapter", FEW + [pytest.param(*case, marks=pytest.mark.full) for case in EVERY_NIGHT]
)
def test_family_trains_saves_loads_and_merges(kind, adapter, families):
    row = families.attempt(kind, adapter, limit=60)
    assert row["trains"] == "yes", row["traceback"]


def test_sweep_reports_a_fault_and_a_time_limit(families, monkeypatch):
    assert families.attempt("llama", "default", limit=0.001)["note"].startswith("OutOfTime")
    monkeypatch.setattr(families, "CLOSE", 0.0)
    row = families.attempt("llama", "default", limit=60)
    assert row["trains"] == "FAILS" and "off" in row["note"]


def test_sweep_has_every_decoder_that_it_does_not_leave_out(families):
    from family_sizes import ENCODER_DECODERS, NOT_RUN

    kinds = Counter(kind for kind, _ in families.cases([]))
    decoders = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(NOT_RUN)
    assert set(kinds) == decoders | set(ENCODER_DECODERS)
    assert {kinds[kind] for kind in ENCODER_DECODERS} == {len(families.ADAPTERS)}


def test_page_has_the_table_of_the_last_sweep_and_what_is_left_out(families):
    from family_sizes import NOT_RUN

    text = families.PAGE.read_text("utf-8")
    rewritten = families.with_table(text)
    assert text == rewritten, "python benchmarks/families.py --page rewrites the table"
    assert not [kind for kind in NOT_RUN if kind not in text.partition("Not run: ")[2]]
