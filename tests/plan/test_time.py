"""The time of a step by arithmetic: its parts for Llama-2-7B against those worked out by hand."""

import pytest
import transformers

from qlora.config import DataConfig, TrainConfig
from qlora.plan.estimate import Plan, Planner
from qlora.plan.time import CARDS, card_named, card_of_size, step_seconds
from qlora.plan.work import ATTENTION, DECODED, PRODUCTS, Work

LAYERS, HIDDEN, INNER, VOCAB, TOKENS = 32, 4096, 11008, 32000, 2048
ATTENTION_WEIGHTS, MLP_WEIGHTS = 4 * HIDDEN**2, 3 * HIDDEN * INNER


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Plan:
    """One row of 2,048 tokens of Llama-2-7B."""
    folder = tmp_path_factory.mktemp("llama2-7b")
    transformers.LlamaConfig().save_pretrained(folder)  # whose defaults are its sizes
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    data = DataConfig("rows.jsonl", max_length=TOKENS)
    return Planner(TrainConfig(str(folder), "out", data, **settings)).plan()


def test_work_is_that_of_the_shapes(plan):
    work = Work()
    for segment in plan.segments:
        work.update(segment.work)
    # forward and gradient of the input; all but `down` forward again; the head forward and backward
    flops = 2 * TOKENS * LAYERS * (3 * ATTENTION_WEIGHTS + (3 - 1 / 3) * MLP_WEIGHTS)
    flops += 2 * TOKENS * 2 * VOCAB * HIDDEN
    assert work[PRODUCTS] == pytest.approx(flops, rel=0.02)  # and the adapters
    # 3 decodes of the attention's weights and 2 of the MLP's: 4 bits and a scale in, 16 bits out
    values = LAYERS * (3 * ATTENTION_WEIGHTS + 2 * MLP_WEIGHTS)
    assert work[DECODED] == pytest.approx(values * (2 + 0.5), rel=0.01)
    # forward twice, 2 FLOPs for a score and for its value, half of them masked; backward 2.5 times
    attention = LAYERS * 2 * TOKENS**2 * HIDDEN
    assert work[ATTENTION] == pytest.approx(4.5 * attention, rel=0.02)


@pytest.mark.parametrize("card, seconds", [("H100", 0.233), ("RTX 4090", 0.749)])
def test_step_takes_as_long_as_worked_out_by_hand(card, seconds, plan):
    assert step_seconds(plan, CARDS[card]) == pytest.approx(seconds, rel=0.25)


@pytest.mark.parametrize(
    "name, card",
    [
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA L40S", "L40S"),
        ("Some other card", None),
    ],
)
def test_card_of_a_name(name, card):
    assert card_named(name) == CARDS.get(card)


def test_card_of_a_size():
    assert [card_of_size(n << 30).name for n in (6, 8, 24, 80)] == [
        "RTX 4060", "RTX 4060", "RTX 3090", "A100",
    ]  # fmt: skip
    assert card_of_size(1 << 60).name == "H200"
