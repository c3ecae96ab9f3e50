"""List the programs that load an adapter, and convert it so that all of them do.

python -m qlora.portable --adapter out [--output-dir out-portable]
"""

from qlora.__main__ import run

if __name__ == "__main__":
    run("portable", prog="python -m qlora.portable")
