"""The API documentation, made of the docstrings by pdoc: HTML pages that need no network.

    python docs/api.py [FOLDER]     into build/docs, where none is named; `make docs` does it

A room has a page if qlora's own docstring lists it as one to call; the rest is its inside.
Whatever pdoc warns of, an annotation it cannot read or a name that is not there, is an error.
"""

import re
import sys
import warnings
from pathlib import Path

import pdoc

import qlora


def rooms() -> list[str]:
    """The modules that qlora's docstring lists, in that order."""
    lines = [line.split(": ")[0] for line in str(qlora.__doc__).splitlines() if line[:2] == "- "]
    return [name for line in lines for name in re.findall(r"`(qlora\.\w+)`", line)]


def write_pages(folder: Path) -> None:
    """A page a room in `folder`, and one of the names that `import qlora` gives."""
    for name in qlora.__all__:  # loaded when first used, and pdoc looks at what is there
        setattr(qlora, name, getattr(qlora, name))
    pdoc.render.configure(docformat="google", show_source=False, include_undocumented=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc("qlora", *rooms(), output_directory=folder)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs")
    write_pages(folder)
    print(f"The documentation is in {folder / 'index.html'}")
