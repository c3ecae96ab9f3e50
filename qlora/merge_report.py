"""What a merge tells of itself: merge_report.json, a picture, the model card, and the terminal."""

import json
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from qlora.config import MergeConfig
from qlora.export import Facts
from qlora.merge_plan import Plan
from qlora.model_card import write_merge_card
from qlora.pictures import by_kind, plot_merge
from qlora.run_files import MERGE_REPORT, replace_text
from qlora.tasks import CAUSAL_LM, task_named

if TYPE_CHECKING:
    from qlora.verify import Verification

WARN_BELOW = 0.95  # share of the gain kept


class MergeReport:
    """What is known of a merge so far; `layers` fills while it runs."""

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
            plot_merge(values, folder / "merge.png")
        write_merge_card(folder, values)

    def print_summary(self, output: Path) -> None:
        """What was done, and a table of it by kind of layer."""
        base = "the dequantized 4-bit base"
        onto = base if self.config.onto == "nf4" else "the original weights"
        size = sum(entry.nbytes for entry in self.plan.entries)
        print(f"Merged onto {onto}, {self.config.format}, {size / 1e9:.2f} GB.")
        print(self._table())
        print(f"\nWritten to {output}. Use it:")
        task = task_named(self.plan.task)
        served = f"      or      vllm serve {output}" if task is CAUSAL_LM else ""
        print(f'  {task.auto_class}.from_pretrained("{output}"){served}')

    def _table(self) -> str:
        in_4_bits = any("codes_changed" in facts for facts in self.layers.values())
        head = f"\n{'':18}{'layers':>7}{'change of weight':>18}{'of it kept':>12}{'least':>9}"
        lines = [head + f"{'codes changed':>15}" * in_4_bits]
        for kind, found in by_kind(self.layers).items():
            kept = [facts["kept"] for _, facts in found]
            line = (
                f"{kind:18}{len(found):7}"
                f"{median(facts['delta_over_weight'] for _, facts in found):18.2%}"
                f"{median(kept):12.1%}{min(kept):9.1%}"
            )
            if in_4_bits:
                codes = [f["codes_changed"] for _, f in found if "codes_changed" in f]
                line += f"{median(codes):15.1%}" if codes else ""
            lines.append(line)
        return "\n".join(lines)

    def print_verification(self) -> None:
        """The measured table, and a warning where little is kept."""
        if self.verified is None:
            return
        print(self.verified.table())
        kept = self.verified.kept
        if kept is not None and kept < WARN_BELOW:
            print(
                f"\nWARNING: the merged model has lost {1 - kept:.1%} of what training gained on "
                "this data. Do not use it in place of the live adapter."
            )
