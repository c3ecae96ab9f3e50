"""What SECURITY.md promises of files from outside, and messages that no terminal obeys."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import refuses
from safetensors.torch import load_file, save_file

from qlora import load_base
from qlora.adapters.format import CONFIG, WEIGHTS, read_adapter
from qlora.base.checkpoint import Checkpoint, resolve
from qlora.base.load import load_tokenizer
from qlora.cli import parse
from qlora.config import LoraConfig, TrainConfig
from qlora.errors import UserError
from qlora.files import read_json, read_yaml
from qlora.training.checkpoints import read_state


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def base(checkpoints, tmp_path):
    return shutil.copytree(checkpoints("llama"), tmp_path / "base")


@pytest.fixture
def adapter(adapters, tmp_path):
    return shutil.copytree(adapters("llama"), tmp_path / "adapter")


class Evil:
    """A pickle of it creates a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def run_command_in(message, folder, monkeypatch):
    """Run the Python that a message tells, in this process."""
    monkeypatch.chdir(folder)
    exec(re.search(r"python -c '(.*)'", message)[1], {})


def test_a_pickled_adapter_is_refused_with_a_command_that_converts_it(
    adapter, tmp_path, monkeypatch
):
    tensors = load_file(adapter / WEIGHTS)
    (adapter / WEIGHTS).unlink()
    torch.save({**tensors, "evil": Evil(tmp_path / "ran")}, adapter / "adapter_model.bin")
    with refuses(adapter, "adapter_model.bin is a pickle and is not opened"):
        read_adapter(adapter)
    with pytest.raises(UserError) as error:
        read_adapter(adapter)
    with pytest.raises(pickle.UnpicklingError):
        run_command_in(str(error.value), adapter, monkeypatch)
    assert not (tmp_path / "ran").exists()
    torch.save(tensors, adapter / "adapter_model.bin")
    run_command_in(str(error.value), adapter, monkeypatch)
    assert read_adapter(adapter).tensors.keys() == tensors.keys()


def test_a_pickled_model_is_refused_with_a_command_that_converts_it(base, monkeypatch):
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(tensors, base / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"Pickled weights .* are not opened") as error:
        resolve(str(base))
    run_command_in(str(error.value), base, monkeypatch)
    assert Checkpoint.open(str(base)).tensors.keys() == tensors.keys()


def test_pickles_named_as_safetensors_are_not_read(adapter, tmp_path):
    for path, read in (
        (adapter / WEIGHTS, lambda p: read_adapter(p.parent)),
        (tmp_path / "x", read_state),
    ):
        torch.save({"a": Evil(tmp_path / "ran")}, path)
        with pytest.raises(UserError, match="damaged"):
            read(path)
    assert not (tmp_path / "ran").exists()


CODE = "from pathlib import Path\nPath({!r}).touch()\n"


def test_code_of_a_repository_does_not_run_unless_asked(base, tmp_path):
    ran = tmp_path / "ran"
    (base / "own.py").write_text(CODE.format(str(ran)) + "class Config: pass\nclass Model: pass\n")
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    change_json(base / "config.json", model_type="own", auto_map=own)
    change_json(
        base / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["own.Model", None]},
        tokenizer_class="Own",
    )
    for load in (lambda: load_base(str(base)), lambda: load_tokenizer(base)):
        with pytest.raises(
            UserError, match=r"code of its own, which is not run.*--trust-remote-code"
        ):
            load()
    assert not ran.exists()


def test_a_recipe_cannot_ask_for_code_of_a_repository(tmp_path):
    recipe = tmp_path / "a.yaml"
    recipe.write_text("model: m\noutput_dir: o\ndata: d\ntrust_remote_code: true\n")
    with pytest.raises(UserError, match=r"a\.yaml: trust_remote_code, .*give --trust-remote-code"):
        parse(TrainConfig, ["--config", str(recipe)], prog="x")
    assert parse(
        TrainConfig, ["--config", str(recipe), "--trust-remote-code"], prog="x"
    ).trust_remote_code


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_config_json_cannot_name_a_kernel_of_the_hub(name, base):
    change_json(base / "config.json", **{name: "someone/kernel"})
    with refuses(base, f"{name} names a kernel of the hub, whose code would run"):
        load_base(str(base))


def test_links_out_of_a_folder_are_refused_and_those_of_the_hubs_cache_followed(
    base, adapter, tmp_path
):
    cache = tmp_path / "models--a--b"
    (cache / "snapshots").mkdir(parents=True)
    base = base.rename(cache / "snapshots" / "abc")
    (cache / "blobs").mkdir()
    for path in [*base.iterdir()]:
        (path.rename(cache / "blobs" / f"hash-{path.name}"))
        path.symlink_to(Path("../../blobs") / f"hash-{path.name}")
    load_base(str(base))
    load_tokenizer(base)
    secret = tmp_path / "secret"
    secret.write_text("{}")
    for folder, read in (
        (base, lambda f: Checkpoint.open(str(f))),
        (base, load_tokenizer),
        (adapter, read_adapter),
    ):
        for name in ("additional_chat_templates/tool.jinja", "vocab.json"):
            (folder / name).unlink(missing_ok=True)
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).symlink_to(secret)
            with refuses(folder, f"{name} is a link to {secret}, which is outside of its folder"):
                read(folder)
            (folder / name).unlink()


def test_sizes_are_checked_before_memory_is_taken(base):
    for name, value in (
        ("vocab_size", 10**12), ("vocab_size", 2**31), ("num_hidden_layers", 10**6),
        ("num_labels", 10**9), ("head_dim", 2**30),
    ):  # fmt: skip
        path = base / "config.json"
        text = path.read_text()
        change_json(path, **{name: value})
        with pytest.raises(UserError, match=r"must be at most|lacks \d+ tensors of its model"):
            load_base(str(base))
        path.write_text(text)


def test_records_of_4_bit_weights_must_fit_their_tensors(checkpoints, tmp_path):
    """bitsandbytes would read beyond the end of a shorter absmax."""
    load_base(str(checkpoints("llama"))).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    good, name = load_file(path), "model.layers.0.mlp.up_proj.weight"
    mark = f"{name}.quant_state.bitsandbytes__nf4"
    record = json.loads(bytes(good[mark].tolist()))
    faults = {"absmax has": {f"{name}.absmax": good[f"{name}.absmax"][:5].clone()}}
    for key, value in (
        ("shape", [2**40, 64]),
        ("shape", [64]),
        ("blocksize", 1),
        ("nested_offset", "x"),
        ("dtype", "load"),
    ):
        text = json.dumps(record | {key: value}).encode()
        faults[f"{key} {value}"] = {mark: torch.tensor([*text], dtype=torch.uint8)}
    for change in faults.values():
        save_file(good | change, path, metadata={"format": "pt"})
        with pytest.raises(UserError, match=rf"{name}.*(must be|has)"):
            load_base(str(tmp_path))


LAUGHS = "a0: &a0 [x]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, "its aliases stand for too many values"),
        ("a: &a [*a]", "its aliases stand for too many values"),
        ("a: 1\nb: {c: 1, c: 2}", "c is set twice"),
        ("[" * 100_000, "is nested too deeply"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: !!timestamp x", "is not YAML"),
        ("x" * (2 << 20), "too many for settings"),
    ],
    ids=str.__len__,
)
def test_yaml_makes_plain_values_only_and_no_more_than_its_text_has(text, said):
    with pytest.raises(UserError, match=rf"a\.yaml.*{said}"):
        read_yaml("a.yaml", text)
    assert read_yaml("a.yaml", "a: &a {b: 1}\nc: *a") == {"a": {"b": 1}, "c": {"b": 1}}


@pytest.mark.parametrize(
    "regex", ["(a+)+$", "(.*)*x", "(a|b|ab)*c.*", "(.|..)+x", ".*.*.*.*.*x", "a?" * 30 + "a" * 30]
)
def test_regular_expressions_that_take_long_are_refused(regex, adapter):
    change_json(adapter / CONFIG, target_modules=regex)
    with refuses(adapter, "repeats too often for a regular expression"):
        read_adapter(adapter)
    for fine in (
        r".*\.(q|v)_proj",
        r"(model\.)?layers\.\d+\..*",
        r".*layers\.(1[0-9]|2\d)\.(self_attn|mlp)\..*proj",
        r"(?:.*?(?:text).*?(?:attn|mlp).*?(?:q|v)_proj.*?)|(?:model\.layers\.[\d]{1,}\.(?:mlp))",
    ):
        assert LoraConfig(target_modules=fine).target_modules == fine


def test_messages_escape_what_a_terminal_obeys(tmp_path):
    error = UserError("a \x1b[31mname\x07 of\n\ttwo\u202e lines, é 漢")
    assert str(error) == r"a \x1b[31mname\x07 of two\u202e lines, é 漢"
    long = str(UserError("x" * 10_000 + ": give a shorter name"))
    assert len(long) <= 2000 and long.endswith(": give a shorter name")
    path = tmp_path / "\x1b]0;title\x07.json"
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"\\x1b\]0;title\\x07\.json is nested too deeply"):
        read_json(path)
