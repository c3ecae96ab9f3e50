"""Fold a trained adapter into its base: a checkpoint that from_pretrained loads as it is.

    python merge_dequant.py --adapter out --output-dir merged

The adapter was trained on the base after 4-bit rounding, so by default that is what it is folded
into: dequantize(quantize(W)) + scaling * B A, in fp32, rounded once. `--help` lists the flags. This
is `qlora merge`: qlora.merge.merge(config) does it from Python.
"""

from qlora.__main__ import run

if __name__ == "__main__":
    run("merge", prog="merge_dequant.py")
