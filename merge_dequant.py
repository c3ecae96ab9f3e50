"""Fold a trained adapter into its base: a checkpoint that from_pretrained loads as it is.

    python merge_dequant.py --adapter out --output-dir merged

The adapter was trained on the base after 4-bit rounding, so by default that is what it is folded
into: dequantize(quantize(W)) + scaling * B A, in fp32, rounded once. `--help` lists every flag.
"""

from qlora.cli import run
from qlora.config import MergeConfig


def main(config: MergeConfig) -> None:
    """Merge, importing torch only now, so that errors in flags are reported at once."""
    from qlora.merge import merge

    merge(config)


if __name__ == "__main__":
    run(
        main,
        MergeConfig,
        prog="merge_dequant.py",
        interrupted="there is no merged checkpoint yet, the adapter is untouched; run again",
    )
