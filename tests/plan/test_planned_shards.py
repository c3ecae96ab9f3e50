"""The plan of a sharded base: sizes by arithmetic, transfers as torch's `fully_shard` has them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import SIZES, axis
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from qlora.config import DataConfig, LoraConfig, QuantConfig, TrainConfig
from qlora.errors import UserError
from qlora.plan import time
from qlora.plan.command import table
from qlora.plan.estimate import ALLOWANCE, CONTEXT, SHARDS, Planner
from qlora.plan.fit import Fitter, flags_of, less_memory
from qlora.plan.shards import GATHERED
from qlora.plan.step import ADAPTERS, EMBEDDING, HEAD, LINEAR, OTHER
from qlora.plan.time import CARDS, PCIE, step_seconds

LAYERS, VOCAB, HIDDEN, WIDE = 6, 320, 256, 512
LLAMA = transformers.LlamaConfig(
    **SIZES | {"hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": LAYERS,
               "vocab_size": VOCAB, "num_attention_heads": 4, "num_key_value_heads": 2},
)  # fmt: skip
# of a layer: q and o, k and v of half as many heads, three of the MLP
MATRICES = [HIDDEN * HIDDEN] * 2 + [HIDDEN * HIDDEN // 2] * 2 + [HIDDEN * WIDE] * 3
LAYER, TABLE = sum(MATRICES) // 2, 2 * VOCAB * HIDDEN  # bytes of codes; of the embedding, the head
DECODER: Any = {"lora": LoraConfig(r=8), "gradient_accumulation_steps": 3}


def config_of(folder: Path, like: Any = LLAMA, **settings: Any) -> TrainConfig:
    like.save_pretrained(folder)
    known: Any = {"model": str(folder), "output_dir": "out", "plan": True, "gpus": 2, **DECODER}
    known |= {"data": DataConfig("rows.jsonl", max_length=256)}
    return TrainConfig(**(known | settings))


def plans(config: TrainConfig, *settings: dict[str, Any]) -> list[Any]:
    planner = Planner(config)
    return [planner.plan(replace(config, **own)) for own in settings]


@pytest.mark.parametrize("gpus", axis(2, 3, 8))
def test_each_gpu_has_a_part_of_every_matrix(gpus, tmp_path):
    """And whole constants, norms and adapters. A layer is gathered, with its buffer and one more,
    and embedding and head."""
    whole, own = plans(config_of(tmp_path, gpus=gpus), {}, {"sharding": "fsdp"})
    before, after = whole.segments[-1].start, own.segments[-1].start
    codes = sum(m // 2 - -(-m // 2 // gpus) for m in MATRICES)
    assert before[LINEAR] - after[LINEAR] == LAYERS * codes
    for kind in (EMBEDDING, HEAD):
        assert (before[kind], after[kind]) == (TABLE, -(-TABLE // gpus))
    assert all(before[kind] == after[kind] for kind in (ADAPTERS, OTHER))
    assert {s.peak[GATHERED] for s in own.segments if s.name[-1].isdigit()} == {
        2 * TABLE + 3 * LAYER
    }
    assert own.segments[0].peak[GATHERED] == 2 * TABLE + max(2 * TABLE, 2 * LAYER)
    assert own.segments[-1].start[GATHERED] == own.segments[-1].peak[GATHERED] == 0
    for one, next_ in zip(own.segments, own.segments[1:], strict=False):
        assert one.end == next_.start and min(one.end.values()) >= 0


@pytest.mark.parametrize("gpus", axis(2, 3))
def test_shards_in_host_memory_are_pinned_in_powers_of_two(gpus, tmp_path):
    config = config_of(tmp_path, gpus=gpus, sharding="fsdp")
    own, offloaded = plans(config, {}, {"offload_base": True})
    shards = [-(-m // 2 // gpus) for m in MATRICES]
    held, host = own.segments[-1].start, offloaded.segments[-1].start
    assert held[LINEAR] - host[LINEAR] == LAYERS * sum(shards)
    assert held[EMBEDDING] == host[EMBEDDING] > 0
    assert offloaded.host == {SHARDS: LAYERS * sum(2 ** (n - 1).bit_length() for n in shards)}
    copied = 2 * TABLE + 3 * LAYER + -(-LAYER // gpus)
    assert {s.peak[GATHERED] for s in offloaded.segments if s.name[-1].isdigit()} == {copied}
    assert offloaded.sent_bytes == own.sent_bytes


@pytest.fixture
def one_of_two() -> Iterator[None]:
    """This process as the first of two ranks, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def gathers_of_torch(like: Any) -> list[int]:
    """The numbers that `fully_shard` gathers for a forward and a backward pass, by gather."""
    model = transformers.LlamaForCausalLM(like).requires_grad_(False)
    model.enable_input_require_grads()
    small = {p for p in model.parameters() if p.ndim < 2}
    for module in (*model.model.layers, model):
        fully_shard(module, ignored_params=small)
    found, gather = [], dist.all_gather_single

    def noted(output: Any, *args: Any, **settings: Any) -> Any:
        found.append(output.numel())
        return gather(output, *args, **settings)

    with patch.object(dist, "all_gather_single", noted):
        ids = torch.arange(1, 9)[None]
        model(input_ids=ids, labels=ids).loss.backward()
    return found


def test_shards_travel_as_torch_sends_them(one_of_two, tmp_path):
    (own,) = plans(config_of(tmp_path, sharding="fsdp"), {})
    found = gathers_of_torch(LLAMA)
    layer = sum(MATRICES)
    assert sorted(found) == sorted([2 * VOCAB * HIDDEN, *[layer] * 2 * LAYERS])
    gathered = sum(n // 2 if n == layer else 2 * n for n in found)  # 4 bits a number, or 16
    assert own.sent_of_base == 3 * gathered // 2
    assert own.sent_bytes == own.sent_of_base + own.gradient_bytes


def test_layers_of_an_encoder_are_gathered_in_turn(tmp_path):
    like = transformers.T5Config(
        vocab_size=VOCAB, d_model=128, d_kv=64, d_ff=256, num_layers=4, num_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    config = config_of(tmp_path, like, task="seq2seq")
    whole, own = plans(config, {}, {"sharding": "fsdp"})
    attention, wi, wo = 4 * 128 * 128 // 2, 128 * 256 // 2, 2 * 128 * 256  # wo stays in 16 bits
    encoder, decoder = (n * attention + wi + wo for n in (1, 2))
    biases = 2 * (2 * 32 * 2)  # of positions, in the first layers
    before, after = (plan.segments[-1].start[LINEAR] for plan in (whole, own))
    assert before - after == (4 * (encoder + decoder) + biases) // 2
    root = 2 * VOCAB * 128
    encoders = max(segment.peak[GATHERED] for segment in own.segments[:1])
    assert 2 * encoder + root <= encoders <= 8 * encoder + root + biases


@pytest.mark.parametrize("settings", [{"gpus": 1}, {"gpus": None}])
def test_shards_of_one_gpu_are_refused(settings, tmp_path):
    with pytest.raises(UserError, match=r"--sharding fsdp is for several GPUs: give --gpus N"):
        Planner(config_of(tmp_path, sharding="fsdp", **settings))


def test_a_run_is_planned_with_its_ranks(one_of_two, tmp_path):
    named, own = (Planner(config_of(tmp_path, sharding="fsdp", gpus=n)).plan() for n in (2, None))
    assert (own.gpus, own.parts) == (2, named.parts)


# ---- what is said and advised


def test_the_table_tells_what_travels_and_what_the_host_has(tmp_path):
    config = config_of(tmp_path, sharding="fsdp", offload_base=True)
    own = Planner(config).plan()
    shown = table(own)
    assert f"Of it {own.sent_of_base / 2**20:.1f} MiB are shards of the base." in shown
    host = LAYERS * sum(2 ** (m // 4 - 1).bit_length() for m in MATRICES)
    assert f"All of them have {2 * host / 2**20:.1f} MiB of the base in host memory." in shown
    assert own.record()["sharding"] == "fsdp"
    assert "shards" not in table(
        Planner(replace(config, sharding="ddp", offload_base=False)).plan()
    )


def test_what_shards_take_off_is_advised_to_several_gpus(tmp_path):
    def flags(**settings: Any) -> list[str]:
        config = replace(config_of(tmp_path), **settings)
        return [flags_of(v) for c in less_memory(config, pads=False) for v in c.values]

    both = ["--sharding fsdp", "--sharding fsdp --offload-base"]
    assert [f for f in flags() if "sharding" in f] == both
    assert flags()[-3:] == ["--offload-embedding", *both]
    assert flags(offload_embedding=True)[-2:] == [f"--no-offload-embedding {f}" for f in both]
    assert not [f for f in flags(gpus=1) if "sharding" in f]
    assert flags(sharding="fsdp")[-1] == "--offload-base"
    assert "--offload-base" not in flags(sharding="fsdp", offload_base=True)


@pytest.fixture
def heavy(tmp_path) -> TrainConfig:
    """A run whose base is most of its memory."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 40}
    like = transformers.LlamaConfig(**SIZES | sizes)
    quant = QuantConfig(compute_dtype="bf16")
    least: Any = {"lora": LoraConfig(r=4), "per_device_train_batch_size": 1}
    return config_of(tmp_path, like, quant=quant, **least)


def memory_of(config: TrainConfig, **settings: Any) -> str:
    """A card that these settings fill."""
    return f"{Planner(replace(config, **settings)).plan().peak_bytes + (2 << 20)}B"


@pytest.mark.parametrize("offload", [False, True])
def test_a_base_too_large_for_a_gpu_is_sharded(offload, heavy):
    card = memory_of(heavy, sharding="fsdp", offload_base=offload)
    config = replace(heavy, gpu_memory=card)
    fitting = Fitter(Planner(config)).cheapest()
    assert fitting is not None and fitting.fits
    assert (fitting.config.sharding, fitting.config.offload_base) == ("fsdp", offload)


def test_a_base_that_fits_is_whole_again(heavy):
    config = replace(heavy, gpu_memory="80GiB", sharding="fsdp", offload_base=True)
    filled = Fitter(Planner(config)).fill()
    assert (filled.config.sharding, filled.config.offload_base) == ("ddp", False)


def test_a_transfer_that_is_longer_than_the_pass_takes_time(heavy, monkeypatch):
    monkeypatch.setattr(time, "LAUNCH", 0)
    card = CARDS["H200"]
    whole, own, host = plans(
        heavy, {}, {"sharding": "fsdp"}, {"sharding": "fsdp", "offload_base": True}
    )
    passes = heavy.gradient_accumulation_steps
    seconds = [step_seconds(plan, card) for plan in (whole, own, host)]
    assert seconds[0] < seconds[1] < seconds[2]
    layers = 40 * (3 * 512 * 512 + 3 * 512 * 2048) // 2  # keys and values of half the heads
    assert seconds[2] - seconds[1] == pytest.approx(passes * layers / PCIE, rel=0.01)
    assert own.parts[CONTEXT] == whole.parts[CONTEXT] and own.parts[ALLOWANCE]
