"""An adapter written so that every program takes it.

    python -m qlora.portable --adapter out [--output-dir out-portable]

prints what each consumer makes of the adapter, and writes the portable one.
"""

from qlora.cli import run
from qlora.config import PortableConfig


def main(config: PortableConfig) -> None:
    """Check and write, with torch imported only now: flags are answered at once."""
    from qlora.adapters.portable import make_portable

    make_portable(config)


if __name__ == "__main__":
    run(
        main,
        PortableConfig,
        prog="python -m qlora.portable",
        interrupted="nothing was written, the adapter is untouched",
    )
