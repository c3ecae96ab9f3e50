"""Out-of-memory errors at each part of a run, and the dry step before it."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    losses,
    quick_config,
    read_rows,
    refuses,
    require_same_adapter,
    tiny_tokenizer,
    token_ids,
)
from simulated_device import LateCopies
from torch.utils._python_dispatch import TorchDispatchMode

from qlora.config import DataConfig, LoraConfig, TrainConfig
from qlora.data.rows import FlatCollator, PackCollator, collator
from qlora.errors import UserError
from qlora.fast.offload import offload_activations
from qlora.training import dry_step, memory
from qlora.training.outputs import complete_checkpoints
from qlora.training.run import train
from qlora.training.trainer import AdapterTrainer

LAYOUTS = {"flat": (True, False), "padded": (False, False), "flat packs": (True, True),
           "padded packs": (False, True)}  # fmt: skip


class Allocator(TorchDispatchMode):
    """Raises torch's error where `fails(tokens, part, number)` is true: of the last embedded batch
    the tokens, the part of the step, and how many operators it has seen in it."""

    def __init__(self, fails: Callable[[int, str, int], bool]) -> None:
        super().__init__()
        self.fails, self.tokens, self.number, self.part, self.failed = fails, 0, 0, "", 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.part
        if torch._C._current_graph_task_id() != -1:
            self.part = "backward"
        elif func is torch.ops.aten.embedding.default:
            self.part = "forward" if torch.is_grad_enabled() else "evaluation"
            self.tokens, before = args[1].numel(), ""
        elif self.part == "backward":
            self.part = "update"
        self.number = self.number + 1 if self.part == before else 1
        if self.part and self.fails(self.tokens, self.part, self.number):
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return func(*args, **(kwargs or {}))


def in_turn(part: str, turn: int) -> Callable[[int, str, int], bool]:
    """Fails once: in the fifth operator of the `turn`th such part of a step."""
    seen = [0]

    def fails(tokens: int, now: str, number: int) -> bool:
        seen[0] += now == part and number == 5
        return now == part and number == 5 and seen[0] == turn

    return fails


def above(tokens: int, *parts: str) -> Callable[[int, str, int], bool]:
    """Fails for every batch of more tokens, late in the part."""
    return lambda now, part, number: now > tokens and part in parts and number == 5


@pytest.fixture(scope="module")
def configs(checkpoints, data, tmp_path_factory) -> Callable[..., TrainConfig]:
    """`configs(layout)`: two steps of two micro-batches."""

    def config(layout: str, **settings: Any) -> TrainConfig:
        fast, packing = LAYOUTS[layout]
        both = DataConfig(str(data), max_length=128, packing=packing)
        ours: dict[str, Any] = {"data": both, "fast_path": fast, "max_steps": 2, "save_steps": 9}
        ours |= {"gradient_accumulation_steps": 2, "optim": "adamw_torch"}
        folder = tmp_path_factory.mktemp("run") / "out"
        return quick_config(checkpoints("llama"), data, folder, **(ours | settings))

    return config


@pytest.fixture(scope="module")
def plain(configs) -> Callable[[str], Path]:
    """`plain(layout)`: the same run with enough memory."""
    return cache(lambda layout: train(configs(layout)))


@pytest.fixture
def short_of_memory(monkeypatch) -> Callable[..., Allocator]:
    """`short_of_memory(fails)`: an Allocator for training, or for another function of a run."""

    def begin(
        fails: Callable[[int, str, int], bool], owner: Any = AdapterTrainer, name: str = "fit"
    ):
        allocator, function = Allocator(fails), getattr(owner, name)

        def with_it(*args: Any, **kwargs: Any) -> Any:
            with allocator:
                return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, with_it)
        return allocator

    return begin


@pytest.mark.parametrize(
    ("layout", "fails", "said"),
    [
        ("flat", in_turn("forward", 3), "step 2: memory ran out at 4 rows"),
        ("flat", in_turn("backward", 4), "step 2: memory ran out at 4 rows"),
        ("flat", above(60, "forward"), "in parts of at most 1, with"),
        ("padded", above(90, "backward"), "in parts of at most 2, with"),
        ("flat packs", above(150, "backward"), "in parts of at most "),
        ("padded packs", above(120, "forward", "backward"), "in parts of at most "),
    ],
)
def test_a_step_is_begun_again_in_parts(
    layout, fails, said, configs, plain, short_of_memory, capsys
):
    """With the same losses to the rounding of fp32 sums in another order; tokens are counted once."""
    expected = read_rows(plain(layout) / "metrics.jsonl")
    capsys.readouterr()
    allocator = short_of_memory(fails)
    folder = train(configs(layout))
    assert allocator.failed and said in capsys.readouterr().out
    found = read_rows(folder / "metrics.jsonl")
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in found] == pytest.approx([r[key] for r in expected], rel=1e-4), key
