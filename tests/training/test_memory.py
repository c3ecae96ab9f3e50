"""Out-of-memory errors at each part of a run, and the dry step before it."""

import gc
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from conftest import (
    SIZES,
    axis,
    losses,
    quick_config,
    read_rows,
    refuses,
    require_same_adapter,
    token_ids,
)
from simulated_device import LateCopies
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from qlora.config import DataConfig, LoraConfig, TrainConfig
from qlora.data import generation
from qlora.errors import UserError
from qlora.fast.offload import offload_activations
from qlora.training import dry_step, memory, run
from qlora.training.checkpoints import complete_checkpoints, state_at
from qlora.training.run import train
from qlora.training.trainer import AdapterTrainer

LAYOUTS = {"flat": (True, False), "padded": (False, False), "flat packs": (True, True),
           "padded packs": (False, True)}  # fmt: skip


# Operators of a part: some gradients are there after so many of the backward pass.
LATE = {"forward": 50, "backward": 200, "evaluation": 50}


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


@pytest.mark.parametrize(("message", "is_memory"), [
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
    ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", True),
    ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm(handle)`", False),
    ("Triton Error [CUDA]: out of memory", True), ("Triton Error [CUDA]: invalid argument", False),
])  # fmt: skip
def test_errors_of_libraries_on_a_full_gpu(message, is_memory):
    assert memory.is_out_of_memory(RuntimeError(message)) == is_memory


def in_turn(part: str, turn: int) -> Callable[[int, str, int], bool]:
    """Fails once: late in the `turn`th such part of a step."""
    seen = [0]

    def fails(tokens: int, now: str, number: int) -> bool:
        is_late = now == part and number == LATE[part]
        seen[0] += is_late
        return is_late and seen[0] == turn

    return fails


def above(tokens: int, *parts: str) -> Callable[[int, str, int], bool]:
    """Fails for every batch of more tokens, late in the part."""
    return lambda now, part, number: now > tokens and part in parts and number == LATE[part]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Without what takes longer than these runs: a picture, and looking for garbage in packages."""
    monkeypatch.setattr(run, "write_results", lambda *_, **__: None)
    gc.freeze()
    yield
    gc.unfreeze()


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
        ("flat", in_turn("backward", 4), "step 2: memory ran out at 4 rows"),
        ("flat", above(60, "forward"), "in parts of at most 1, with"),
        ("padded", above(90, "backward"), "in parts of at most 2, with"),
        ("padded packs", above(120, "forward", "backward"), "in parts of at most "),
        *(
            pytest.param(*values, marks=pytest.mark.full)
            for values in (
                ("flat", in_turn("forward", 3), "step 2: memory ran out at 4 rows"),
                ("flat packs", above(150, "backward"), "in parts of at most "),
            )
        ),
    ],
)
def test_a_step_is_begun_again_in_parts(
    layout, fails, said, configs, plain, short_of_memory, capsys
):
    """With the same losses to the rounding of fp32 sums in another order."""
    expected = read_rows(plain(layout) / "metrics.jsonl")
    capsys.readouterr()
    allocator = short_of_memory(fails)
    folder = train(configs(layout))
    assert allocator.failed and said in capsys.readouterr().out
    found = read_rows(folder / "metrics.jsonl")
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in found] == pytest.approx([r[key] for r in expected], rel=1e-4), key
    seen = [state_at(out / "checkpoint-2").num_input_tokens_seen for out in (folder, plain(layout))]
    assert seen[0] == seen[1] > 0


def test_one_row_that_does_not_fit_keeps_activations_in_host_memory(
    configs, short_of_memory, monkeypatch, capsys
):
    """And draws the same dropout when the step is begun again."""
    settings: Any = {"lora": LoraConfig(r=4, lora_dropout=0.1), "per_device_train_batch_size": 1}
    runs = [train(configs("flat", **settings))]
    copies = LateCopies()
    offload = offload_activations(copies=copies, min_bytes=1, keep=1)
    monkeypatch.setattr(memory, "offload_activations", lambda: offload)
    monkeypatch.setattr(memory, "OFFLOADS_FROM", "cpu")
    short_of_memory(in_turn("backward", 4))
    runs.append(train(configs("flat", **settings)))
    require_same_adapter(*runs)
    assert losses(runs[0]) == losses(runs[1])
    assert "step 2: memory ran out at 1 row" in capsys.readouterr().out and copies.log


def raise_in_turn(turn: int, function: Any = None) -> Any:
    """`function`, which runs out of memory in its call number `turn`."""
    calls = count(1)

    def called(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == turn:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return function(*args, **kwargs)

    return called


@pytest.mark.parametrize(
    ("owner", "name", "turn", "step", "words"),
    [
        (memory, "halves", 0, 1, r"in step 2, at 4 rows?, .* give --gradient-checkpointing, or"),
        (torch.optim.AdamW, "step", 3, 2, r"in the optimizer's step\. .*lower --r or --max-length"),
        ("qlora.training.saving", "save_adapter", 2, 1, r"in saving checkpoint-2\. "),
        ("qlora.training.checkpoints", "write_state", 3, 1, r"in saving checkpoint-2\. "),
    ],
)
def test_where_nothing_helps_the_last_checkpoint_is_whole(
    owner, name, turn, step, words, configs, short_of_memory, monkeypatch
):
    owner = resolve_name(owner) if isinstance(owner, str) else owner
    if name == "halves":  # a batch that cannot be split
        short_of_memory(in_turn("forward", 3))
        monkeypatch.setattr(memory, name, lambda batch: [batch])
    else:
        monkeypatch.setattr(owner, name, raise_in_turn(turn, getattr(owner, name)))
    ours: Any = {"max_steps": 4, "save_steps": 1, "gradient_checkpointing": False}
    config = configs("flat", **ours)
    whole = rf"memory ran out {words}"
    with pytest.raises(UserError, match=whole) as error:
        train(config)
    output = Path(config.output_dir)
    assert f"{output}/checkpoint-{step} is whole, --resume continues" in str(error.value)
    assert sorted(complete_checkpoints(output)) == [*range(1, step + 1)]
    assert len([*output.glob("checkpoint-*")]) == step
    if name == "save_adapter":
        monkeypatch.undo()
        train(replace(config, resume=True, max_steps=step + 1))


def test_evaluation_in_parts_has_the_same_loss(configs, plain, short_of_memory, data, capsys):
    both = DataConfig(str(data), str(data), max_length=128)
    found = []
    for allocator in (None, short_of_memory):
        if allocator:
            allocator(above(150, "evaluation"))
        rows = read_rows(train(configs("flat", data=both, eval_steps=2)) / "metrics.jsonl")
        found.append([row["eval_loss"] for row in rows if "eval_loss" in row])
    assert len(found[1]) == 1 and found[1] == pytest.approx(found[0], rel=1e-5)
    assert "the evaluation after step 2: memory ran out at 4 rows" in capsys.readouterr().out


def test_answers_are_skipped(configs, plain, monkeypatch, capsys):
    monkeypatch.setattr(generation, "generate", raise_in_turn(1, generation.generate))
    folder = train(configs("flat", samples=1))
    assert "no answers before training, as memory ran out" in capsys.readouterr().out
    require_same_adapter(folder, plain("flat"))
    (row,) = read_rows(folder / "samples.jsonl")
    assert row["before"] is None and row["after"] is not None


# ---- the dry step


@pytest.mark.parametrize("layout", axis("flat", "padded packs"))
def test_a_dry_step_changes_nothing(layout, configs, monkeypatch, capsys):
    """Not with dropout, an 8-bit optimizer, fp32 masters and weights that are -0."""
    lora = LoraConfig(r=4, lora_dropout=0.1, adapter_dtype="bf16")
    settings: Any = {"lora": lora, "optim": "paged_adamw_8bit"}
    runs = [train(configs(layout, **settings))]
    said = capsys.readouterr().out
    assert "training: 2 steps, about " in said and "dry step" not in said
    monkeypatch.setattr(dry_step, "MIN_BATCHES", 4)
    runs.append(train(configs(layout, **settings)))
    said = capsys.readouterr().out
    rows = r"dry step, 4 rows, 2\d\d tokens" if layout == "flat" else r"dry step, \d+ rows, \d+ tok"
    assert re.search(rows + r".*: peak memory [\d.]+ [GM]iB; training takes about \d+ s", said)
    require_same_adapter(*runs)
    assert losses(runs[0]) == losses(runs[1])


def test_a_dry_step_splits_before_anything_is_written(
    configs, plain, short_of_memory, monkeypatch, capsys
):
    """And refuses what does not fit at all: no output folder is left."""
    monkeypatch.setattr(dry_step, "MIN_BATCHES", 1)
    short_of_memory(above(150, "backward"), run, "before_training")
    folder = train(configs("flat"))
    assert "the dry step: memory ran out at 4 rows" in capsys.readouterr().out
    assert losses(folder) == pytest.approx(losses(plain("flat")), rel=1e-4)
    short_of_memory(above(1, "forward"), run, "before_training")
    config = configs("flat")
    with refuses(Path(config.output_dir), "ran out in the dry step, at 1 row, ", "--max-len"):
        train(config)


def test_what_modules_keep_is_put_back(checkpoints):
    """The frequencies of a RoPE that grows with the row, and a batch norm's statistics."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = LlamaConfig(**SIZES | {"max_position_embeddings": 16, "rope_parameters": rope})
    model = LlamaForCausalLM(config)
    model.norm = torch.nn.BatchNorm1d(8)
    before = model(token_ids(length=12)).logits
    rewind = memory.Rewind(model)
    for _ in range(2):  # the statistics are 0 at the start
        rewind.mark()
        model(token_ids(length=40))
        model.norm(torch.randn(4, 8))
        drawn = torch.rand(1)
        rewind.back()
        assert torch.equal(model(token_ids(length=12)).logits, before)
        assert model.norm.num_batches_tracked == 0 and not model.norm.running_mean.any()
        model.norm(torch.randn(4, 8))
        assert torch.equal(torch.rand(1), drawn)
        model.norm.reset_running_stats()
