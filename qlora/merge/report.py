"""The report of a merge: merge_report.json, merge.png, the model card, and the terminal."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from qlora.config import MergeConfig
from qlora.config.tasks import CAUSAL_LM, task_named
from qlora.files import MERGE_REPORT, MODELFILE, front_matter, replace_text
from qlora.merge.codes import Facts
from qlora.merge.plan import Plan
from qlora.pictures import by_kind, draw_merge, save_png

if TYPE_CHECKING:
    from qlora.merge.measure import Verification

WARN_BELOW = 0.95  # share of the gain kept


class MergeReport:
    """Facts about a merge; `layers` fills while it runs."""

    def __init__(self, config: MergeConfig, base_model: str, plan: Plan) -> None:
        self.config, self.base_model, self.plan = config, base_model, plan
        self.layers: dict[str, Facts] = {}
        self.verified: Verification | None = None

    def write(self, folder: Path) -> None:
        """merge_report.json, merge.png and README.md in `folder`."""
        quant, verified = self.plan.quant, self.verified
        values: dict[str, Any] = {
            "adapters": self.config.adapters,
            "base_model": self.base_model,
            "trained_on": self.config.trained_on,
            "onto": self.config.onto,
            "format": self.config.format,
            "quant_type": quant.quant_type,
            "blocksize": quant.blocksize,
            "double_quant": quant.double_quant,
            "layers": self.layers,
            "verify": asdict(verified) | {"kept": verified.kept} if verified else None,
        }
        replace_text(folder / MERGE_REPORT, json.dumps(values, indent=2) + "\n")
        if self.layers:
            save_png(draw_merge(values), folder / "merge.png")
        (folder / "README.md").write_text(self._model_card(), encoding="utf-8")

    def print_summary(self, output: Path) -> None:
        """Base, format, size, a table by kind of layer, and how to load the result."""
        dequantized = self.config.onto == "nf4"
        onto = "the dequantized 4-bit base" if dequantized else "the original weights"
        files = sorted(output.glob("*.gguf"))
        size = sum(entry.nbytes for entry in self.plan.entries)
        size = files[0].stat().st_size if files else size
        print(f"Merged onto {onto}, {self.config.format}, {size / 1e9:.2f} GB.")
        in_4_bits = any("codes_changed" in facts for facts in self.layers.values())
        head = f"\n{'':18}{'layers':>7}{'change of weight':>18}{'of it kept':>12}{'least':>9}"
        print(head + f"{'codes changed':>15}" * in_4_bits)
        for kind, layers in by_kind(self.layers).items():
            kept = [facts["kept"] for _, facts in layers]
            codes = [facts["codes_changed"] for _, facts in layers if "codes_changed" in facts]
            print(
                f"{kind:18}{len(layers):7}"
                f"{median(facts['delta_over_weight'] for _, facts in layers):18.2%}"
                f"{median(kept):12.1%}{min(kept):9.1%}"
                + (f"{median(codes):15.1%}" if codes else "")
            )
        print(f"\nWritten to {output}. Use it:")
        if files:
            name = shlex.quote(output.resolve().name.lower())
            print(f"  llama-cli -m {shlex.quote(str(files[0]))}")
            print(f"  ollama create {name} -f {shlex.quote(str(output / MODELFILE))}")
            print(f"  ollama run {name}")
            return
        task = task_named(self.plan.task)
        reader = "      # needs the package compressed-tensors" * (self.config.format == "int4")
        named = json.dumps(str(output), ensure_ascii=False)
        print(f"  {task.auto_class}.from_pretrained({named}){reader}")
        if task is CAUSAL_LM:
            plugin = "      # needs the package vllm-bnb-plugin" * (self.config.format == "nf4")
            print(f"  vllm serve {shlex.quote(str(output))}{plugin}")

    def print_verification(self) -> None:
        """The measured table, and a warning if much of the gain is lost."""
        if self.verified is None:
            return
        got, kept = self.verified, self.verified.kept
        share = "no gain" if kept is None else f"{kept:.2%}"
        merged = ", ".join(filter(None, ("merged", got.program)))
        width = max(24, len(merged))
        print(
            f"\nMeasured on {got.rows} rows, {got.tokens} supervised tokens:\n"
            f"  {'':{width}}{'loss':>9}{'gain kept':>12}{'KL to live':>13}{'same top token':>17}\n"
            f"  {self._base:{width}}{got.loss_base:9.4f}{0:12.2%}{got.kl_base:13.6f}\n"
            f"  {'base + live adapter':{width}}{got.loss_live:9.4f}{1:12.2%}\n"
            f"  {merged:{width}}{got.loss_merged:9.4f}{share:>12}{got.kl:13.6f}"
            f"{got.agreement:17.2%}"
        )
        if kept is not None and kept < WARN_BELOW:
            lost = f"{1 - kept:.1%} of the gain in loss"
            print(f"\nWARNING: on this data the merged model has lost {lost} from training.")
            print("Do not use it in place of the live adapter.")

    @property
    def _base(self) -> str:
        """The base in training."""
        return "16-bit base" if self.config.trained_on == "16bit" else "4-bit base"

    def _model_card(self) -> str:
        """README.md: adapter, base, format and measurements."""
        quant, got = self.plan.quant, self.verified
        onto = "the original weights"
        if self.config.onto == "nf4":
            grid = f"{quant.quant_type.upper()}, blocksize {quant.blocksize}"
            onto = f"the base dequantized from 4 bits ({grid})"
        is_same = (self.config.onto == "nf4") == (self.config.trained_on == "nf4")
        onto += ", as it was in training" if is_same else ", with which it was not trained"
        measured = "Not measured: merge with `--verify DATA` to compare it with the live adapter."
        if got:
            merged = f"merged ({got.program})" if got.program else "merged"
            measured = (
                f"On {got.rows} rows, {got.tokens} supervised tokens: loss {got.loss_base:.4f} for "
                f"the {self._base}, {got.loss_live:.4f} with the live adapter, "
                f"{got.loss_merged:.4f} {merged}; KL to the live adapter {got.kl:.2g} nats a "
                f"token, the same most likely token at {got.agreement:.1%} of the positions."
            )
            if got.kept is not None:
                measured += f" That keeps {got.kept:.2%} of training's gain in loss."
        shares = "\n![share of its change that each layer kept](merge.png)"
        picture = shares if self.layers else ""
        weights = self.config.adapters
        names = [f"`{name}`" + f" times {w:g}" * (w != 1) for name, w in weights.items()]
        many = len(names) > 1
        library = "gguf" if self.config.is_gguf else "transformers"
        return f"""{front_matter(self.base_model, library, "qlora", "merged")}
# {Path(self.base_model).name} with a LoRA adapter merged in

The adapter{"s" * many} {", ".join(names)} {"were" if many else "was"} folded in fp32 into {onto},
and rounded once to {self.config.format}.

{measured}
{picture}
"""
