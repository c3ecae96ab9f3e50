"""Tasks other than causal language modelling: train, open with PEFT, merge, for each kind."""

import json
import shutil
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from conftest import (
    ENCODER,
    FP32,
    axis,
    losses,
    quick_config,
    read_rows,
    require_same_adapter,
    tiny_tokenizer,
    token_ids,
    write_rows,
)
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from qlora import load_adapter, load_base
from qlora.base.modules import auto_class, state_of
from qlora.config import DataConfig, LoraConfig, MergeConfig
from qlora.config.tasks import TASKS
from qlora.errors import UserError
from qlora.merge import merge
from qlora.training import train

# PEFT computes B A x in the same order as we do; a merge in another. Logits are below 10.
TOLERANCE = 1e-5
CASES = {  # base, task -> modules that are trained in full
    ("t5", "seq2seq"): [],
    ("bert without pooler", "seq-cls"): ["classifier", "bert.pooler"],
    ("llama without pad", "seq-cls"): ["score"],
    ("roberta", "token-cls"): ["classifier"],
}
MORE_CASES = {
    ("bart", "seq2seq"): [],
    ("bert", "seq-cls"): ["classifier"],
    ("bert without prefix", "seq-cls"): ["classifier"],
    ("modernbert", "seq-cls"): ["head", "classifier"],
    ("gpt2", "seq-cls"): ["score"],
    ("llama", "token-cls"): ["score"],
}
LABELS = {"seq2seq": [], "seq-cls": ["neg", "pos"], "token-cls": ["B-L", "B-P", "I-P", "O"]}


def records(task: str) -> list[dict[str, Any]]:
    """What a tiny model learns within a few steps; rows of different lengths."""
    words, tags = ["I", "met", "Ann", "Lee", "in", "Rome"], ["O", "O", "B-P", "I-P", "O", "B-L"]
    record = {
        "seq2seq": lambda i: {"prompt": f"say {i % 3}", "completion": "one two three"[: 3 + i % 9]},
        "seq-cls": lambda i: {"text": ("good " if i % 2 else "bad ") * (1 + i % 4),
                              "label": "pos" if i % 2 else "neg"},
        "token-cls": lambda i: {"tokens": words[: 3 + i % 4], "tags": tags[: 3 + i % 4]},
    }[task]  # fmt: skip
    return [record(i) for i in range(24)]


def run(base: Path, task: str, folder: Path, **settings: Any) -> Path:
    """A short run on a few records."""
    data = write_rows(folder / "data.jsonl", records(task))
    both = DataConfig(str(data), eval_data=str(data), max_length=64)
    ours: Any = {"task": task, "data": both, "learning_rate": 2e-2, "max_steps": 1}
    return train(quick_config(base, data, folder / "run", **ours | settings))


@pytest.fixture(scope="module")
def trained(checkpoints, tmp_path_factory):
    """`trained(family, task)`: folder and output of a run of ten steps, made once."""

    @cache
    def ended(family: str, task: str) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp("run")
        more = {"max_steps": 10, "gradient_accumulation_steps": 2, "samples": 1}
        with redirect_stdout(StringIO()) as said:
            output = run(checkpoints(family), task, folder, **more)
        return output, said.getvalue()

    return ended


def load(base: Path, task: str) -> Any:
    return load_base(str(base), FP32, task=task, labels=LABELS[task])


def logits(model: Any, task: str) -> torch.Tensor:
    """Of rows of which one has pads."""
    ids = token_ids(rows=3)
    mask = torch.ones_like(ids)
    pad = model.config.get_text_config().pad_token_id
    ids[1, 8:], mask[1, 8:] = pad, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if task == "seq2seq":
        inputs["decoder_input_ids"] = token_ids(rows=3, length=5, seed=1)
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize(
    ("family", "task"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.full) for case in MORE_CASES)],
)
def test_train_open_merge(family, task, trained, checkpoints, tmp_path, capsys):
    base, in_full = checkpoints(family), (CASES | MORE_CASES)[family, task]
    folder, said = trained(family, task)

    rows = read_rows(folder / "metrics.jsonl")
    assert losses(folder)[-1] < 0.95 * losses(folder)[0]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == TASKS[task].task_type
    assert sorted(config["modules_to_save"] or []) == sorted(in_full)
    assert (folder / "samples.jsonl").exists() == (task == "seq2seq")
    if in_full:
        assert all(0 < row["eval_accuracy"] <= 1 for row in rows if "eval_loss" in row)
        assert "accuracy" in said and ("F1" in said) == (task == "token-cls")
        recorded = yaml.safe_load((folder / "run.yaml").read_text())
        assert recorded["base"]["labels"] == LABELS[task]
        card = (folder / "README.md").read_text()
        assert f'task="{task}", labels={LABELS[task]!r}' in card

    live, twin = load_adapter(load(base, task), folder), load(base, task)
    for model in (live, twin):
        if model.config.pad_token_id is None:
            model.config.pad_token_id = 0
    twin = peft.PeftModel.from_pretrained(twin, folder)
    assert type(twin) is peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[TASKS[task].task_type]
    expected = logits(live, task)
    assert (logits(twin, task) - expected).abs().max() <= TOLERANCE

    merge(MergeConfig(str(folder), str(tmp_path / "merged"), format="fp32"))
    assert f"{TASKS[task].auto_class}.from_pretrained(" in capsys.readouterr().out
    merged, info = auto_class(TASKS[task]).from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(merged) is type(live)
    assert merged.config.get_text_config().pad_token_id is not None
    if in_full:
        assert list(merged.config.id2label.values()) == LABELS[task]
    assert (logits(merged, task) - expected).abs().max() <= TOLERANCE


def test_micro_batches_are_one_step(checkpoints, tmp_path):
    """Rows have one label or a few: 1 x 8 and 8 x 1 rows are the same steps."""
    base = tmp_path / "base"  # without dropout, which draws anew for each batch
    shutil.copytree(checkpoints("llama"), base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "classifier_dropout": 0.0}))
    curves = []
    for size in (1, 8):
        (tmp_path / str(size)).mkdir()
        folder = run(
            base,
            "token-cls",
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            max_steps=4,
            # grouping by length orders rows by the size of a batch
            trainer={"train_sampling_strategy": "sequential"},
        )
        curves.append(losses(folder))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_merge_of_a_pefts_classifier(checkpoints, tmp_path):
    """PEFT does not say the labels; the head's rows tell how many there are."""
    base = checkpoints("bert")
    torch.manual_seed(0)
    model = load_base(str(base), FP32, task="seq-cls", labels=("a", "b", "c"))
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"],
                               init_lora_weights=False)  # fmt: skip
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    output = tmp_path / "merged"
    merge(MergeConfig(str(tmp_path / "adapter"), str(output), base_model=str(base), format="fp32"))
    merged = auto_class(TASKS["seq-cls"]).from_pretrained(output)
    assert merged.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert (logits(merged, "seq-cls") - logits(model, "seq-cls")).abs().max() <= TOLERANCE


def test_merge_to_4_bits_and_what_it_cannot_measure(trained, checkpoints, tmp_path):
    family, task, output = "bert without pooler", "seq-cls", str(tmp_path / "merged")
    folder, _ = trained(family, task)
    with pytest.raises(UserError, match=r"--verify needs a causal language model.* is for seq-cls"):
        merge(MergeConfig(str(folder), output, verify=str(folder.parent / "data.jsonl")))
    assert not Path(output).exists()
    merge(MergeConfig(str(folder), output, format="nf4"))
    merged = load_base(output, FP32, task=task)
    live = load_adapter(load(checkpoints(family), task), folder)
    # NF4 rounds each weight by up to 16 % of its block's largest; a tiny model averages out little
    assert (logits(merged, task) - logits(live, task)).abs().max() < 0.2
    assert type(merged.classifier) is torch.nn.Linear
    assert state_of(merged).labels == tuple(LABELS[task])


@pytest.mark.parametrize("start", axis("pissa", "eva"))
@pytest.mark.parametrize(("family", "task"), [("t5", "seq2seq"), ("bert", "seq-cls")])
def test_other_starts(family, task, start, checkpoints, tmp_path):
    """EVA runs the model over rows of the task, PiSSA reads its weights."""
    base, lora = checkpoints(family), LoraConfig(r=2, init_lora_weights=start)
    folder = run(base, task, tmp_path, lora=lora)
    merge(MergeConfig(str(folder), str(tmp_path / "merged"), format="fp32"))
    live = load_adapter(load(base, task), folder)
    merged = auto_class(TASKS[task]).from_pretrained(tmp_path / "merged")
    assert (logits(merged, task) - logits(live, task)).abs().max() <= TOLERANCE


def test_run_is_resumed_with_its_head(checkpoints, tmp_path):
    """Two steps and two more end where four do."""
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    base = checkpoints("llama")
    whole = run(base, "seq-cls", tmp_path / "whole", max_steps=4)
    run(base, "seq-cls", tmp_path / "parts", max_steps=2)
    parts = run(base, "seq-cls", tmp_path / "parts", max_steps=4, resume=True)
    assert "base_model.model.score.weight" in load_file(whole / "adapter_model.safetensors")
    require_same_adapter(parts, whole)


def test_adapter_of_other_labels_is_refused(trained, checkpoints):
    folder, _ = trained("llama without pad", "seq-cls")
    base = str(checkpoints("llama without pad"))
    message = "its labels are neg, pos, those of the model x, y, z"
    with pytest.raises(UserError, match=message):
        load_adapter(load_base(base, FP32, task="seq-cls", labels=("x", "y", "z")), folder)
    with pytest.raises(UserError, match=r"score\.weight is no parameter of this model"):
        load_adapter(load_base(base, FP32), folder)


def test_labels_of_a_trained_classifier_keep_their_places(tmp_path):
    names = {0: "pos", 1: "other", 2: "neg"}
    label2id = {name: i for i, name in names.items()}
    config = BertConfig(**ENCODER, id2label=names, label2id=label2id)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    folder = run(tmp_path / "base", "seq-cls", tmp_path)
    recorded = yaml.safe_load((folder / "run.yaml").read_text())
    assert recorded["base"]["labels"] == ["pos", "other", "neg"]
