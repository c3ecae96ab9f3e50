"""One page about a run: `python -m qlora.report OUT` writes OUT/report.html.

The page is a single file that needs no network and no scripts: how training went, the model's
answers before and after, data, memory, settings, and what a merge kept. All that comes from files
is escaped (jinja2's autoescape), since samples are anybody's text. Neither torch nor transformers
is imported.
"""

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from importlib.resources import files
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from qlora.config import ReportConfig
from qlora.errors import UserError
from qlora.files import (
    MERGE_REPORT,
    METRICS,
    RUN,
    read_json,
    read_metrics,
    read_samples,
    replace_text,
)
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
    """What a run has left so far."""

    folder: Path
    facts: Mapping[str, Any]
    """run.yaml"""
    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting, as it was given or filled in."""
        return dict(self.facts["config"])

    def values(self, key: str) -> list[tuple[int, float]]:
        """Step and value of each row that has one."""
        return [(row["step"], row[key]) for row in self.rows if row.get(key) is not None]


# ---- what is read


def read_run(folder: Path) -> Run:
    """The files of a run.

    Raises:
        UserError: the folder is that of no run, nothing was logged yet, or a file is damaged.
    """
    if not (folder / RUN).is_file():
        raise UserError(f"{folder} holds no run: give an --output-dir of train.py ({RUN} is in it)")
    try:
        facts = yaml.safe_load((folder / RUN).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        facts = None
    if not isinstance(facts, dict) or not isinstance(facts.get("config"), dict):
        raise UserError(f"{folder / RUN} is not what train.py writes: start the run again")
    rows, samples = read_metrics(folder), read_samples(folder)
    if not any(row.get("loss") is not None for row in rows):
        raise UserError(
            f"{folder} has logged nothing yet: {METRICS} gets a first row after the first step. "
            "Wait for it, or start the run again"
        )
    return Run(folder, facts, rows, samples)


def read_merge(folder: Path, merged: str | None) -> dict[str, Any] | None:
    """The merge_report.json of `merged`, or of the newest merge of this adapter beside it."""
    if merged is not None:
        report = _merge_report(Path(merged).expanduser() / MERGE_REPORT)
        if report is None:
            raise UserError(
                f"--merged {merged} holds no whole {MERGE_REPORT}: give an --output-dir of "
                "merge_dequant.py"
            )
        return report
    found = sorted(folder.absolute().parent.glob(f"*/{MERGE_REPORT}"), key=_age)
    reports = filter(None, map(_merge_report, found))
    return next((r for r in reports if any(_is(a, folder) for a in r["adapters"])), None)


def _is(adapter: str, folder: Path) -> bool:
    """Whether a merge means that folder; it may have been started elsewhere, with a short name."""
    path, whole = Path(adapter).expanduser(), folder.resolve()
    return path.resolve() == whole or whole.parts[-len(path.parts) :] == path.parts


def _age(path: Path) -> float:
    return -path.stat().st_mtime


def _merge_report(path: Path) -> dict[str, Any] | None:
    try:
        report = read_json(path)
    except UserError:
        return None
    keys = ("adapters", "onto", "format", "layers", "verify")
    return report if all(key in report for key in keys) else None


# ---- what is told


def tiles(run: Run) -> list[dict[str, str]]:
    """The few figures at the top."""
    losses, evals = run.values("loss"), run.values("eval_loss")
    found = [_tile("training loss", f"{losses[-1][1]:.4f}", f"{losses[0][1]:.4f} at the start")]
    if evals:
        step, best = min(evals, key=lambda pair: pair[1])
        note = f"lowest {best:.4f}, at step {step:,}"
        found.append(_tile("evaluation loss", f"{evals[-1][1]:.4f}", note))
    found.append(_tile("optimizer steps", f"{run.rows[-1]['step']:,}", _epochs(run)))
    seconds, speeds = run.values("seconds"), run.values("tokens_per_second")
    if seconds:
        speed = f"{median(s for _, s in speeds):,.0f} tokens a second" if speeds else ""
        found.append(_tile("time", show_seconds(seconds[-1][1]), speed))
    peak, total = _memory(run)
    if peak:
        note = f"of {total / GIB:.1f} GiB, {peak / total:.0%}" if total else ""
        found.append(_tile("memory at most", f"{peak / GIB:.2f} GiB", note))
    return found


def _tile(label: str, value: str, note: str) -> dict[str, str]:
    return {"label": label, "value": value, "note": note}


def _epochs(run: Run) -> str:
    epochs = run.values("epoch")
    return f"{epochs[-1][1]:.3g} × the data" if epochs else ""


def _memory(run: Run) -> tuple[float, int | None]:
    device = run.facts.get("device") or {}
    return max((peak for _, peak in run.values("peak_bytes")), default=0), device.get(
        "memory_bytes"
    )


def show_seconds(seconds: float) -> str:
    """`45 s`, `12 min 5 s` or `3 h 20 min`"""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def remarks(run: Run) -> list[str]:
    """What a reader should not miss."""
    found = []
    if not (run.folder / "adapter_model.safetensors").is_file():
        found.append("This run has not ended, or was stopped: --resume goes on with it.")
    lost = [step for step, loss in run.values("loss") if not isfinite(loss)]
    if lost:
        found.append(
            f"From step {lost[0]:,} on the loss is not a number: take a lower --learning-rate."
        )
    evals = run.values("eval_loss")
    step, best = min(evals, key=lambda pair: pair[1], default=(0, 0.0))
    if evals and evals[-1][1] > 1.02 * best + 0.01:
        found.append(
            f"Evaluation was best at step {step:,} ({best:.4f}) and has become worse since: "
            "fewer steps may do."
        )
    cut = (run.facts.get("data") or {}).get("training", {}).get("cut_rows", 0)
    if cut:
        length = run.settings.get("max_length")
        found.append(f"{cut:,} training rows were longer than {length} tokens and lost their end.")
    return found


def _merge_facts(report: Mapping[str, Any]) -> dict[str, Any]:
    onto = {
        "nf4": "onto the dequantized 4-bit base, as in training",
        "original": "onto the original weights, which training did not see",
    }
    verify, layers = report["verify"], report["layers"]
    kinds = [
        {
            "name": name,
            "layers": len(found),
            "change": median(facts["delta_over_weight"] for _, facts in found),
            "kept": median(facts["kept"] for _, facts in found),
            "least": min(facts["kept"] for _, facts in found),
        }
        for name, found in by_kind(layers).items()
    ]
    kept = verify and verify["kept"]
    return {
        "about": f"{onto.get(report['onto'], report['onto'])}; {report['format']}",
        "verify": verify,
        "kept": "no gain" if kept is None else f"{kept:.2%}",
        "kinds": kinds,
        "picture": Markup(as_svg(draw_merge(report), "What each layer kept")) if layers else None,
    }


# ---- the page


def page(run: Run, merge: Mapping[str, Any] | None = None) -> str:
    """The whole page, as text."""
    settings, device = run.settings, run.facts.get("device") or {}
    peak, total = _memory(run)
    per = "label" if "labels" in (run.facts.get("base") or {}) else "supervised token"
    versions = {f"version of {k}": v for k, v in (run.facts.get("versions") or {}).items()}
    memory = {"device": device.get("name"), "in use at most": f"{peak / GIB:.2f} GiB"}
    memory["there is"] = f"{total / GIB:.1f} GiB" if total else "not known"
    samples = [
        {**row, "right": row["after"] is not None and row["after"].strip() == row["wanted"].strip()}
        for row in run.samples
    ]
    template = files("qlora.apps").joinpath(REPORT).read_text(encoding="utf-8")
    return (
        Environment(autoescape=True, undefined=StrictUndefined)
        .from_string(template)
        .render(
            name=run.folder.resolve().name,
            folder=run.folder,
            base=Path(str(settings.get("model"))).name,
            data_name=Path(str(settings.get("data"))).name,
            date=date.fromtimestamp((run.folder / METRICS).stat().st_mtime),
            tiles=tiles(run),
            remarks=remarks(run),
            curves=Markup(
                as_svg(draw_run(run.rows, per=per, total_bytes=total), "Curves of the run")
            ),
            samples=samples,
            data=run.facts.get("data"),
            memory={key: value for key, value in memory.items() if value is not None},
            merge=merge and _merge_facts(merge),
            settings={key: _plain(settings[key]) for key in MAIN_SETTINGS if key in settings},
            others={key: _plain(value) for key, value in (settings | versions).items()},
            commands=next_commands(run.folder, merged=merge is not None),
        )
    )


def _plain(value: Any) -> str:
    """A setting as words."""
    if value is None or isinstance(value, bool):
        return {None: "default", True: "yes", False: "no"}[value]
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value) or "none"


def next_commands(folder: Path, *, merged: bool) -> list[str]:
    """What to type next."""
    name, out = shlex.quote(str(folder)), shlex.quote(f"{folder}-merged")
    chat = f"python -m qlora.chat --adapter {name}"
    merge = f"python merge_dequant.py --adapter {name} --output-dir {out}"
    return [chat] if merged else [chat, merge]


def report(config: ReportConfig) -> None:
    """Write the page, and say where it is."""
    folder = Path(config.adapter).expanduser()
    run = read_run(folder)
    merge = read_merge(folder, config.merged)
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} is not yours to write to: copy it, and report on the copy")
    replace_text(folder / REPORT, page(run, merge))
    print(f"The report is {folder / REPORT}: open it in a browser; it needs no network.")
    print(f"Next:  {next_commands(folder, merged=merge is not None)[-1]}")
