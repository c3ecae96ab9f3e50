"""`qlora plan`, in a process of its own: imports nothing that a plan does not use.

transformers imports every package it knows where it is installed, and torch's compiler for a few
decorators: more than half of the time of a plan. Both are left out of this process.
"""

import gc
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

from qlora.config import TrainConfig

UNUSED = ("datasets", "pandas", "peft", "scipy", "sklearn")
COMPILER = "torch._dynamo"
DECORATORS = ("allow_in_graph", "assume_constant_result", "disable", "disallow_in_graph")


def run(config: TrainConfig) -> None:
    """The command: prints the plan; exit code 0 or 1. Without a second of tearing down."""
    gc.disable()  # the imports leave nothing to collect: looking for it takes a second
    import_without_unused()
    import torch

    from qlora.plan.command import show_plan

    gc.freeze()
    gc.enable()
    torch.set_num_threads(1)  # of tiny tensors: threads would wait for each other
    try:
        made = show_plan(config)
    finally:
        gc.unfreeze()
    sys.stdout.flush()
    os._exit(int(made.fits is False))


def import_without_unused() -> None:
    """Import torch, bitsandbytes and transformers without UNUSED and torch's compiler, which this
    process then lacks: its decorators return the function."""
    import torch

    compiler: Any = ModuleType(COMPILER)
    vars(compiler).update(dict.fromkeys(DECORATORS, plain), __getattr__=of_compiler)
    compiler.eval_frame = SimpleNamespace(OptimizedModule=())  # nothing is an instance
    compiler.config = SimpleNamespace(error_on_nested_fx_trace=True)
    compiler.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]  # of its small modules
    torch._dynamo = sys.modules[COMPILER] = compiler
    sys.modules.update(dict.fromkeys(UNUSED))  # type: ignore[arg-type]  # None: not installed
    # bitsandbytes compiles its operators for a CPU at import; transformers asks for distributed
    # tensors
    with (
        patch.object(torch, "compile", plain),
        patch.object(torch.distributed, "is_available", lambda: False),
    ):
        import bitsandbytes  # noqa: F401

        import qlora.plan.fit  # noqa: F401
    for name in UNUSED:
        del sys.modules[name]


def of_compiler(name: str) -> Any:
    """What else is asked of the compiler, of the real one, which takes the place of ours."""
    if name.startswith("__"):
        raise AttributeError(name)
    sys.modules.pop(COMPILER)
    return getattr(importlib.import_module(COMPILER), name)


def plain(function: Any = None, *_: Any, **__: Any) -> Any:
    """The function, or a decorator that returns it."""
    return function or plain
