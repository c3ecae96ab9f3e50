"""The API documentation: built of the docstrings without a warning, and read as it was meant."""

import re
from pathlib import Path

import pytest

import qlora

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    """The HTML of each room."""
    folder = tmp_path_factory.mktemp("api")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        import api

        api.write_pages(folder)
        assert api.rooms()[0] == "qlora.config"
    files = folder.rglob("*.html")
    return {".".join(f.relative_to(folder).with_suffix("").parts): f.read_text() for f in files}


def test_every_room_that_people_are_told_of_has_a_page(pages):
    """What a page for people names, like `qlora.training.optimizers.keep_updates`, or imports."""
    texts = [path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    told = {name for text in texts for name in re.findall(r"`(qlora\.\w+\.\w+)", text)}
    told |= {
        f"{room}.{name}"
        for text in texts
        for room, names in re.findall(r"from (qlora\.\w+) import ([\w, ]+)", text)
        for name in names.split(", ")
    }
    assert len(told) >= 4
    for name in told:
        room, _, thing = name.rpartition(".")
        assert f'id="{thing}"' in pages.get(room, ""), f"{name} is told of, and has no page"


def test_what_qlora_gives_is_on_its_page(pages):
    for name in qlora.__all__:
        assert f'id="{name}"' in pages["qlora"]


def test_docstrings_are_read_as_meant(pages):
    """No section left as text, no formula in italics, no list or table run into a paragraph."""
    for name, page in pages.items():
        for said in re.findall(r'<div class="docstring">(.*?)</section>', page, re.S):
            assert not re.search(r"<p>(Args|Returns|Raises|Yields):", said), (name, said)
            assert not re.search(r"<em>|<strong>(?!\w+:</strong>)", said), (name, said)
            for text in re.findall(r"<p>(.*?)</p>", said, re.S):
                assert not re.search(r" {3}|\n *[-•] ", text), (name, text)
