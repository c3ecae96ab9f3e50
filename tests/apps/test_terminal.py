"""Text side by side: what a terminal shows after all that was written to it."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st
from wcwidth import wcswidth

from qlora.apps.terminal import SideBySide, printable, wrap

texts = st.text(st.sampled_from("ab cd\n\t 我é👍-"), max_size=60)


def screen(written):
    """The lines of a terminal wide enough: \\r goes back, and what follows overwrites."""
    lines = []
    for line in "".join(written).split("\n"):
        row = ""
        for part in line.split("\r"):
            row = part if "\x1b[K" in part or not row else part + row[len(part) :]
        lines.append(row.replace("\x1b[K", "").rstrip())
    return lines


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2J\tb\r\n\x07👍") == "a[2J\tb\n👍"
    written = []
    SideBySide(["name"], 20, written.append).show(["\x1b[2Jhi"], [True])
    assert screen(written)[2:] == ["[2Jhi", ""]


def test_lines_break_at_spaces_and_within_long_words():
    assert wrap("  indented code\n\nend", 10) == ["  indented", "code", "", "end"]
    assert wrap("abcdefgh ij", 3) == ["abc", "def", "gh", "ij"]
    assert wrap("我们我", 4) == ["我们", "我"]  # two cells each
    assert wrap("e\u0301e\u0301e\u0301", 2) == ["e\u0301e\u0301", "e\u0301"]  # one cell each
    assert wrap("", 4) == [""]


@settings(deadline=None, database=None)
@given(texts, st.integers(2, 9))
def test_wrap_loses_nothing_and_full_lines_stay(text, width):
    lines = wrap(text, width)
    assert all(wcswidth(line) <= width for line in lines)
    assert re.sub(r"\s", "", "".join(lines)) == re.sub(r"\s", "", text)
    for end in range(len(text)):
        shorter = wrap(text[:end], width)
        assert lines[: len(shorter) - 1] == shorter[:-1]


def test_two_growing_texts():
    written = []
    columns = SideBySide(["base", "tuned"], 24, written.append)  # 10 cells each
    left, right = "one two three four", "5\n\n6"
    for end in range(1, 19):
        columns.show([left[:end], right[:end]], [end >= 18, end >= 4])
    for _ in range(2):  # the second time nothing is new
        columns.show([left, right], [True, True])
    title, _, *lines = screen(written)
    assert (title, lines) == (
        "base       │ tuned", ["one two    │ 5", "three four │", "           │ 6", ""]
    )  # fmt: skip


@settings(deadline=None, database=None)
@given(texts, texts)
def test_screen_does_not_depend_on_how_texts_grow(left, right):
    written, at_once = [], []
    columns = SideBySide(["a", "b"], 24, written.append)
    for end in range(max(len(left), len(right)) + 1):
        columns.show([left[:end], right[:end]], [end >= len(left), end >= len(right)])
    SideBySide(["a", "b"], 24, at_once.append).show([left, right], [True, True])
    assert screen(written) == screen(at_once)
