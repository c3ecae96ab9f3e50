"""The table of ten models in README.md is what the planner counts."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_page_has_what_the_planner_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import plan_table

    page = plan_table.PAGE.read_text("utf-8")
    assert plan_table.table([]) in page
    assert all(f"\n| {name} |" in page for name in plan_table.MODELS)
    peaks = plan_table.row("Llama-3.2-1B", cards=())
    assert f"\n{peaks}" in page  # and the longest rows follow
