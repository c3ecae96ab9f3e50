"""The choice of flags: the fastest combination that fits, and what learns less only last."""

from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest

from qlora.config import DataConfig, LoraConfig, TrainConfig
from qlora.plan import fit
from qlora.plan.fit import Fitter, flags_of, largest, less_memory

CONFIG = TrainConfig(
    "model", "out", DataConfig("rows.jsonl", max_length=4096), lora=LoraConfig(r=16), plan=True,
    optim="adamw_torch", gradient_checkpointing=False, gpu_memory="1GiB",
)  # fmt: skip
# what each setting takes off a peak of 1,000 MiB, and how much longer a step takes
EFFECT = {
    "per_device_train_batch_size": (100, 1.07), "optim": (90, 1.001),
    "gradient_checkpointing": (300, 1.3), "offload_activations": (80, 1.02),
    "offload_embedding": (50, 1.01), "r": (40, 1.0),
}  # fmt: skip
MIB = 1 << 20


def effect(config: TrainConfig) -> tuple[int, float]:
    """Peak in MiB and seconds of a made-up run."""
    changed = fit.changed(CONFIG, config)
    peak, seconds = 1000, 1.0
    for name, (saved, slower) in EFFECT.items():
        if name in changed:
            peak, seconds = peak - saved, seconds * slower
    return peak * config.data.max_length // 4096, seconds


@pytest.fixture
def fitter(monkeypatch):
    """`fitter(MiB)`: of made-up plans on a card of that size."""

    class Fake(Fitter):
        def _planned(self, settings: Any) -> Any:
            config = fit.with_settings(self.config, settings)
            peak = effect(config)[0] * MIB
            return SimpleNamespace(
                config=config, peak_bytes=peak, fits=peak <= self.budget, length=4096
            )

    monkeypatch.setattr(fit, "step_seconds", lambda plan, _: effect(plan.config)[1])

    def made(memory: int) -> Fitter:
        config = replace(CONFIG, gpu_memory=f"{memory}MiB")
        sample = SimpleNamespace(collate=True)
        planner: Any = SimpleNamespace(
            config=config, source=SimpleNamespace(longest=None), sample=sample
        )
        return Fake(planner)

    return made


@pytest.mark.parametrize("memory", range(400, 1000, 37))
def test_cheapest_is_the_fastest_combination_that_fits(memory, fitter):
    chosen = fitter(memory).cheapest()
    names = [name for name in EFFECT if name != "r"]
    pairs = [c for n in range(6) for c in combinations(names, n)]
    known = [c for c in pairs if "offload_activations" not in c or "gradient_checkpointing" in c]
    peaks = {c: 1000 - sum(EFFECT[n][0] for n in c) for c in known}
    times = {c: fit.prod(EFFECT[n][1] for n in c) for c in known if peaks[c] <= memory}
    assert effect(chosen.config)[0] <= memory
    assert effect(chosen.config)[1] == pytest.approx(min(times.values()))


@pytest.mark.parametrize(
    "memory, r, is_cut", [(390, 16, False), (350, 8, False), (300, 16, True), (10, None, None)]
)
def test_rank_and_then_length_are_cut_last(memory, r, is_cut, fitter):
    chosen = fitter(memory).cheapest()
    if r is None:
        assert chosen is None
        return
    assert effect(chosen.config)[0] <= memory
    tokens = chosen.config.data.max_length
    assert chosen.config.lora.r == r and (tokens < 4096) == is_cut and tokens >= 256


def test_options_are_listed_by_their_time(fitter):
    options = fitter(500).options()
    assert [o.flags for o in options] == [
        "--optim paged_adamw_8bit",
        "--offload-embedding",
        "--per-device-train-batch-size 1 --gradient-accumulation-steps 16",
        "--gradient-checkpointing",
        "--gradient-checkpointing --offload-activations",
        "--r 8",
        "--max-length 2048 --long-rows truncate",
    ]
    assert [round(o.slower, 2) for o in options[:4]] == [1.0, 1.01, 1.07, 1.3]
    assert options[3].saved_bytes == 300 * MIB


def test_packing_is_offered_where_rows_are_padded():
    for pads in (True, False):
        flags = [flags_of(v) for c in less_memory(CONFIG, pads=pads) for v in c.values]
        assert ("--packing" in flags) == pads


def test_shards_are_offered_for_several_gpus():
    def flags(**settings: Any) -> list[str]:
        config = replace(CONFIG, plan=True, **settings)
        return [flags_of(v) for c in less_memory(config, pads=False) for v in c.values]

    both = {"--sharding fsdp", "--sharding fsdp --offload-base"}
    assert not both & {*flags()} and "--offload-embedding" in flags()
    assert both < {*flags(gpus=2)} and "--offload-embedding" in flags(gpus=2)
    shards = flags(gpus=2, sharding="fsdp")
    assert "--offload-base" in shards and not both & {*shards}


@pytest.mark.parametrize("threshold", [0, 1, 5, 63, 1000, 10**6])
def test_search_finds_the_largest(threshold):
    found = largest(lambda n: 7 * n + 3, 7 * threshold + 3, 2048, 8)
    assert found <= min(threshold, 2048) <= found * (1 + 1 / 32) + 1


def test_flags_of_settings():
    assert flags_of({"r": 8, "offload_activations": True, "gradient_checkpointing": False}) == (
        "--r 8 --offload-activations --no-gradient-checkpointing"
    )
