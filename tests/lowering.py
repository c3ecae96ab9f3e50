"""Compiles the Triton kernels for GPUs that are not here; run by test_kernels.py.

    python tests/lowering.py "one card" | "all cards"

In a process of its own, as the tests' process runs the kernels through Triton's interpreter. Prints
{kernel: {"ptx": assembly, "registers": a thread's, "spills": bytes}} as JSON.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qlora.ops import kernels
from qlora.ops.gated import ACTS

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CARDS = {"T4": 75, "A100": 80, "H200": 90, "RTX 5090": 120}
FLOATS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
WEIGHT = ["*u8", "*u8", "*fp32", "*fp32", "*fp32", "*fp32"]


def lowered(kernel: Any, types: list[str], constants: dict[str, Any], card: str) -> dict[str, Any]:
    """For arguments that are all multiples of 16, as pointers and the sizes of real weights are."""
    names = kernel.arg_names
    signature = dict(zip(names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(types))},
    )
    options = {"enable_fp_fusion": kernel is not kernels._decode}
    code = triton.compile(source, target=GPUTarget("cuda", CARDS[card], 32), options=options).asm
    return {"ptx": code["ptx"], **resources(code["cubin"])}


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread and spilled bytes of one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [BIN / "cuobjdump", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    words = dict(
        word.split(":") for word in text.split() if word.count(":") == 1 and word[-1] != ":"
    )
    return {"registers": int(words["REG"]), "spills": int(words["LOCAL"])}


def main(which: str) -> None:
    """A decoding and a gated kernel, or all of them: every card, and all dtypes."""
    compiled = {}
    decoded = [("H200", "bf16")]
    gated = [("silu", "bf16")]
    if which == "all cards":
        decoded = [(card, name) for card in ("A100", "H200") for name in FLOATS]
        decoded += [("T4", "fp16"), ("RTX 5090", "bf16")]
        gated = list(zip(ACTS, FLOATS, strict=True))
    for card, name in decoded:
        types = [*WEIGHT, FLOATS[name], "i32", "i32"]
        constants = {"BLOCKSIZE": 64, "DOUBLE": True, "GROUPS": kernels.GROUPS}
        compiled[f"decode {name} {card}"] = lowered(kernels._decode, types, constants, card)
    for act, name in gated:
        constants = {"ACT": act, "BLOCK": kernels.BLOCK}
        types = [FLOATS[name]] * 6 + ["i32"]
        kernel = kernels._gated_backward
        compiled[f"gated {act} {name}"] = lowered(kernel, types, constants, "H200")
    print(json.dumps(compiled))


if __name__ == "__main__":
    main(sys.argv[1])
