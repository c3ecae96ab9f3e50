"""A base in shards, one on each rank, against one process that has it whole."""

import ctypes
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from conftest import axis, quick_config, read_rows, refuses
from several import At, Ended, in_ranks, require_done, trained
from test_ranks import config_of, require_close, rows_of, sent_in_a_step, trained_and_seen
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from qlora.base.load import load_base
from qlora.base.sharding import keeping_shards, shard_base
from qlora.config import DataConfig, LoraConfig, QuantConfig, TrainConfig
from qlora.errors import UserError
from qlora.plan.estimate import Planner
from qlora.training.callbacks import MMAP_THRESHOLD

HOW = {
    "llama": {"eval_steps": 10}, "gpt2": {"trainer": {"train_sampling_strategy": "random"}},
    "gemma": {"gradient_checkpointing": False, "fast_path": False}, "qwen3": {},
}  # fmt: skip


@pytest.mark.parametrize("family", axis(*HOW))
def test_two_ranks_with_a_shard_each_train_as_one_process(family, checkpoints, few, tmp_path):
    """Of 37 rows: at the end of an epoch, and in an evaluation, a rank has no batch left."""
    data = DataConfig(str(few), str(few), max_length=128, packing=family == "qwen3")
    settings: Any = {"data": data, "sharding": "fsdp", **HOW[family]}
    if data.packing:
        settings["per_device_train_batch_size"] = 1
    config = config_of(checkpoints(family), few, tmp_path / "two", **settings)
    require_done(in_ranks(2, trained, config))
    require_close(tmp_path / "two", trained_alone(config, tmp_path / "one", 2))


def trained_alone(config: TrainConfig, output: Path, ranks: int, **variables: str) -> Path:
    """The folder of the same run in one process, which has the base whole."""
    batches = config.gradient_accumulation_steps * ranks
    alone: Any = {"gradient_accumulation_steps": batches, "sharding": "ddp"}
    alone_too = replace(config, output_dir=str(output), **alone)
    require_done(in_ranks(1, trained, alone_too, **variables))
    return output


@pytest.mark.full
def test_sizes_that_three_ranks_do_not_divide(checkpoints, few, tmp_path):
    config = config_of(checkpoints("llama"), few, tmp_path / "three", sharding="fsdp", max_steps=8)
    require_done(in_ranks(3, trained, config))
    require_close(tmp_path / "three", trained_alone(config, tmp_path / "one", 3))


def stopped_by(config: TrainConfig, rank: int, step: int, seen: Path) -> None:
    trained(config, callback=At(rank, step, signal.SIGKILL), seen=seen)


@pytest.mark.full
def test_a_killed_run_goes_on_with_shards_or_without(checkpoints, few, tmp_path):
    settings: Any = {"max_steps": 6, "save_steps": 2, "sharding": "fsdp"}
    config = config_of(checkpoints("llama"), few, tmp_path / "whole", **settings)
    seen = {name: tmp_path / f"rows of {name}" for name in ("whole", "part", "two", "one")}
    for folder in seen.values():
        folder.mkdir()
    require_done(in_ranks(2, trained_and_seen, config, seen["whole"]))
    part = replace(config, output_dir=str(tmp_path / "part"))
    first, second = in_ranks(2, stopped_by, part, 1, 3, seen["part"])
    assert second.code == -signal.SIGKILL and first.error != "it hangs"
    for name, count, sharding in (("two", 2, "fsdp"), ("one", 1, "ddp")):
        folder = shutil.copytree(tmp_path / "part", tmp_path / name)
        again = replace(config, output_dir=str(folder), resume=True, sharding=sharding)
        require_done(in_ranks(count, trained_and_seen, again, seen[name]))
        assert rows_of(seen[name]) == rows_of(seen["whole"], since=2)
        require_close(folder, tmp_path / "whole")


# ---- what a rank holds, and what travels


@pytest.fixture(scope="session")
def wide(tmp_path_factory) -> Path:
    """A model of 140 million parameters in bf16, 280 MB; its embedding is three times as large as
    the largest layer, as in Llama-2-7B."""
    folder = tmp_path_factory.mktemp("wide")
    sizes: Any = {"hidden_size": 1024, "intermediate_size": 1408, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=4096, num_hidden_layers=16, tie_word_embeddings=True, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="80MB")
    return folder


def in_a_group(function: Callable[..., Any], *arguments: Any) -> Any:
    """The value of `function` in a rank without a run."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()


def values(ended: list[Ended]) -> list[Any]:
    require_done(ended)
    return [rank.value for rank in ended]


def sharded_base(folder: Path, quant: QuantConfig, *, offload: bool = False) -> Any:
    with keeping_shards(offload=offload):
        model = load_base(str(folder), quant, device="cpu")
    shard_base(model, offload=offload)
    return model


def held_bytes(model: Any) -> int:
    """Of all parameters, and of the constants of quantized ones, that this rank holds."""
    total = 0
    for parameter in model.parameters():
        total += getattr(parameter, "_local_tensor", parameter).nbytes
        state = getattr(parameter, "quant_state", None)
        for constants in (state, getattr(state, "state2", None)):
            total += 0 if constants is None else constants.absmax.nbytes + constants.code.nbytes
    return total


def own_memory() -> int:
    """Bytes of this process alone: no mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def loaded(folder: Path, sharded: bool) -> tuple[int, int]:
    """Bytes of parameters held, and the most that loading took: of pages in use, as glibc would
    keep those of freed tensors."""
    quant = QuantConfig(compute_dtype="bf16")
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 15)
    if sharded:  # what torch and bitsandbytes allocate once
        sharded_base(folder.parent / "tiny", quant)
    before, ended, looks = own_memory(), Event(), [0]

    def look() -> None:
        while not ended.wait(0.002):
            looks.append(own_memory())

    (watch := Thread(target=look)).start()
    model = sharded_base(folder, quant) if sharded else load_base(str(folder), quant, device="cpu")
    ended.set()
    watch.join()
    return held_bytes(model), max(looks) - before


@pytest.mark.full
def test_no_rank_ever_holds_the_whole_base(wide, checkpoints):
    """Of two ranks: 0.55 of the parameters, and at the peak of loading three times the largest
    tensor above it."""
    shutil.copytree(checkpoints("llama"), wide.parent / "tiny", dirs_exist_ok=True)
    ((whole, _),) = values(in_ranks(1, in_a_group, loaded, wide, False))
    largest = 2 * 4096 * 1024  # the embedding
    for held, peak in values(in_ranks(2, in_a_group, loaded, wide, True)):
        assert held <= 0.55 * whole
        assert peak <= held + 3 * largest, (whole, held, peak)


def test_shards_are_gathered_forward_and_backward(checkpoints, few, tmp_path):
    """The shards of each decoder layer twice in each pass, of the embedding once; no gradient of
    the base."""
    settings: Any = {"max_steps": 3, "logging_steps": 100, "sharding": "fsdp"}
    base = checkpoints("llama", True)
    config = config_of(base, few, tmp_path / "run", **settings)
    for rank in values(in_ranks(2, sent_in_a_step, config)):
        gathered = [sent for name, sent in rank[1] if name.startswith("all_gather_")]
        model = AutoModelForCausalLM.from_pretrained(base)
        layer = sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim == 2) // 4
        embedding = model.get_input_embeddings().weight.nbytes // 2
        passes = config.gradient_accumulation_steps
        assert sorted(gathered) == sorted(passes * ([layer] * 4 + [embedding]))
        planned = Planner(replace(config, plan=True, gpus=2), device="cpu").plan()
        assert sum(gathered) * 2 == passes * planned.gathered_bytes
        assert [name for name, _ in rank[1] if "reduce" in name] == ["all_reduce"]


# ---- checkpoints, samples, failures


def outputs(folder: Path, quant: QuantConfig, sharded: bool, offload: bool = False) -> list[float]:
    model = (
        sharded_base(folder, quant, offload=offload)
        if sharded
        else load_base(str(folder), quant, device="cpu")
    )
    with torch.no_grad():
        return model(torch.arange(1, 9)[None]).logits[0, -1, :50].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("storage", axis("uint8", "bfloat16"))
def test_4_bit_checkpoints_are_sharded(storage, checkpoints, tmp_path):
    """Also codes that are stored as another dtype, for FSDP in other programs."""
    base, stored = checkpoints("llama"), getattr(torch, storage)
    settings: Any = {"bnb_4bit_compute_dtype": torch.float32, "bnb_4bit_quant_storage": stored}
    in_4_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, **settings
    )
    whole: Any = {"device_map": "cpu", "dtype": torch.float32, "quantization_config": in_4_bits}
    AutoModelForCausalLM.from_pretrained(base, **whole).save_pretrained(tmp_path / "4 bits")
    quant = QuantConfig(compute_dtype="fp32")
    wanted = outputs(base, quant, False)
    for found in values(in_ranks(2, in_a_group, outputs, tmp_path / "4 bits", quant, True)):
        assert found == pytest.approx(wanted, abs=1e-6)


@pytest.mark.full
def test_shards_in_host_memory_compute_the_same(checkpoints):
    base, quant = checkpoints("llama"), QuantConfig(compute_dtype="fp32")
    wanted = outputs(base, quant, False)
    for found in values(in_ranks(2, in_a_group, outputs, base, quant, True, True)):
        assert found == pytest.approx(wanted, abs=1e-6)


def test_answers_of_a_sharded_model(checkpoints, few, tmp_path):
    settings: Any = {"samples": 2, "max_steps": 2}
    config = config_of(checkpoints("llama"), few, tmp_path / "two", sharding="fsdp", **settings)
    require_done(in_ranks(2, trained, config))
    alone = trained_alone(config, tmp_path / "one", 2)
    assert read_rows(tmp_path / "two" / "samples.jsonl") == read_rows(alone / "samples.jsonl")


def short_of_memory(config: TrainConfig) -> None:
    from qlora.training import ranks
    from qlora.training.trainer import AdapterTrainer

    one_pass = AdapterTrainer.one_pass

    def failing(self: Any, *given: Any, **named: Any) -> Any:
        if ranks.number() == 1 and self.state.global_step == 1:
            raise torch.OutOfMemoryError("in the forward pass")
        return one_pass(self, *given, **named)

    AdapterTrainer.one_pass = failing  # type: ignore[method-assign]
    trained(config)


def test_memory_that_runs_out_on_one_rank_ends_the_run(checkpoints, few, tmp_path):
    """Halves of a batch would be passes that the other ranks do not take part in."""
    config = config_of(checkpoints("llama"), few, tmp_path / "run", sharding="fsdp", max_steps=3)
    first, second = in_ranks(2, short_of_memory, config)
    assert "rank 1: memory ran out in step 2" in second.error and first.error != "it hangs"


@pytest.mark.parametrize(
    ("settings", "words"),
    [({}, ("--sharding fsdp is for several processes", "torchrun --nproc-per-node N")),
     ({"lora": LoraConfig(use_dora=True)}, ("use_dora needs the whole base", "ddp")),
     ({"lora": LoraConfig(init_lora_weights="pissa")}, ("init_lora_weights pissa", "ddp")),
     ({"lora": LoraConfig(bias="all")}, ("bias all needs the whole base", "ddp")),
     ({"task": "seq-cls"}, ("sharding fsdp needs task causal-lm or seq2seq",)),
     ({"offload_embedding": True}, ("offload_embedding needs the whole base", "ddp"))],
)  # fmt: skip
def test_what_cannot_be_sharded_is_refused(settings, words, checkpoints, few, tmp_path):
    from qlora.training import train

    with refuses(tmp_path / "run", *words):
        train(
            quick_config(checkpoints("llama"), few, tmp_path / "run", sharding="fsdp", **settings)
        )


def test_offloading_is_refused_without_shards():
    with pytest.raises(UserError, match="offload_base needs sharding fsdp"):
        TrainConfig("model", "run", DataConfig("rows"), offload_base=True)


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [False, True])
def test_two_gpus_with_a_shard_each_train_as_one_process(offload, checkpoints, few, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    settings: Any = {"sharding": "fsdp", "offload_base": offload}
    config = config_of(checkpoints("llama"), few, tmp_path / "two", **settings)
    cards = {"CUDA_VISIBLE_DEVICES": "0,1"}
    require_done(in_ranks(2, trained, config, **cards))
    require_close(tmp_path / "two", trained_alone(config, tmp_path / "one", 2, **cards))
