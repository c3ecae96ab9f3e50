"""AdapterTrainer against PEFT with plain Trainer; its optimizers, loggers and memory."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import conftest
import peft
import pytest
import torch
from chunks import chunks_of
from conftest import FP32, adapted_model, pefts_parameters, quick_config, tiny_tokenizer, token_ids
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from simulated_device import LateCopies
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import set_seed

from qlora import (
    DataConfig,
    LoraConfig,
    UserError,
    load_adapter,
    load_base,
    merge_and_unload,
    save_adapter,
)
from qlora.adapters.files import parameters_by_file_name
from qlora.adapters.lora import lora_layers
from qlora.data.batches import collator
from qlora.data.rows import prepare_data
from qlora.fast.head import LazyLogits
from qlora.fast.offload import offload_activations
from qlora.training import prepare_for_training, train
from qlora.training.optimizers import MasterWeights
from qlora.training.trainer import AdapterTrainer, make_trainer


@pytest.fixture(scope="module")
def rows(data):
    return prepare_data(str(data), tiny_tokenizer(), max_length=128)[0]


def peft_twin(model: torch.nn.Module, folder: Path, base: Path) -> Any:
    """PEFT's model of the same base with the same adapter weights."""
    save_adapter(model, folder)
    return peft.PeftModel.from_pretrained(load_base(str(base), FP32), folder, is_trainable=True)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("family", conftest.FAMILIES)
def test_logits_and_gradients_are_pefts(family, use_dora, checkpoints, tmp_path):
    base = checkpoints(family)
    model = adapted_model(base, LoraConfig(r=4, lora_alpha=8, use_dora=use_dora))
    twin = peft_twin(model, tmp_path / "adapter", base)
    ids = token_ids()
    ours, theirs = model(ids, labels=ids), twin(input_ids=ids, labels=ids)
    assert (ours.logits - theirs.logits).abs().max() <= 1e-5
    ours.loss.backward()
    theirs.loss.backward()
    parameters, wanted = parameters_by_file_name(model, "default"), pefts_parameters(twin)
    assert parameters.keys() == wanted.keys()
    for name, parameter in parameters.items():
        assert wanted[name].grad.abs().max() > 0
        assert (parameter.grad - wanted[name].grad).abs().max() <= 1e-5, name
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in parameters.values()}


def test_20_steps_are_pefts(checkpoints, tmp_path, rows):
    """PEFT and plain Trainer with the same seed, data and optimizer: the same losses, to 1e-3."""
    base, tokenizer = checkpoints("llama"), tiny_tokenizer()
    model = adapted_model(base)
    twin = peft_twin(model, tmp_path / "adapter", base)
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 20,
        "learning_rate": 5e-3, "optim": "adamw_torch", "logging_steps": 1, "seed": 7,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False, "label_names": ["labels"],
    }  # fmt: skip
    curves = []
    for trainer_class, trained in ((AdapterTrainer, model), (Trainer, twin)):
        set_seed(7)
        trainer = trainer_class(
            model=trained,
            args=TrainingArguments(output_dir=str(tmp_path / "out"), **arguments),
            train_dataset=rows,
            data_collator=collator(tokenizer),
        )
        trainer.train()
        curves.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    ours, theirs = curves
    assert len(ours) == len(theirs) == 20
    assert ours[-1] < ours[0] - 0.1  # two curves that learn nothing would agree as well
    assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_first_token_of_a_text_is_not_counted(family, checkpoints, tmp_path):
    """The logged loss is the mean over the predicted tokens of all rows, each row alone; also of a
    family for which transformers knows no loss_type."""
    base, tokenizer = checkpoints(family), tiny_tokenizer()
    path = conftest.write_rows(tmp_path / "rows.jsonl", [{"text": "ab" * n} for n in range(1, 5)])
    output = train(quick_config(base, path, tmp_path / "run", fast_path=False, max_steps=1))
    model, sums = load_base(str(base), FP32), torch.zeros(2)
    for row in prepare_data(str(path), tokenizer, max_length=128)[0]:
        ids = torch.tensor(row["input_ids"])
        logits = model(ids[None]).logits[0, :-1]  # (T - 1, vocab)
        loss = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
        sums += torch.tensor([loss.item(), len(ids) - 1])
    wanted = float(sums[0] / sums[1])
    assert conftest.losses(output)[0] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("how", ["alone", "flat", "padded", "packing", "seq2seq"])
def test_neftune_noise_is_that_of_each_row(how, checkpoints, tmp_path, data, monkeypatch):
    """Its largest values are close to alpha / sqrt(L d) with L tokens of the row, as if it were the
    only one of its batch (arXiv:2310.05914)."""
    alpha, compute_loss, shares = 5.0, AdapterTrainer.compute_loss, list[float]()

    def recorded(self: Any, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        def record(module: Any, args: Any, output: Any) -> None:
            noise = (output - module.weight[args[0]]).detach()  # (B, T, d)
            masks = inputs.get("attention_mask", torch.ones(noise.shape[:2]))
            positions = inputs.get("position_ids", torch.arange(noise.shape[1]).expand_as(masks))
            for values, mask, position in zip(noise, masks, positions, strict=True):
                starts = (position == 0).nonzero().flatten().tolist()
                for start, end in pairwise([*starts, int(mask.sum())]):
                    scale = alpha / ((end - start) * values.shape[-1]) ** 0.5
                    shares.append(float(values[start:end].abs().max()) / scale)

        source = model.get_encoder() if how == "seq2seq" else model
        with_noise = source.get_input_embeddings().register_forward_hook(record)
        try:
            return compute_loss(self, model, inputs, *rest, **named)
        finally:
            with_noise.remove()

    monkeypatch.setattr(AdapterTrainer, "compute_loss", recorded)
    settings: Any = {"per_device_train_batch_size": 1 if how == "alone" else 8, "max_steps": 1}
    settings |= {"data": DataConfig(str(data), max_length=128, packing=how == "packing")}
    settings |= {"fast_path": how != "padded", "trainer": {"neftune_noise_alpha": alpha}}
    if how == "seq2seq":
        settings["task"] = how
    base = checkpoints("t5" if how == "seq2seq" else "llama")
    train(quick_config(base, data, tmp_path / "run", **settings))
    assert len(shares) >= (1 if how == "alone" else 8)
    assert min(shares) > 0.95 and max(shares) <= 1 + 1e-5


@pytest.mark.parametrize("fast", [True, False])
def test_transformers_trainer_saves_the_adapter(fast, checkpoints, tmp_path):
    """And AdapterTrainer resumes from it."""
    base, rows = checkpoints("llama"), [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 8
    model = prepare_for_training(adapted_model(base), fast_path=fast)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, report_to="none", use_cpu=True, learning_rate=1e-2
    )
    before = {n: p.clone() for n, p in parameters_by_file_name(model, "default").items()}
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    after = parameters_by_file_name(model, "default")
    assert all(torch.equal(saved[name], after[name]) for name in after)
    assert not any(torch.equal(before[name], after[name]) for name in after)
    assert not list((tmp_path / "checkpoint-2").glob("model*.safetensors"))
    live = load_adapter(load_base(str(base), FP32), tmp_path / "checkpoint-2").eval()
    ids = token_ids()
    with torch.no_grad():
        torch.testing.assert_close(live(ids).logits, model.eval()(ids).logits + 0)

    arguments.max_steps = 3
    fresh = prepare_for_training(adapted_model(base), fast_path=fast)
    trainer = AdapterTrainer(fresh, args=arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 3

    plain = merge_and_unload(model)
    plain.save_pretrained(tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, plain.eval()(ids).logits)


@pytest.mark.parametrize("kind", ["non_padding", "all", "no"])
def test_tokens_are_counted_as_trainer_does_without_waiting_for_each_batch(
    kind, checkpoints, tmp_path, rows, monkeypatch
):
    """`item` waits for a GPU: as often in steps of four batches as in steps of one."""
    model, waits, items = adapted_model(checkpoints("llama")), [], Mock()
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: (items(), item(self))[1])
    for trainer_class, batches in ((AdapterTrainer, 1), (AdapterTrainer, 4), (Trainer, 4)):
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=batches,
            max_steps=2, logging_steps=9, save_strategy="no", report_to="none", use_cpu=True,
            include_num_input_tokens_seen=kind, optim="sgd", dataloader_pin_memory=False,
            label_names=["labels"], logging_nan_inf_filter=False,
        )  # fmt: skip
        model._hf_peft_config_loaded = True  # or else plain Trainer refuses a 4-bit model
        trainer = trainer_class(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=collator(tiny_tokenizer()),
        )
        items.reset_mock()
        trainer.train()
        waits.append((items.call_count, trainer.state.num_input_tokens_seen))
    (once, _), (four, ours), (_, plain) = waits
    assert ours == plain and (ours > 0) == (kind != "no")
    assert kind == "all" or four == once


def test_model_without_adapters_is_refused(checkpoints):
    with pytest.raises(UserError, match="no adapter to train"):
        AdapterTrainer(model=load_base(str(checkpoints("llama")), FP32))


@pytest.mark.parametrize("fast", conftest.axis(True, False))
def test_training_and_evaluation_materialize_no_logits(fast, checkpoints, tmp_path, data, rows):
    model = prepare_for_training(adapted_model(checkpoints("gemma")), fast_path=fast)
    config = quick_config(checkpoints("gemma"), data, tmp_path / "run")
    trainer = make_trainer(config, model, tiny_tokenizer(), rows, rows)
    trainer.compute_loss_func = loss = Mock(wraps=trainer.compute_loss_func)
    with chunks_of(8 * conftest.VOCAB):
        trainer.train()
        trainer.evaluate()
    logits = [call.args[0]["logits"] for call in loss.call_args_list]
    assert len(logits) == 4 + 10
    assert all((isinstance(x, LazyLogits) and x.value is None) is fast for x in logits)


def test_checkpointing_saves_memory_and_changes_nothing(checkpoints):
    runs = []
    for checkpointing in (True, False):
        model = adapted_model(checkpoints("llama"))
        prepare_for_training(model, gradient_checkpointing=checkpointing)
        keep = Mock(side_effect=lambda tensor: tensor)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(token_ids(), labels=token_ids()).loss
        loss.backward()
        gradient = model.model.layers[0].mlp.up_proj.lora_A["default"].grad
        weights = {p.data_ptr() for p in model.parameters()}
        saved = [call.args[0] for call in keep.call_args_list]
        sizes = [x.numel() for x in saved if x.data_ptr() not in weights]
        runs.append((loss.item(), gradient, sum(sizes)))
    (loss_on, gradient_on, saved_on), (loss_off, gradient_off, saved_off) = runs
    assert loss_on == loss_off
    assert torch.equal(gradient_on, gradient_off)
    assert saved_on < saved_off / 2


def test_a_family_without_checkpointing_is_refused_before_a_change(checkpoints, monkeypatch):
    model = adapted_model(checkpoints("llama"))
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    modules = dict(model.named_modules())
    with pytest.raises(UserError, match="has no gradient checkpointing: use --no-gradient-check"):
        prepare_for_training(model)
    assert dict(model.named_modules()) == modules
    prepare_for_training(model, gradient_checkpointing=False)


def test_offloaded_layer_inputs_train_the_same_adapter(quick_run, tmp_path, monkeypatch):
    monkeypatch.setattr("qlora.training.checks.require_gpu", lambda what: None)
    copies = LateCopies()
    offload = offload_activations(copies=copies, min_bytes=1, keep=1)
    monkeypatch.setattr("qlora.training.trainer.offload_activations", lambda: offload)
    settings: Any = {"offload_activations": True, "output_dir": str(tmp_path / "run")}
    folder = train(replace(quick_run.config, **settings, samples=0, report_to=()))
    assert copies.log and not copies.waiting
    conftest.require_same_adapter(folder, quick_run.folder)


@pytest.mark.parametrize("dtype", ["bf16", "auto"])
def test_bf16_adapters_keep_updates(dtype, checkpoints, tmp_path, data, rows, capsys, monkeypatch):
    """By fp32 master weights; a line is printed for an optimizer that cannot have them."""
    config = quick_config(checkpoints("llama"), data, tmp_path / "run")
    for known in (True, False):
        if not known:
            monkeypatch.setattr("qlora.training.optimizers.BY_PARAMETER", ())
        model = adapted_model(checkpoints("llama"), LoraConfig(r=4, adapter_dtype=dtype))
        trainer = make_trainer(config, model, tiny_tokenizer(), rows, None)
        in_bf16 = next(iter(lora_layers(model).values())).lora_A["default"].dtype == torch.bfloat16
        assert in_bf16 == (dtype == "bf16")
        assert isinstance(trainer.create_optimizer(), MasterWeights) == (known and in_bf16)
        line = "paged_adamw_8bit loses small updates of bf16 adapters"
        assert (line in capsys.readouterr().out) == (in_bf16 and not known)


def test_loraplus_rates_are_pefts(checkpoints, tmp_path, data, rows):
    model = adapted_model(checkpoints("llama"))
    config = quick_config(checkpoints("llama"), data, tmp_path / "out", loraplus_lr_ratio=16)
    optimizer = make_trainer(config, model, tiny_tokenizer(), rows, None).create_optimizer()
    twin = peft_twin(model, tmp_path, checkpoints("llama"))
    theirs = create_loraplus_optimizer(twin, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16)
    rates = []
    for groups, parameters in (
        (optimizer.param_groups, parameters_by_file_name(model, "default")),
        (theirs.param_groups, pefts_parameters(twin)),
    ):
        names = {id(p): name for name, p in parameters.items()}
        rates.append({names[id(p)]: group["lr"] for group in groups for p in group["params"]})
    assert rates[0] == rates[1] and set(rates[0].values()) == {0.01, 0.16}


def test_tensorboard_gets_every_row(quick_run):
    (folder,) = (quick_run.folder / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    rows = conftest.read_rows(quick_run.folder / "metrics.jsonl")
    names = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "peak_bytes")
    tags = {f"train/{name}": name for name in names} | {"eval/loss": "eval_loss"}
    assert len(rows) == 6
    for tag, name in tags.items():
        logged = [(row["step"], row[name]) for row in rows if name in row]
        scalars = [(event.step, event.value) for event in events.Scalars(tag)]
        # TensorBoard keeps fp32
        assert scalars == [(step, pytest.approx(x, rel=1e-6)) for step, x in logged], name
