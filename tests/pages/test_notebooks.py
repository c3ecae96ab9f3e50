"""Each notebook runs on a clean kernel without warnings, and its .ipynb matches its source."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
generate = pytest.importorskip("notebooks.generate", reason="nbclient is not installed")
read_source, run, sources = generate.read_source, generate.run, generate.sources

COMPLAINT = re.compile(r"warning|traceback|deprecated", re.IGNORECASE)
MACHINE = re.compile(r"(?<![\w.])/(home|root|tmp|var|opt|usr|work|Users|private)/|\b[A-Z]:\\")
EACH = pytest.mark.parametrize("source", sources(), ids=lambda path: path.stem)


def written(source: Path):
    path = source.with_suffix(".ipynb")
    assert path.is_file(), f"{path.name} is missing: make notebooks"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def outputs(notebook):
    cells = enumerate(notebook.cells, start=1)
    return [(n, o) for n, cell in cells for o in cell.get("outputs", [])]


def text_of(output) -> str:
    data = output.get("data", {})
    seen = [output.get("text", ""), *(v for kind, v in data.items() if kind.startswith("text/"))]
    return "\n".join("".join(text) for text in seen)


def kinds(notebook):
    """The types of each cell's outputs, without values, which may differ between machines."""
    return [(n, o.output_type, sorted(o.get("data", {}))) for n, o in outputs(notebook)]


def check_outputs(notebook):
    for number, output in outputs(notebook):
        text = text_of(output)
        assert output.output_type != "error", f"cell {number}"
        assert output.get("name") != "stderr", f"cell {number} wrote to stderr: {text}"
        assert not COMPLAINT.search(text), f"cell {number} complains: {text}"
        assert not MACHINE.search(text), f"cell {number} shows a path of one machine: {text}"


def test_every_source_has_a_notebook():
    assert {p.stem for p in sources()} == {p.stem for p in sources()[0].parent.glob("*.ipynb")}


@EACH
def test_notebook_matches_its_source(source):
    notebook, wanted = written(source), read_source(source)
    assert notebook.metadata == wanted.metadata
    parts = ("id", "cell_type", "source", "metadata")
    for cell, right in zip(notebook.cells, wanted.cells, strict=True):
        same = all(cell[part] == right[part] for part in parts)
        assert same, f"{source.stem}, {cell.id} differs from its source: make notebooks"
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    check_outputs(notebook)


@EACH
def test_notebook_runs_on_a_clean_kernel(source, tmp_path, tmp_path_factory, monkeypatch):
    # one cache for all: the small model is converted once
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    notebook = run(read_source(source), tmp_path)
    check_outputs(notebook)
    assert kinds(notebook) == kinds(written(source))
