"""The report of a run: `python -m qlora.report OUT` writes OUT/report.html.

One HTML page without scripts or network access: curves, the model's answers before and after
training, data, memory, settings, and how much of the adapter a merge kept. All text from files is
escaped (jinja2's autoescape). Neither torch nor transformers is imported.
"""

import os
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from importlib import resources
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from qlora import files
from qlora.cli import show_seconds
from qlora.config import ReportConfig
from qlora.errors import UserError, first_line, require
from qlora.pictures import GIB, as_svg, by_kind, draw_merge, draw_run

REPORT = "report.html"
MAIN_SETTINGS = (
    "model", "task", "data", "eval_data", "max_length", "packing", "r", "lora_alpha",
    "target_modules", "quant_type", "learning_rate", "lr_scheduler_type",
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps",
    "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run, as its files record it."""

    folder: Path
    facts: Mapping[str, Any]  # run.yaml
    rows: list[dict[str, Any]]  # metrics.jsonl
    samples: list[dict[str, Any]]

    def values(self, key: str) -> list[tuple[int, float]]:
        """Step and value of each logged row with `key`."""
        return [(row["step"], row[key]) for row in self.rows if row.get(key) is not None]

    def memory(self) -> tuple[float, int | None]:
        """Peak of the bytes in use, and the bytes of the device, if known."""
        device = self.facts.get("device") or {}
        peaks = [peak for _, peak in self.values("peak_bytes")]
        return max(peaks, default=0), device.get("memory_bytes")

    def planned(self) -> str:
        """The planned peak, `1.23 GiB`; empty if the run has no plan."""
        plans = self.values("planned_bytes")
        return f"{plans[-1][1] / GIB:.2f} GiB" if plans else ""


def report(config: ReportConfig) -> None:
    """Write the page, and print its path."""
    folder = Path(config.adapter).expanduser()
    run = read_run(folder)
    merge = read_merge(folder, config.merged)
    fault = f"no write permission for {folder}: copy it, and report on the copy"
    require(os.access(folder, os.W_OK), fault)
    files.replace_text(folder / REPORT, page(run, merge))
    print(f"The report is {folder / REPORT}: open it in a browser; it needs no network.")
    print(f"Next:  {next_commands(folder, merged=merge is not None)[-1]}")


def read_run(folder: Path) -> Run:
    """Raises a UserError if the folder has no run, nothing was logged yet, or a file is damaged."""
    facts = files.read_run_file(folder)
    fault = f"{folder} has no {files.RUN}: pass an --output-dir of train.py"
    require(bool(facts), fault)
    run = Run(folder, facts, files.read_metrics(folder), files.read_samples(folder))
    fault = "has no training loss yet: wait for the first step, or start the run again"
    require(bool(run.values("loss")), f"{folder / files.METRICS} {fault}")
    return run


def read_merge(folder: Path, merged: str | None) -> dict[str, Any] | None:
    """The merge_report.json of `merged`, or of the newest merge of this adapter beside it."""
    if merged is not None:
        report = _merge_report(Path(merged).expanduser() / files.MERGE_REPORT)
        fault = f"has no complete {files.MERGE_REPORT}: pass the --output-dir of a merge"
        require(report is not None, f"--merged {merged} {fault}")
        return report
    paths, full = folder.absolute().parent.glob(f"*/{files.MERGE_REPORT}"), folder.resolve()
    for path in sorted(paths, key=lambda path: -path.stat().st_mtime):
        report = _merge_report(path)
        for adapter in (Path(name).expanduser() for name in (report or {}).get("adapters", ())):
            # a relative path may be from another directory
            if adapter.resolve() == full or full.parts[-len(adapter.parts) :] == adapter.parts:
                return report
    return None


def _merge_report(path: Path) -> dict[str, Any] | None:
    with suppress(UserError):
        report = files.read_json(path)
        if {"adapters", "onto", "format", "layers", "verify"} <= report.keys():
            return report
    return None


def page(run: Run, merge: Mapping[str, Any] | None = None) -> str:
    """The HTML of the page; UserError for files with values that neither train.py nor a merge
    writes."""
    try:
        return _page(run, merge)
    except Exception as error:  # each value of each file has its own
        kind = f"{type(error).__name__}: {first_line(error)}"
        fault = f"{run.folder}: its files, or {files.MERGE_REPORT}, hold values of another kind"
        raise UserError(f"{fault} than these commands write ({kind}) Restore them") from error


def _page(run: Run, merge: Mapping[str, Any] | None) -> str:
    settings, device = dict(run.facts["config"]), run.facts.get("device") or {}
    peak, total = run.memory()
    data = settings.get("data")
    sources = data if isinstance(data, list) else [data]
    per = "label" if "labels" in (run.facts.get("base") or {}) else "supervised token"
    versions = {f"version of {k}": v for k, v in (run.facts.get("versions") or {}).items()}
    memory = {"device": device["name"]} if device.get("name") else {}
    memory["peak"] = f"{peak / GIB:.2f} GiB"
    memory |= {"planned peak": run.planned()} if run.planned() else {}
    memory["available"] = f"{total / GIB:.1f} GiB" if total else "not known"
    curves = as_svg(draw_run(run.rows, per=per, total_bytes=total), "Curves of the run")
    template = resources.files("qlora.apps").joinpath(REPORT).read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(template).render(
        name=run.folder.resolve().name,
        folder=run.folder,
        run_file=shlex.quote(f"{run.folder}/{files.RUN}"),
        base=Path(str(settings.get("model"))).name,
        data_name=", ".join(Path(str(name)).name for name in sources),
        date=date.fromtimestamp((run.folder / files.METRICS).stat().st_mtime),
        tiles=tiles(run),
        remarks=remarks(run),
        curves=Markup(curves),
        samples=run.samples,
        data=run.facts.get("data"),
        memory=memory,
        merge=merge and _merge_facts(merge),
        settings={key: _text_of(settings[key]) for key in MAIN_SETTINGS if key in settings},
        others={key: _text_of(value) for key, value in (settings | versions).items()},
        commands=next_commands(run.folder, merged=merge is not None),
    )


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """The figures at the top of the page: label, value and note."""
    losses, evals, epochs = run.values("loss"), run.values("eval_loss"), run.values("epoch")
    figures = [("training loss", f"{losses[-1][1]:.4f}", f"{losses[0][1]:.4f} at the start")]
    if evals:
        step, best = min(evals, key=lambda pair: pair[1])
        note = f"lowest {best:.4f}, at step {step:,}"
        figures.append(("evaluation loss", f"{evals[-1][1]:.4f}", note))
    note = f"{epochs[-1][1]:.3g} × the data" if epochs else ""
    figures.append(("optimizer steps", f"{run.rows[-1]['step']:,}", note))
    seconds, speeds = run.values("seconds"), run.values("tokens_per_second")
    if seconds:
        speed = f"{median(s for _, s in speeds):,.0f} tokens a second" if speeds else ""
        figures.append(("time", show_seconds(seconds[-1][1]), speed))
    peak, total = run.memory()
    if peak:
        note = f"of {total / GIB:.1f} GiB, {peak / total:.0%}" if total else ""
        note += f"; planned {run.planned()}" if run.planned() else ""
        figures.append(("peak memory", f"{peak / GIB:.2f} GiB", note))
    return figures


def remarks(run: Run) -> list[str]:
    """Warnings: the run is incomplete, has diverged or overfitted, or its rows were cut."""
    lines = []
    if not (run.folder / "adapter_model.safetensors").is_file():
        lines.append("This run has not ended, or was stopped: --resume continues it.")
    diverged = [step for step, loss in run.values("loss") if not isfinite(loss)]
    if diverged:
        lines.append(f"The loss is not finite from step {diverged[0]:,}: lower --learning-rate.")
    evals = run.values("eval_loss")
    step, best = min(evals, key=lambda pair: pair[1], default=(0, 0.0))
    if evals and evals[-1][1] > 1.02 * best + 0.01:
        lowest = f"The evaluation loss was lowest at step {step:,} ({best:.4f})"
        lines.append(f"{lowest} and has risen since: train for fewer steps.")
    counts = (run.facts.get("data") or {}).get("training", {})
    if counts.get("streamed"):
        lines.append("The training data were streamed: their counts are those of the first rows.")
    if cut := counts.get("cut_rows", 0):
        length = run.facts["config"].get("max_length")
        lines.append(f"{cut:,} training rows had more than {length} tokens and were cut.")
    return lines


def _merge_facts(report: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of the page's merge section."""
    places = {"nf4": "the dequantized 4-bit base", "original": "the original weights"}
    in_4_bits = report.get("trained_on") != "16bit"
    is_same = (report["onto"] == "nf4") == in_4_bits
    onto = f"onto {places.get(report['onto'], report['onto'])}"
    onto += ", as in training" if is_same else ", which were not used in training"
    kinds = []
    for name, layers in by_kind(report["layers"]).items():
        shares = [facts["kept"] for _, facts in layers]
        kind = {"name": name, "layers": len(layers), "kept": median(shares), "least": min(shares)}
        kind["change"] = median(facts["delta_over_weight"] for _, facts in layers)
        kinds.append(kind)
    kept = report["verify"] and report["verify"]["kept"]
    picture = Markup(as_svg(draw_merge(report), "Share of the change kept")) if kinds else None
    return {
        "about": f"{onto}; {report['format']}",
        "base": "4-bit base" if in_4_bits else "16-bit base",
        "verify": report["verify"],
        "kept": "no gain" if kept is None else f"{kept:.2%}",
        "kinds": kinds,
        "picture": picture,
    }


def _text_of(value: Any) -> str:
    """A setting as shown on the page."""
    if value is None or isinstance(value, bool):
        return {None: "default", True: "yes", False: "no"}[value]
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value) or "none"


def next_commands(folder: Path, *, merged: bool) -> list[str]:
    """The commands for what comes next: chat, and merge unless that was done."""
    name, out = shlex.quote(str(folder)), shlex.quote(f"{folder}-merged")
    chat = f"python -m qlora.chat --adapter {name}"
    merge = f"python -m qlora merge --adapter {name} --output-dir {out}"
    return [chat] if merged else [chat, merge]
