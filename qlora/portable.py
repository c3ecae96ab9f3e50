"""An adapter written so that every program takes it, and computes what was trained.

    python -m qlora.portable --adapter out [--output-dir out-portable]

prints what each consumer (qlora.consumers) makes of an adapter, and writes the portable one. That
is the part of PEFT's format which all of them read alike: A and B of linear layers, one r, one
lora_alpha, a list of targets, and nothing else. The function stays as it is:

    scaling      lora_alpha = scaling * r, a float; rsLoRA becomes lora_alpha / r, to a rounding of
                 a double
    patterns     one scaling for all; what another layer had more or less goes into its B. A power
                 of two is exact in any dtype; where it is not, that B becomes fp32
    ranks        rows of zeros below A and columns of zeros beside B, up to the highest r: a server
                 reserves that much for each layer anyway
    targets      a list; full names where it was an expression or only some of the layers

What A and B cannot say is refused by name: DoRA, biases, embeddings, modules and token rows trained
in full. merge_dequant.py folds all of those in. Left out are zeros for layers that an adapter lacks
beside others (SGLang wants v_proj where q_proj is): their shapes are the base's.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from qlora.adapter_reader import CONFIG, WEIGHTS, contents_of, read_files, require_understood
from qlora.adapter_tensors import PREFIX
from qlora.consumers import BAKED, LOST, findings, problems
from qlora.errors import UserError
from qlora.lora import Factors
from qlora.shards import publishing, require_new


def portable_subset(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same adapter in what every consumer reads; tensors that need no change are themselves.

    Args:
        values: adapter_config.json.
        tensors: of adapter_model.safetensors, by their names there.
        folder: what an error calls the adapter.

    Raises:
        UserError: it holds what A and B of linear layers cannot say, or its tensors and its config
            do not go together.
    """
    _refuse_lost(values, tensors, folder)
    require_understood(values, folder)
    _, contents = contents_of(values, tensors, folder)
    if not contents.pairs:
        raise UserError(f"adapter {folder} holds no lora_A and lora_B: there is nothing to write")
    r = max(len(factors.lora_A) for factors in contents.pairs.values())
    scaling = _common_scaling([factors.scaling for factors in contents.pairs.values()])
    baked = dict(tensors)
    for module, factors in contents.pairs.items():
        lora_A, lora_B = _padded(factors, r, scaling)
        baked[f"{PREFIX}{module}.lora_A.weight"] = lora_A
        baked[f"{PREFIX}{module}.lora_B.weight"] = lora_B
    return _portable_values(values, list(contents.pairs), r, scaling * r), baked


def _refuse_lost(values: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> None:
    found = findings(values, tensors, LOST)
    if found:
        mends = dict.fromkeys(rule.mend for rule, _ in found)
        parts = [", ".join(w for rule, w in found if rule.mend == m) + f": {m}" for m in mends]
        raise UserError(f"adapter {folder} holds what is not portable: {'; '.join(parts)}")


def _common_scaling(scalings: list[float]) -> float:
    """The one that most layers have up to a power of two, and of these the most common."""

    def fit(scaling: float) -> tuple[int, int]:
        exact = sum(math.frexp(other / scaling)[0] == 0.5 for other in scalings)
        return exact, scalings.count(scaling)

    return max(dict.fromkeys(scalings), key=fit)


def _padded(factors: Factors, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), to be multiplied with `scaling`."""
    lora_A, lora_B = factors.lora_A, _times(factors.lora_B, factors.scaling / scaling)
    zeros = r - len(lora_A)
    if not zeros:
        return lora_A, lora_B
    return F.pad(lora_A, (0, 0, 0, zeros)), F.pad(lora_B, (0, zeros))


def _times(lora_B: Tensor, ratio: float) -> Tensor:
    """B times `ratio`: in its dtype where that is exact, else in fp32."""
    if ratio == 1:
        return lora_B
    wanted = lora_B.double() * ratio
    kept = wanted.to(lora_B.dtype)
    return kept if torch.equal(kept.double(), wanted) else wanted.float()


def _portable_values(
    values: Mapping[str, Any], modules: Iterable[str], r: int, lora_alpha: float
) -> dict[str, Any]:
    choices = ("exclude_modules", "layers_to_transform", "layers_pattern")
    targets = values.get("target_modules")
    if not isinstance(targets, list) or any(values.get(name) for name in choices):
        targets = sorted(modules)
    plain: dict[str, Any] = {
        "alpha_pattern": {},
        "bias": "none",
        "eva_config": None,
        "init_lora_weights": True,
        "lora_alpha": int(lora_alpha) if lora_alpha == int(lora_alpha) else lora_alpha,
        "modules_to_save": None,
        "r": r,
        "rank_pattern": {},
        "target_modules": targets,
        "trainable_token_indices": None,
        "use_rslora": False,
        **dict.fromkeys(choices),
    }
    return dict(sorted({**values, **plain}.items()))


# ---- the command ----


@dataclass(frozen=True)
class PortableConfig:
    """Say which programs take an adapter, and write it so that all of them do."""

    adapter: str
    """folder with adapter_config.json and adapter_model.safetensors"""
    output_dir: str | None = None
    """new folder for the portable adapter; without it nothing is written"""


def main(config: PortableConfig) -> None:
    """Print what each consumer makes of the adapter; write the portable one where asked to."""
    folder = Path(config.adapter).expanduser()
    output = Path(config.output_dir).expanduser() if config.output_dir else None
    if output:
        require_new(output)
    values, tensors, metadata = read_files(folder)
    contents_of(values, tensors, folder)
    print(table(problems(values, tensors)))
    if output:
        values, tensors = portable_subset(values, tensors, folder)
        with publishing(output) as partial:
            save_file(tensors, partial / WEIGHTS, metadata=metadata)
            text = json.dumps(values, indent=2) + "\n"
            (partial / CONFIG).write_text(text, encoding="utf-8")
        print(f"\nThe same function, in {output}:\n{table(problems(values, tensors))}")
    elif (baked := findings(values, tensors, BAKED)) and not findings(values, tensors, LOST):
        print(f"\n--output-dir DIR writes it without {', '.join(what for _, what in baked)}.")


def table(found: Mapping[str, list[str]]) -> str:
    """A line for each consumer."""
    return "\n".join(f"{who:<14}{'; '.join(what) or 'takes it'}" for who, what in found.items())


if __name__ == "__main__":
    from qlora.cli import run

    run(
        main,
        PortableConfig,
        prog="python -m qlora.portable",
        interrupted="nothing was written, the adapter is untouched",
    )
