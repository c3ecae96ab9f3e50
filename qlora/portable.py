"""Programs that load an adapter, and converting it: `python -m qlora.portable --adapter A`."""

from qlora.__main__ import run

if __name__ == "__main__":
    run("portable", prog="python -m qlora.portable")
