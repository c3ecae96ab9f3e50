"""The order of the tests of pages, notebooks and benchmarks."""

from typing import Any

LONGEST = ("test_notebook_runs", "test_a_dry_day", "test_the_wheel", "test_page_has_the_counted")


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """The longest first: none begins when the other processes are done."""
    items.sort(key=lambda item: not item.name.startswith(LONGEST))
