"""The API reference, built from the docstrings by pdoc: HTML pages that need no network.

    python docs/api.py [FOLDER]     writes to build/docs by default; `make docs` runs it

A page lists the public functions of a package (its `__all__`) or of a module of `ops`. A warning of
pdoc, such as an annotation that it cannot evaluate, is an error.
"""

import sys
import warnings
from pathlib import Path

import pdoc

import qlora.data
import qlora.training

PACKAGES = ("config", "base", "adapters", "fast", "data", "training", "merge")
MODULES = (*PACKAGES, "ops.nf4", "ops.loss")


def write_pages(folder: Path) -> None:
    """Write one page per package to `folder`, and one for the names in `qlora` itself."""
    for package in (qlora, qlora.data, qlora.training):  # names that are loaded on first use
        for name in package.__all__:  # pdoc documents what is loaded
            setattr(package, name, getattr(package, name))
    pdoc.render.configure(docformat="google", show_source=False, include_undocumented=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        modules = [f"qlora.{name}" for name in MODULES]
        pdoc.pdoc("qlora", *modules, output_directory=folder)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs")
    write_pages(folder)
    print(f"The API reference is in {folder / 'index.html'}")
