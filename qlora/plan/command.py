"""`python train.py --plan …` and `qlora plan …`: the plan as a table, as JSON and as a picture.

Exit code 0: the run fits, or no card is known; 1: it does not fit; 2: bad input.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora.config import TrainConfig
from qlora.errors import require
from qlora.plan.estimate import ALLOWANCE, CONTEXT, SHARDS, Plan, Planner
from qlora.plan.fit import Fitter, changed, flags_of
from qlora.plan.time import card_of, step_seconds

GIB = 1 << 30


def show_plan(config: TrainConfig) -> Plan:
    """Print the plan of `config`, and what would make it fit; with --fit, the flags that do, and
    return their plan."""
    if config.plan_picture:
        folder = Path(config.plan_picture).parent
        require(folder.is_dir(), f"--plan-picture: {folder} is no folder: create it")
    planner = Planner(config)
    made = planner.plan()
    record: dict[str, Any] = made.record()
    lines = [table(made)]
    if config.lora.init_lora_weights not in (True, False, "gaussian"):
        start = f"{config.lora.init_lora_weights}, before training"
        lines.append(f"Not counted: what the start by {start}, takes for a matrix at a time.")
    _time(made, record, lines)
    if made.budget_bytes is not None and (config.fit or not made.fits):
        fitter = Fitter(planner)
        options = [] if made.fits else fitter.options()
        record["options"] = [option.record() for option in options]
        lines += ["", "What takes less, each alone:"] * bool(options)
        lines += [f"  {o.flags}: {show(o.saved_bytes)} less, {pace(o.slower)}; {o.cost}"
                  for o in options]  # fmt: skip
        if config.fit:
            made = _fit(fitter, made, record, lines)
    if config.plan_picture:
        from qlora.pictures import draw_memory, save_png  # matplotlib takes a while to import

        save_png(draw_memory(moments(made), made.budget_bytes), Path(config.plan_picture))
    print(json.dumps(record) if config.json else "\n".join(lines))
    return made


def _fit(fitter: Fitter, made: Plan, record: dict[str, Any], lines: list[str]) -> Plan:
    """The plan that fits, or makes better use of the card; `made` if there is none."""
    rows, tokens = fitter.largest_batch(), fitter.longest_row()
    record |= {"largest_batch": rows, "longest_row": tokens}
    batch = f"The largest micro-batch of {made.length:,} tokens a row has {rows} rows; the longest"
    batch += f" row alone has {tokens:,} tokens."
    lines += ["", batch if tokens else "As it is, not even one short row fits."]
    fitting = fitter.fill() if made.fits else fitter.cheapest()
    if fitting is None:
        lines.append("No combination of these fits: take a smaller model or a larger card.")
        return made
    flags = flags_of(changed(made.config, fitting.config))
    slower = fitter.slower(fitting)
    record["fit"] = {"flags": flags, "peak_bytes": fitting.peak_bytes, "slower": slower}
    with_flags = f"{show(fitting.peak_bytes)}, {pace(slower)}, with: {flags}"
    lines.append(with_flags if flags else "Nothing makes better use of the card.")
    if kept := fitter.kept_weights(fitting):
        record["kept_weights"] = kept.record()
        lines.append(
            f"Of the memory that is free, the run itself takes {show(-kept.saved_bytes)}: "
            f"{kept.cost}, {pace(kept.slower)}."
        )
    return fitting


def _time(plan: Plan, record: dict[str, Any], lines: list[str]) -> None:
    """The time of a step, and the card that it is of; null where none is known."""
    card = card_of(plan.config)
    seconds = None if card is None else step_seconds(plan, card)
    record |= {"card": card and card.name, "step_seconds": seconds}
    if card is not None and seconds is not None:
        assumed = ", assumed by its memory" if plan.config.gpu_memory else ""
        but = " without the sum of the gradients" if plan.gpus > 1 else ""
        lines += [
            f"A step of {plan.rows_a_step} rows takes about {_seconds(seconds)} on a {card.name}"
            f"{assumed}: an",
            f"estimate by arithmetic{but}, which no GPU has checked.",
        ]


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def pace(slower: float) -> str:
    """A ratio of times in words."""
    percent = round(100 * (max(slower, 1 / slower) - 1))
    return f"about {percent} % {'slower' if slower > 1 else 'faster'}" if percent else "as fast"


def moments(plan: Plan) -> list[tuple[str, dict[str, int]]]:
    """The bytes by kind at the start, peak and end of each part of the step, and its name."""
    context, found = {kind: plan.parts[kind] for kind in (CONTEXT, ALLOWANCE)}, []
    for segment in plan.segments:
        name = segment.name.partition(" ")[0] if segment.name[-1].isdigit() else segment.name
        name = {"embedding": "forward", "backward of the loss": "loss"}.get(name, name)
        found += [(name, {**context, **at}) for at in (segment.start, segment.peak, segment.end)]
    return found


def table(plan: Plan) -> str:
    """The plan for a terminal."""
    tokens = f"{plan.rows} × {plan.length:,} tokens"
    lines = [f"{plan.config.model}: a micro-batch of {tokens}", ""]
    lines += _rows("GPU memory", plan.parts)
    lines += [_row("peak", plan.peak_bytes), f"The peak is in the {plan.peak_at}.", ""]
    if plan.host:
        lines += [*_rows("host memory, besides the process", plan.host), ""]
    lines += [*_rows("disk", plan.disk), ""]
    if plan.gpus > 1:
        lines += [*of_all(plan), ""]
    lines += [verdict(plan)]
    return "\n".join(lines)


def of_all(plan: Plan) -> list[str]:
    """What several GPUs make of a step."""
    each, passes = plan.rows, plan.config.gradient_accumulation_steps
    lines = [
        f"{plan.gpus} GPUs, of which each needs that memory. A step has {plan.rows_a_step} rows:",
        f"{each} a micro-batch × {passes} micro-batches × {plan.gpus} GPUs. Each GPU sends "
        f"{show(plan.sent_bytes)} a step.",
    ]
    if plan.shards:
        lines.append(f"Of it {show(plan.sent_of_base)} are shards of the base.")
    if SHARDS in plan.host:
        size = show(plan.gpus * plan.host[SHARDS])
        lines.append(f"All of them have {size} of the base in host memory.")
    return lines


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
