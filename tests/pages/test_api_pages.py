"""The API reference builds without a warning, and names in docs have an entry in it."""

import re
from pathlib import Path

import pytest

import qlora

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    """Module -> its HTML page."""
    folder = tmp_path_factory.mktemp("api")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        import api

        api.write_pages(folder)
    files = folder.rglob("*.html")
    return {".".join(f.relative_to(folder).with_suffix("").parts): f.read_text() for f in files}


def test_names_in_the_docs_have_an_entry(pages):
    """Names like `qlora.training.keep_updates`, and imports from qlora's packages."""
    text = "\n".join(p.read_text() for p in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    named = {*re.findall(r"`(qlora\.\w+\.\w+)", text), *(f"qlora.{name}" for name in qlora.__all__)}
    for module, names in re.findall(r"from (qlora\.\w+) import ([\w, ]+)", text):
        named |= {f"{module}.{name}" for name in names.split(", ")}
    assert len(named) > 20
    for name in named:
        module, _, member = name.rpartition(".")
        assert f'id="{member}"' in pages.get(module, ""), f"{name} has no entry"


def test_docstrings_render(pages):
    """No section is plain text, no formula in italics, no list or table inside a paragraph."""
    for name, page in pages.items():
        for said in re.findall(r'<div class="docstring">(.*?)</section>', page, re.S):
            assert not re.search(r"<p>(Args|Returns|Raises|Yields):", said), (name, said)
            assert not re.search(r"<em>|<strong>(?!\w+:</strong>)", said), (name, said)
            for text in re.findall(r"<p>(.*?)</p>", said, re.S):
                assert not re.search(r" {3}|\n *[-•] ", text), (name, text)
