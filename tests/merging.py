"""Shared helpers of the merge tests: adapters to merge, and merges without a figure."""

import json
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import DEFAULT, patch

import pytest
import torch
from adapter_kinds import logits
from conftest import FP32, adapted_model, write_rows
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora import LoraConfig, MergeConfig, QuantConfig, UserError, save_adapter
from qlora.merge import merge


class Trained(NamedTuple):
    """A live model with a random adapter, and the adapter's folder. Tests must not change them."""

    model: Any
    adapter: Path


def trained(base: Path, folder: Path, quant: QuantConfig = FP32, **lora: Any) -> Trained:
    model = adapted_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8} | lora), quant)
    save_adapter(model, folder)
    return Trained(model.eval(), folder)


@pytest.fixture(scope="session")
def trained_on(checkpoints, tmp_path_factory):
    """`trained_on(family)`: an adapter over that tiny model, cached."""
    root = tmp_path_factory.mktemp("trained")
    return cache(lambda family: trained(checkpoints(family), root / family))


def run_merge(
    adapter: Path | tuple[str, ...], output: Path, *, picture: bool = False, **settings: Any
) -> None:
    """Merge, by default without the figure, which takes most of the time of a tiny merge."""
    names = adapter if isinstance(adapter, tuple) else str(adapter)
    without: Any = {"draw_merge": DEFAULT, "save_png": DEFAULT}
    with nullcontext() if picture else patch.multiple("qlora.merge.report", **without):
        merge(MergeConfig(adapter=names, output_dir=str(output), **settings))


def merged(adapter: Path, output: Path, **settings: Any) -> dict[str, Tensor]:
    run_merge(adapter, output, **settings)
    files = output.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def report_of(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "merge_report.json").read_text()))


def refused(adapter: Path, output: Path, match: str, **settings: Any) -> None:
    """Assert that the merge fails with one matching line and writes nothing."""
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(UserError, match=match) as error:
        run_merge(adapter, output, **settings)
    assert "\n" not in str(error.value)
    assert sorted(output.parent.rglob("*")) == before


def rows_file(folder: Path) -> str:
    rows = [{"prompt": f"say {i}", "completion": f"it is {i * i}"} for i in range(12)]
    return str(write_rows(folder / "rows.jsonl", rows))


def require_logits(output: Path, wanted: Tensor) -> None:
    """The merged checkpoint gives those logits of `token_ids`, to fp32 sums in another order."""
    again = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    torch.testing.assert_close(logits(again), wanted, atol=1e-5, rtol=1e-5)
