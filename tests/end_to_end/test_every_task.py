"""Tasks other than causal language modelling: train, resume, open with PEFT, merge."""

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
    FP32,
    RECORDS,
    axis,
    losses,
    quick_config,
    require_same_adapter,
    tiny_tokenizer,
    token_ids,
    write_rows,
)
from merging import refused, run_merge
from safetensors.torch import load_file

from qlora import DataConfig, LoraConfig, UserError, load_adapter, load_base
from qlora.adapters.live import resolve_model
from qlora.apps.evaluation import evaluate
from qlora.base.load import share_pad
from qlora.base.modules import auto_class, state_of
from qlora.config import ChatConfig, EvaluateConfig
from qlora.config.tasks import TASKS
from qlora.data import collator
from qlora.files import read_metrics
from qlora.training import train

# PEFT computes B A x in the same order as we do; a merge in another. Logits are below 10.
TOLERANCE = 1e-5
CASES = {  # (base, task) -> modules that are trained in full
    ("t5", "seq2seq"): [],
    ("bert without pooler", "seq-cls"): ["classifier", "bert.pooler"],
    ("llama without pad", "seq-cls"): ["score"],
    ("roberta", "token-cls"): ["classifier"],
    # every night
    ("bart", "seq2seq"): [],
    ("bert", "seq-cls"): ["classifier"],
    ("bert without prefix", "seq-cls"): ["classifier"],
    ("modernbert", "seq-cls"): ["head", "classifier"],
    ("gpt2", "seq-cls"): ["score"],
    ("llama", "token-cls"): ["score"],
}
LABELS = {"seq2seq": [], "seq-cls": ["neg", "pos"], "token-cls": ["B-L", "B-P", "I-P", "O"]}
# At a rate of 2e-2 Adam reaches a loss of 0 in eight steps, and then overshoots to above the first.
TEN_STEPS = {
    "max_steps": 10, "gradient_accumulation_steps": 2, "samples": 1, "learning_rate": 5e-3,
}  # fmt: skip


def run(base: Path, task: str, folder: Path, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    data = write_rows(folder / "data.jsonl", map(RECORDS[task], range(24)))
    both = DataConfig(str(data), eval_data=str(data), max_length=64)
    settings = {"learning_rate": 2e-2, "max_steps": 1} | settings
    return train(quick_config(base, data, folder / "run", task=task, data=both, **settings))


@pytest.fixture(scope="module")
def trained(checkpoints, tmp_path_factory):
    """`trained(family, task)`: folder and printed lines of a run of TEN_STEPS, trained once."""

    @cache
    def run_once(family: str, task: str) -> tuple[Path, str]:
        with redirect_stdout(StringIO()) as printed:
            output = run(checkpoints(family), task, tmp_path_factory.mktemp("run"), **TEN_STEPS)
        return output, printed.getvalue()

    return run_once


def load(base: Path, task: str) -> Any:
    model = load_base(str(base), FP32, task=task, labels=LABELS[task])
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0
    return model


def merged_model(adapter: Path, output: Path, task: str, **settings: Any) -> Any:
    run_merge(adapter, output, format="fp32", **settings)
    model, info = auto_class(TASKS[task]).from_pretrained(output, output_loading_info=True)
    assert not any(info.values()), info
    return model


def logits(model: Any, task: str) -> torch.Tensor:
    """Logits of three rows; the second ends in pads."""
    ids = token_ids(rows=3)
    mask = torch.ones_like(ids)
    ids[1, 8:], mask[1, 8:] = model.config.get_text_config().pad_token_id, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if task == "seq2seq":
        inputs["decoder_input_ids"] = token_ids(rows=3, length=5, seed=1)
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize(
    ("family", "task"),
    [pytest.param(*case, marks=[pytest.mark.full] * (i > 3)) for i, case in enumerate(CASES)],
)
def test_train_open_merge(family, task, trained, checkpoints, tmp_path, capsys):
    base, in_full = checkpoints(family), CASES[family, task]
    folder, printed = trained(family, task)

    assert losses(folder)[-1] < 0.95 * losses(folder)[0]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == TASKS[task].task_type
    assert sorted(config["modules_to_save"] or []) == sorted(in_full)
    assert (folder / "samples.jsonl").exists() == (task == "seq2seq")
    if in_full:
        evals = [row for row in read_metrics(folder) if "eval_loss" in row]
        assert all(0 < row["eval_accuracy"] <= 1 for row in evals)
        assert "accuracy" in printed and ("F1" in printed) == (task == "token-cls")
        recorded = yaml.safe_load((folder / "run.yaml").read_text())
        assert recorded["base"]["labels"] == LABELS[task]
        card = (folder / "README.md").read_text()
        assert f'task="{task}", labels={LABELS[task]!r}' in card

    live = load_adapter(load(base, task), folder)
    twin = peft.PeftModel.from_pretrained(load(base, task), folder)
    assert type(twin) is peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[TASKS[task].task_type]
    expected = logits(live, task)
    assert (logits(twin, task) - expected).abs().max() <= TOLERANCE

    merged = merged_model(folder, tmp_path / "merged", task)
    assert f"{TASKS[task].auto_class}.from_pretrained(" in capsys.readouterr().out
    assert type(merged) is type(live)
    assert merged.config.get_text_config().pad_token_id is not None
    if in_full:
        assert list(merged.config.id2label.values()) == LABELS[task]
    assert (logits(merged, task) - expected).abs().max() <= TOLERANCE


def with_pad(base: Path, folder: Path, pad: int | None) -> Path:
    """A copy of the checkpoint, whose config.json names another pad than its tokenizer (0)."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": pad}))
    return folder


@pytest.mark.parametrize(("family", "pad"), [("llama", -1), ("llama", 2), ("gpt2", None)])
def test_a_classifier_reads_no_padding(family, pad, checkpoints, tmp_path):
    """A text alone has the logits that it has beside a longer one, wherever the model is opened."""
    base = with_pad(checkpoints(family), tmp_path / "base", pad)
    adapter = run(base, "seq-cls", tmp_path, max_steps=1)
    live = load_adapter(
        load_base(str(base), FP32, task="seq-cls", labels=LABELS["seq-cls"]), adapter
    )
    resolved = resolve_model(ChatConfig(adapter=str(adapter), compute_dtype="fp32"))
    merged = merged_model(adapter, tmp_path / "merged", "seq-cls")
    rows = [{"input_ids": [5, 6, 7], "labels": 0}, {"input_ids": [8] * 12, "labels": 1}]
    collate = collator(tiny_tokenizer(), "seq-cls")
    for model in (live, resolved.load(), merged):
        assert model.config.pad_token_id == 0
        with torch.no_grad():
            alone = model.eval()(input_ids=torch.tensor([[5, 6, 7]])).logits[0]
            both = model(**collate(rows)).logits[0]
        torch.testing.assert_close(alone, both)


def test_evaluation_of_a_whole_classifier_reads_no_padding(checkpoints, tmp_path):
    adapter = run(checkpoints("llama"), "seq-cls", tmp_path, max_steps=1)
    run_merge(adapter, tmp_path / "merged", format="fp32")
    other = with_pad(tmp_path / "merged", tmp_path / "other", -1)
    data = str(tmp_path / "data.jsonl")
    losses = [
        evaluate(EvaluateConfig(data=data, model=str(folder)))["scores"]["model"]["loss"]
        for folder in (tmp_path / "merged", other)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_encoders_keep_the_pad_from_which_they_count_positions(checkpoints):
    model = load_base(str(checkpoints("roberta")), FP32, task="seq-cls", labels=["a", "b"])
    share_pad(model, 0)
    assert model.config.pad_token_id == 1 and state_of(model).pad_token_id is None


def test_micro_batches_are_one_step(checkpoints, tmp_path):
    """Rows have different numbers of labels: 1 x 4 and 4 x 1 rows are the same steps."""
    # without dropout, which draws other numbers for other batches
    base = shutil.copytree(checkpoints("llama"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "classifier_dropout": 0.0}))
    # grouping by length orders rows by the size of a batch
    settings: Any = {"max_steps": 3, "trainer": {"train_sampling_strategy": "sequential"}}
    curves = []
    for size in (1, 4):
        settings |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        curves.append(losses(run(base, "token-cls", tmp_path / str(size), **settings)))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_merge_of_pefts_classifier(checkpoints, tmp_path):
    """PEFT does not save the labels; their number is that of the head's rows."""
    base = checkpoints("bert")
    torch.manual_seed(0)
    model = load_base(str(base), FP32, task="seq-cls", labels=("a", "b", "c"))
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    adapter, output = tmp_path / "adapter", tmp_path / "merged"
    merged = merged_model(adapter, output, "seq-cls", base_model=str(base))
    assert merged.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert (logits(merged, "seq-cls") - logits(model, "seq-cls")).abs().max() <= TOLERANCE


def test_merge_to_4_bits_without_verify(trained, checkpoints, tmp_path):
    family, task, output = "bert without pooler", "seq-cls", tmp_path / "merged"
    folder, _ = trained(family, task)
    match = r"--verify needs a causal language model.* is for seq-cls"
    refused(folder, output, match, verify=str(folder.parent / "data.jsonl"))
    run_merge(folder, output, format="nf4")
    merged = load_base(str(output), FP32, task=task)
    live = load_adapter(load(checkpoints(family), task), folder)
    # NF4 rounds by up to 16 % of a block's largest weight; in a tiny model little averages out
    assert (logits(merged, task) - logits(live, task)).abs().max() < 0.2
    assert type(merged.classifier) is torch.nn.Linear
    assert state_of(merged).labels == tuple(LABELS[task])


@pytest.mark.parametrize("init", axis("eva", "pissa"))
@pytest.mark.parametrize("family", axis("t5", "bert"))
def test_other_initialisations(family, init, checkpoints, tmp_path):
    """EVA runs the model over rows of the task, PiSSA reads its weights."""
    task = "seq2seq" if family == "t5" else "seq-cls"
    base, lora = checkpoints(family), LoraConfig(r=2, init_lora_weights=init)
    folder = run(base, task, tmp_path, lora=lora)
    merged = merged_model(folder, tmp_path / "merged", task)
    live = load_adapter(load(base, task), folder)
    assert (logits(merged, task) - logits(live, task)).abs().max() <= TOLERANCE


def test_run_resumed_in_a_later_epoch_equals_the_whole_run(trained, checkpoints, tmp_path):
    """Its head and the order of the epoch's rows are restored."""
    base, (whole, _) = checkpoints("llama without pad"), trained("llama without pad", "seq-cls")
    parts = shutil.copytree(whole.parent, tmp_path / "parts")
    shutil.rmtree(parts / "run" / "checkpoint-10")  # back to step 8
    resumed = run(base, "seq-cls", parts, **TEN_STEPS, resume=True)
    assert "base_model.model.score.weight" in load_file(whole / "adapter_model.safetensors")
    require_same_adapter(resumed, whole)
    assert losses(resumed) == losses(whole)


def test_adapter_of_other_labels_is_refused(trained, checkpoints):
    folder, _ = trained("llama without pad", "seq-cls")
    base = str(checkpoints("llama without pad"))
    with pytest.raises(UserError, match="its labels are neg, pos, those of the model x, y"):
        load_adapter(load_base(base, FP32, task="seq-cls", labels=("x", "y")), folder)
    with pytest.raises(UserError, match=r"score\.weight is no parameter of this model"):
        load_adapter(load_base(base, FP32), folder)


def test_labels_of_a_trained_classifier_keep_their_numbers(checkpoints, tmp_path):
    base, names = shutil.copytree(checkpoints("bert"), tmp_path / "base"), ["pos", "other", "neg"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    auto_class(TASKS["seq-cls"]).from_pretrained(base, **labels).save_pretrained(base)
    folder = run(base, "seq-cls", tmp_path)
    assert yaml.safe_load((folder / "run.yaml").read_text())["base"]["labels"] == names
