"""Tables of benchmarks/step.py: on the terminal, and from the records in docs/measured.md.

    python benchmarks/step_table.py     rewrites its part of docs/measured.md

For each setting (machine, model, batch, length, dtype, checkpointing, limit), the last record
counts.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from results import RESULTS

from qlora.training.outputs import show_bytes

PAGE = Path(__file__).parents[1] / "docs" / "measured.md"
BEGIN, END = "<!-- benchmarks/step_table.py -->", "<!-- end -->"
SAME = ("device", "model", "dtype", "batch", "seq", "r", "checkpointing", "gpu_memory")
Row = Mapping[str, Any]


# ---- on the terminal ----


def show(found: Row) -> None:
    """Print one line per side, relative to PEFT's or the first."""
    sides = with_ratios(found["sides"])
    head = f"{'':24}{'tokens/s':>10}{'min … max':>18}{'ratio':>7}"
    print(f"{head}{'ceiling':>9}{'memory':>11}{'ratio':>7}")
    for name, row in sides.items():
        if "seconds" not in row:
            print(f"{name:24}out of memory")
            continue
        rate = row["tokens_per_second"]
        print(
            f"{name:24}{rate['median']:10,.0f}{rate['min']:10,.0f} … {rate['max']:<6,.0f}"
            f"{row['speed']:6.2f}{row['share_of_ceiling']:9.0%}"
            f"{show_bytes(row['above_loaded_bytes']):>11}{row['memory']:7.2f}"
        )
    if found["ceiling_flops"]:
        print(
            f"The ceiling is {found['ceiling_flops'] / 1e12:.3g} TFLOP/s. Memory is above the ",
            end="",
        )
        print("loaded model.")
    if found["loss_apart"] is not None:
        print(f"In the end the losses are {found['loss_apart']:.1e} apart.")


def with_ratios(sides: Mapping[str, Row]) -> dict[str, dict[str, Any]]:
    """Each side with `speed` and `memory` relative to PEFT's, or the first that ran."""
    ran = [name for name, row in sides.items() if "seconds" in row]
    made = {name: dict(row) for name, row in sides.items()}
    for name in ran:
        row, yard = made[name], sides["peft" if "peft" in ran else ran[0]]
        row["speed"] = row["tokens_per_second"]["median"] / yard["tokens_per_second"]["median"]
        row["memory"] = row["above_loaded_bytes"] / yard["above_loaded_bytes"]
    return made


def show_saved(saved: Mapping[str, Row]) -> None:
    """Print the saved tensors of a middle decoder layer, side by side."""
    kinds = dict.fromkeys(kind for row in saved.values() for kind in row["layer"])
    lines = {kind: [row["layer"].get(kind, 0) for row in saved.values()] for kind in kinds}
    lines["in all"] = [row["layer_bytes"] for row in saved.values()]
    lines["all layers, head and loss"] = [row["all_bytes"] for row in saved.values()]
    lines["allocated after the forward pass"] = [row["held_bytes"] for row in saved.values()]
    print(f"{'one decoder layer keeps':36}" + "".join(f"{name:>16}" for name in saved))
    for kind, counts in lines.items():
        print(f"{kind:36}" + "".join(f"{count / 2**20:12.2f} MiB" for count in counts))


# ---- on the page ----


def tables(folder: Path) -> str:
    """The markdown of all records in `folder`; empty without records."""
    made = [
        speed_table(latest(folder / "step.jsonl")),
        longest_table(latest(folder / "step_longest.jsonl")),
        ablation_table(latest(folder / "step_ablation.jsonl")),
    ]
    return "\n\n".join(filter(None, made))


def latest(file: Path) -> list[Row]:
    """The last record of each setting, in order of their first records."""
    if not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return list({tuple(row[name] for name in SAME): row for row in rows}.values())


def speed_table(rows: Sequence[Row]) -> str:
    """Speed and memory, one row per side and run."""
    lines = []
    for run in rows:
        for name, row in with_ratios(run["sides"]).items():
            if "seconds" not in row:
                lines.append([_question(run), name, "out of memory", "", "", "", ""])
                continue
            lines.append([
                _question(run), name,
                f"{row['tokens_per_second']['median']:,.0f}", f"{row['speed']:.2f}",
                f"{row['share_of_ceiling']:.0%}",
                show_bytes(row["above_loaded_bytes"]), f"{row['memory']:.2f}",
            ])  # fmt: skip
    head = ["a step", "", "tokens/s", "of PEFT's", "of the ceiling",
            "memory above the model", "of PEFT's"]  # fmt: skip
    return _markdown(head, lines)


def longest_table(rows: Sequence[Row]) -> str:
    """The longest row, one row per GPU and model, one column per side."""
    names = list(dict.fromkeys(name for run in rows for name in run["tokens"]))
    lines = [
        [_question(run), *(_tokens(run["tokens"].get(name)) for name in names)] for run in rows
    ]
    return _markdown(["longest row that fits", *names], lines)


def _tokens(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count:,}" if count else "does not fit"


def ablation_table(rows: Sequence[Row]) -> str:
    """The effect of each part: the run without it relative to the full run."""
    lines = []
    for run in rows:
        ours = run["sides"]["ours"]
        for name, row in run["sides"].items():
            if "seconds" in row and "seconds" in ours:
                speed = row["tokens_per_second"]["median"] / ours["tokens_per_second"]["median"]
                memory = row["above_loaded_bytes"] / ours["above_loaded_bytes"]
                lines.append([_question(run), name, f"{speed:.2f}", f"{memory:.2f}"])
    head = ["ours without a part", "", "tokens/s, of all", "memory above the model, of all"]
    return _markdown(head, lines)


def _question(run: Row) -> str:
    """Machine, model and sizes."""
    card = f" as {run['gpu_memory']}" if run["gpu_memory"] else ""
    size = f"{run['batch']} x {run['seq']}" if run["seq"] else f"{run['batch']} rows"
    kept = "checkpointing" if run["checkpointing"] else "no checkpointing"
    return f"{run['device']}{card}: {run['model']}, {run['dtype']}, {size}, r {run['r']}, {kept}"


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = list(lines)
    if not rows:
        return ""
    ruled = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in ruled)


def with_tables(text: str, folder: Path) -> str:
    """The page's `text` with the tables of `folder` between the markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables(folder)}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text("utf-8"), RESULTS), "utf-8")
