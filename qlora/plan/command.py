"""`python train.py --plan …` and `qlora plan …`: the plan as a table, as JSON and as a picture.

Exit code 0: the run fits, or no card is known; 1: it does not fit; 2: bad input.
"""

import gc
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import torch

# bitsandbytes compiles its operators for a CPU at import, which takes a second: none runs here
with patch.object(torch, "compile", lambda function=None, **_: function or (lambda own: own)):
    import bitsandbytes  # noqa: F401

from qlora.config import TrainConfig
from qlora.plan.estimate import CONTEXT, Plan, Planner
from qlora.plan.fit import Fitter, Option, changed, flags_of

GIB = 1 << 30


def run(config: TrainConfig) -> None:
    """The command: `show_plan`, and the exit code 0 or 1, without a second of tearing down."""
    gc.freeze()  # the imported packages, in which nothing is to be collected
    made = show_plan(config)
    sys.stdout.flush()
    os._exit(int(made.fits is False))


def show_plan(config: TrainConfig) -> Plan:
    """Print the plan of `config`, and what would make it fit; with --fit, the flags that do."""
    planner = Planner(config)
    made = planner.plan()
    record: dict[str, Any] = made.record()
    lines = [table(made)]
    if made.budget_bytes is not None and (config.fit or not made.fits):
        fitter = Fitter(planner)
        options = [] if made.fits else fitter.options(made)
        lines += ["", *_option_rows(options)]
        record["options"] = [
            {"flags": o.flags, "saved_bytes": o.saved_bytes, "cost": o.cost} for o in options
        ]
        rows, tokens = fitter.largest_batch(), fitter.longest_row()
        record |= {"largest_batch": rows, "longest_row": tokens}
        lines.append(f"With the settings given, at most {rows} rows of {made.length:,} tokens fit, "
                     f"or one row of {tokens:,}.")  # fmt: skip
        if config.fit:
            fitting = fitter.fill(made) if made.fits else fitter.cheapest(made, options)
            lines.append(_choice(made, fitting))
            if fitting is not None:
                record["fit"] = {"flags": flags_of(changed(made.config, fitting.config)),
                                 "peak_bytes": fitting.peak_bytes}  # fmt: skip
                made = fitting
    if config.plan_picture:
        from qlora.pictures import draw_memory, save_png  # matplotlib takes a while to import

        save_png(draw_memory(moments(made), made.budget_bytes), Path(config.plan_picture))
    print(json.dumps(record) if config.json else "\n".join(lines))
    return made


def _option_rows(options: list[Option]) -> list[str]:
    return ["What takes less, each alone:"] * bool(options) + [
        f"  {option.flags}: {show(option.saved_bytes)} less; {option.cost}" for option in options
    ]


def _choice(before: Plan, after: Plan | None) -> str:
    """What --fit chose."""
    if after is None:
        return "No combination of these fits: take a smaller model or a larger card."
    flags = flags_of(changed(before.config, after.config))
    return f"It fits with: {flags}" if flags else "Nothing else makes better use of the card."


def moments(plan: Plan) -> list[tuple[str, dict[str, int]]]:
    """The bytes by kind at the start, peak and end of each part of the step, and its name."""
    held: dict[str, int] = {k: v for k, v in plan.parts.items() if k == CONTEXT}
    return [
        (segment.name.partition(" ")[0] if segment.name[-1].isdigit() else segment.name,
         {**held, **at})
        for segment in plan.segments
        for at in (segment.start, segment.peak, segment.end)
    ]  # fmt: skip


def table(plan: Plan) -> str:
    """The plan for a terminal."""
    tokens = f"{plan.rows} × {plan.length:,} tokens"
    lines = [f"{plan.config.model}: a micro-batch of {tokens}", "", *_rows("GPU memory", plan.parts)]
    lines += [_row("peak", plan.peak_bytes), f"The peak is in the {plan.peak_at}.", ""]
    if plan.host:
        lines += [*_rows("host memory, besides the process", plan.host), ""]
    lines += [*_rows("disk", plan.disk), "", verdict(plan)]
    return "\n".join(lines)


def _rows(title: str, parts: Mapping[str, int]) -> list[str]:
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    return [title, *[_row(f"  {name}", size) for name, size in ordered]]


def _row(name: str, size: int) -> str:
    return f"{name:<40}{show(size):>12}"


def show(size: int) -> str:
    """`1.23 GiB`, or `45 MiB` below a GiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def verdict(plan: Plan) -> str:
    """Whether it fits, in one line."""
    if plan.budget_bytes is None:
        return "No GPU is here: --gpu-memory 8GiB, say, tells whether it fits."
    left = plan.budget_bytes - plan.peak_bytes
    if left >= 0:
        return f"It fits into {show(plan.budget_bytes)}: {show(left)} are left."
    return f"It does not fit into {show(plan.budget_bytes)}: {show(-left)} are missing."
