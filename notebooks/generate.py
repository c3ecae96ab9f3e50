"""Every notebook NN_name.ipynb from its source NN_name.py, run from top to bottom.

    python -m notebooks.generate [NN_name ...]

The source is in jupytext's percent format: `# %%` begins a cell of code, `# %% [markdown]` one of
text. It is run on a kernel of its own, in an empty folder beside demo/*.jsonl and configs/, as in a
clone, and what comes out goes into the .ipynb. What would differ from one run to the next although
nothing changed (random ids, times, the states of progress bars) is left out, so that a change of
the .ipynb is one that someone made. The tests run the sources by the same functions.
"""

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
CELL_SECONDS = 1200
LIVE = "application/vnd.jupyter.widget-view+json"  # a progress bar: empty, once its kernel is gone
PROGRESS = re.compile(r"^.*: \d+% of .* left\n?", re.MULTILINE)  # qlora's lines, LINE_SECONDS apart
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def sources() -> list[Path]:
    """The notebooks' sources, in their order."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def read_source(path: Path) -> Any:
    """The notebook that a source makes, not run yet."""
    notebook = jupytext.reads(path.read_text(encoding="utf-8"), fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells, start=1):
        cell.id = f"cell-{number}"
    return notebook


def run(notebook: Any, root: Path) -> Any:
    """`notebook` with its outputs, run in an empty folder `root`/notebooks.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the message has its traceback.
    """
    folder = root / "notebooks"
    folder.mkdir()
    (root / "demo").mkdir()
    for data in (FOLDER.parent / "demo").glob("*.jsonl"):
        shutil.copy(data, root / "demo")
    shutil.copytree(FOLDER.parent / "configs", root / "configs")
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
    )
    client.execute(env=_environment(root))
    notebook.metadata = nbformat.from_dict(METADATA)  # without the versions of this machine
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not _is_progress(o)]
    return notebook


def _is_progress(output: Any) -> bool:
    """Whether an output says only how far a job was: a bar, or lines that a slow machine adds."""
    is_line = output.get("name") == "stderr" and not PROGRESS.sub("", output.text)
    return is_line or LIVE in output.get("data", {})


def _environment(root: Path) -> dict[str, str]:
    """This process's, without what tests set, the user's own settings of Jupyter, and the hub."""
    own = {k: v for k, v in os.environ.items() if k not in ("MPLBACKEND", "TRITON_INTERPRET")}
    return own | {"HF_HUB_OFFLINE": "1", "IPYTHONDIR": str(root / ".ipython")}


def main(names: list[str]) -> None:
    """Write the .ipynb of the sources called `names`, or of all."""
    for source in sources():
        if names and source.stem not in names:
            continue
        print(source.stem, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            notebook = run(read_source(source), Path(folder))
        nbformat.write(notebook, source.with_suffix(".ipynb"))


if __name__ == "__main__":
    main(sys.argv[1:])
