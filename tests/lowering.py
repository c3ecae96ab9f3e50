"""Compile the Triton kernels for GPUs that this machine lacks; run by test_kernels.py.

    python tests/lowering.py "one card" | "all cards"

A separate process, since that of the tests runs the kernels through Triton's interpreter. Prints
{kernel: {"ptx": assembly, "registers": per thread, "stack": bytes, of spilled registers}} as JSON.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qlora.merge.loops import WIDEST
from qlora.ops import kernels
from qlora.ops.gated import ACTS

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CARDS = {
    "T4": 75, "A100": 80, "RTX 3090": 86, "RTX 4090": 89, "H200": 90, "B200": 100, "RTX 5090": 120,
}  # fmt: skip
FLOATS = ["bf16", "fp16", "fp32"]


def lowered(
    kernel: Any, types: list[str], constants: dict[str, Any], card: str, **limits: int
) -> dict[str, Any]:
    """Compile for arguments that are multiples of 16, as pointers and the sizes of weights are."""
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature=dict(zip(names, types, strict=False)) | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(types))},
    )
    options = {"enable_fp_fusion": kernel is not kernels._decode, **limits}
    code = triton.compile(source, target=GPUTarget("cuda", CARDS[card], 32), options=options).asm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code["cubin"])
        file.flush()
        command = [BIN / "cuobjdump", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"\b(REG|STACK):(\d+)", text))
    return {"ptx": code["ptx"], "registers": int(usage["REG"]), "stack": int(usage["STACK"])}


def main(which: str) -> None:
    """Compile one decode and one gated kernel, or all, for all cards and dtypes."""
    compiled = {}
    decoded, gated = [("H200", "bf16")], [("H200", "silu", "bf16")]
    if which == "all cards":
        decoded = list(itertools.product(CARDS, FLOATS))
        gated = list(itertools.product(CARDS, ACTS, FLOATS))
    constants: dict[str, Any] = {"BLOCKSIZE": 64, "DOUBLE": True, "GROUPS": kernels.GROUPS}
    for card, name in decoded:
        types = ["*u8"] * 2 + ["*fp32"] * 4 + [f"*{name}", "i32", "i32"]
        compiled[f"decode {name} {card}"] = lowered(kernels._decode, types, constants, card)
    for card, act, name in gated:
        types, constants = [f"*{name}"] * 6 + ["i32"], {"ACT": act, "BLOCK": kernels.BLOCK}
        compiled[f"gated {act} {name} {card}"] = lowered(kernels._gated, types, constants, card)
    rotated = list(itertools.product(CARDS, FLOATS)) if which == "all cards" else [("H200", "bf16")]
    for card, name in rotated:
        strides = ["i32"] * 11
        sizes = {"HALF": 64, "HEADS": kernels.HEADS, "BACKWARD": True}
        code = lowered(kernels._rotate, [f"*{name}"] * 6 + strides, sizes, card, num_warps=2)
        compiled[f"rotate {name} {card}"] = code
    searched = [(True, WIDEST), (False, WIDEST)]  # with integers as levels, or 16 others
    if which == "all cards":
        searched += [(True, 32), (True, 128), (False, 64)]  # GGUF, int4, NF4
    for card, (integers, width) in itertools.product(
        CARDS if which == "all cards" else ["H200"], searched
    ):
        sizes = {
            "LEVELS": 16,
            "INTEGERS": integers,
            "COLUMNS": width,
            "ROWS": kernels.rows_of(width),
        }
        types = ["*fp32"] * 3 + ["i32"] + ["*fp32"] * 3 + ["i32", "i32"]
        name = f"descend {'integers' if integers else 'codes'} {width} {card}"
        compiled[name] = lowered(kernels._descend, types, sizes, card, enable_fp_fusion=False)
    types, constants = ["*bf16"] * 6 + ["i32"], {"ACT": "silu", "BLOCK": kernels.BLOCK}
    # with too few registers, which shows that the count of spilled ones works
    compiled["starved"] = lowered(kernels._gated, types, constants, "H200", maxnreg=16)
    print(json.dumps(compiled))


if __name__ == "__main__":
    main(sys.argv[1])
