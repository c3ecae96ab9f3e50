"""Flags and recipes: the settings they give, and the one-line errors."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from qlora import __main__, __version__, cli
from qlora.config import (
    ChatConfig,
    DataConfig,
    EvaluateConfig,
    LoraConfig,
    MergeConfig,
    QuantConfig,
    ReportConfig,
    TrainConfig,
    flat,
    settings_of,
)
from qlora.errors import UserError

ROOT = Path(__file__).parents[1]
REQUIRED = ["--model", "base", "--output-dir", "out", "--data", "rows.jsonl"]


def parse(*words, config_class=TrainConfig):
    required = REQUIRED if config_class is TrainConfig else []
    return cli.parse(config_class, [*required, *words], prog="train.py")


def refused(*words, config_class=TrainConfig):
    """The error message for these words."""
    with pytest.raises(UserError) as error:
        parse(*words, config_class=config_class)
    return str(error.value)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes recipe.yaml into the working directory."""
    monkeypatch.chdir(tmp_path)
    return (tmp_path / "recipe.yaml").write_text


# ---- flags ----


def test_required_flags_are_enough():
    assert parse() == TrainConfig(model="base", output_dir="out", data=DataConfig("rows.jsonl"))


def test_nested_settings_are_flags_without_a_prefix():
    config = parse("--r", "8", "--quant-type", "fp4", "--max-length=512", "--save-steps", "20")
    assert (config.lora, config.quant) == (LoraConfig(r=8), QuantConfig(quant_type="fp4"))
    assert (config.data, config.save_steps) == (DataConfig("rows.jsonl", max_length=512), 20)


def test_dashes_and_underscores_are_the_same():
    assert parse("--lora_alpha", "8") == parse("--lora-alpha", "8") == parse("--lora_alpha=8")


def test_a_switch_is_turned_off_with_no():
    assert not parse("--no-double-quant").quant.double_quant
    assert parse("--no_double_quant", "--double_quant").quant.double_quant
    assert parse("--resume").resume


@pytest.mark.parametrize(
    ("words", "target_modules"),
    [
        (["q_proj", "v_proj"], ("q_proj", "v_proj")),
        (["q_proj,v_proj"], ("q_proj", "v_proj")),
        (["q_proj"], ("q_proj",)),
        (["all-linear"], "all-linear"),
        ([r".*\.[qv]_proj"], r".*\.[qv]_proj"),
        (["[q_proj, v_proj]"], ("q_proj", "v_proj")),
        (['["q_proj"]'], ("q_proj",)),
    ],
)
def test_a_list_is_words_or_commas_or_brackets(words, target_modules):
    assert parse("--target-modules", *words).lora.target_modules == target_modules


def test_numbers_and_none():
    config = parse("--learning-rate", "2e-4", "--max-steps", "-1", "--weight-decay", ".01")
    assert (config.learning_rate, config.max_steps, config.weight_decay) == (0.0002, -1, 0.01)
    assert parse("--layers-to-transform", "0,2", "3").lora.layers_to_transform == (0, 2, 3)
    assert parse("--layers-to-transform", "[0, 2]").lora.layers_to_transform == (0, 2)
    assert parse("--eval-data", "x", "--eval-data", "none").data.eval_data is None
    assert parse("--revision=-x=y").revision == "-x=y"
    assert parse("--init-lora-weights", "true").lora.init_lora_weights is True
    assert parse("--rank-pattern", "{q_proj: 8}").lora.rank_pattern == {"q_proj": 8}


def test_any_other_setting_goes_to_the_trainer():
    config = parse(
        *("--trainer.adam-beta2", "0.99", "--trainer.adam_epsilon=1e-8"),
        *("--trainer.bf16", "true", "--trainer.run_name", "one", "--trainer.x", "[1, -2]"),
        *("--trainer.start", "-1", "--trainer", "{run_name: two}"),
    )
    assert config.trainer == {
        **{"adam_beta2": 0.99, "adam_epsilon": 1e-8, "bf16": True},
        **{"run_name": "two", "x": [1, -2], "start": -1},
    }


def test_several_adapters_with_weights():
    words = ["--adapter", "a", "b", "--weights", "0.5", "-1e0", "--output-dir", "merged"]
    config = parse(*words, config_class=MergeConfig)
    assert config.adapters == {"a": 0.5, "b": -1.0}
    one = parse("--adapter", "my out", "--output-dir", "m", config_class=MergeConfig)
    assert one == MergeConfig(adapter=("my out",), output_dir="m")
    weights = [*words[:3], "--weights=0.5", *words[-2:]]
    assert "2 adapters, 1 weights" in refused(*weights, config_class=MergeConfig)


def test_a_positional_adapter():
    found = parse("out", "--merged", "m", config_class=ReportConfig)
    assert found == parse("--adapter=out", "--merged=m", config_class=ReportConfig)
    assert "unexpected more" in refused("out", "more", config_class=ReportConfig)


# ---- invalid flags ----


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--learnin-rate", "1"], ["--learnin-rate.", "Did you mean --learning-rate?"]),
        (["--learnin_rate=1"], ["--learnin-rate.", "Did you mean --learning-rate?"]),
        (["--lora-alph", "8"], ["--lora-alph.", "Did you mean --lora-alpha?"]),
        (["-r", "8"], ["unknown flag -r. Did you mean --r?"]),
        (["--doubl-quant", "--zzz", "1"], ["--double-quant?", "--zzz.", "--trainer.NAME VALUE"]),
        (["--r", "abc"], ["--r:", "a whole number", "'abc'"]),
        (["--r", "8.5"], ["--r:", "a whole number", "'8.5'"]),
        (["--r", "/a folder/" + "x" * 200], ["a whole number", "'/a folder/" + "x" * 200 + "'"]),
        (["--eval-steps", "few"], ["--eval-steps:", "a whole number", "'few'"]),
        (["--learning-rate", "fast"], ["--learning-rate:", "a number", "'fast'"]),
        (["--lora-alpha", "inf"], ["--lora-alpha:", "a number", "'inf'"]),
        (["--layers-to-transform", "1", "x"], ["--layers-to-transform:", "'x'"]),
        (["--report-to", "[a: }]"], ["--report-to", "is not YAML"]),
        (["--report-to", "[[a]]"], ["--report-to:", "[['a']]"]),
        (["--quant-type", "nf5"], ["quant_type", "nf4 or fp4", "'nf5'"]),
        (["--r"], ["--r needs a value", "--r=-"]),
        (["--r", "--resume"], ["--r needs a value"]),
        (["--config"], ["--config needs a value"]),
        (["--trainer.bf16"], ["--trainer.bf16 needs a value"]),
        (["--trainer.bf16", "{"], ["--trainer.bf16", "is not YAML"]),
        (["--trainer", "3"], ["--trainer:", "{NAME: VALUE}", "'3'"]),
        (["--config", "a", "--config", "b"], ["--config takes one recipe, got 2"]),
        (["--resume", "false"], ["unexpected false", "--no-NAME"]),
        (["--r", "8", "9"], ["unexpected 9"]),
        (["--r", "0"], ["r must be a whole number above 0, got 0"]),
        (["--learning-rate", "-1e-4"], ["learning_rate", "above 0", "-0.0001"]),
        (["--config", "no.yaml"], ["no.yaml: No such file or directory"]),
        (["--plan"], ["--plan", "not supported yet"]),
    ],
)
def test_an_invalid_flag_is_refused(words, parts):
    assert [part for part in parts if part not in refused(*words)] == []


def test_missing_flags_are_all_named():
    with pytest.raises(UserError, match=r"missing --output-dir, --data: .* --config"):
        cli.parse(TrainConfig, ["--model", "base"], prog="train.py")


def test_only_training_takes_trainer_settings():
    line = refused("--trainer.bf16", "true", config_class=MergeConfig)
    assert line == "unknown flag --trainer.bf16."


# ---- the recipe ----


def test_flags_override_a_recipe(recipe):
    recipe(
        "# 7B on 12 GB\nr: 8\nlora-alpha: 16\nlearning_rate: 1e-4\nrevision: 1.10\n"
        "double_quant: no\nreport_to: [tensorboard]\ntarget_modules: [q_proj]\neval_data:\n"
        "trainer: {adam_epsilon: 1e-8, bf16: true}\n"
    )
    config = parse("--config", "recipe.yaml", "--r", "4", "--trainer.bf16", "false")
    assert config == TrainConfig(
        model="base",
        output_dir="out",
        data=DataConfig("rows.jsonl"),
        lora=LoraConfig(r=4, lora_alpha=16, target_modules=("q_proj",)),
        quant=QuantConfig(double_quant=False),
        learning_rate=0.0001,
        revision="1.10",  # a tag, not the number 1.1
        report_to=("tensorboard",),
        trainer={"adam_epsilon": 1e-8, "bf16": False},
    )


def test_required_settings_from_a_recipe(recipe):
    recipe("model: base\noutput_dir: out\ndata: rows.jsonl\n")
    assert cli.parse(TrainConfig, ["--config", "recipe.yaml"], prog="train.py") == parse()


def test_a_run_yaml_of_an_earlier_version_is_a_recipe():
    """As write_run_file wrote it at commit 636288c."""
    words = ["--config", str(ROOT / "tests/run_636288c.yaml")]
    config = cli.parse(TrainConfig, words, prog="train.py")
    assert (config.model, config.data.data, config.revision) == ("base", "rows.jsonl", "1.10")
    assert (config.lora.r, config.lora.rank_pattern) == (4, {"q_proj": 8})
    assert config.learning_rate == 0.0005 and config.lora.target_modules == "all-linear"
    assert config.trainer == {"adam_epsilon": 1e-08} and not config.fast_path


def test_the_old_name_of_a_setting_still_works(recipe):
    recipe("loss_without_logits: false")
    assert not parse("--config", "recipe.yaml").fast_path


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lora_alhpa: 3\nzzz: 1", ["unknown key lora_alhpa.", "lora_alpha?", "unknown key zzz."]),
        ("r: abc", ["r: wanted a whole number, got 'abc'"]),
        ("r: [8, 16]", ["r: wanted a whole number", "8", "16"]),
        ("r: 8\nr: 16", ["r is set twice"]),
        ("lora_alpha: 8\nlora-alpha: 16", ["lora_alpha is set twice"]),
        ("resume: maybe", ["resume: wanted true or false, got 'maybe'"]),
        ("report_to: [[a]]", ["report_to: wanted a list", "[['a']]"]),
        ("trainer: bf16", ["trainer: wanted {NAME: VALUE}, got 'bf16'"]),
        ("[a]: 1", ["is not YAML"]),
        ("- r", ["name: value", "- r"]),
        ("", ["name: value", "''"]),
        ("r: 8\nseed: [1", ["line 2 is not YAML"]),
        ("model:\nr: 0", ["r must be a whole number above 0, got 0"]),
    ],
)
def test_an_invalid_recipe_is_refused(recipe, text, parts):
    recipe(text)
    line = refused("--config", "recipe.yaml")
    assert line.startswith("recipe.yaml")
    assert [part for part in parts if part not in line] == []


def test_a_flag_overrides_an_invalid_value_of_the_recipe(recipe):
    recipe("r: abc")
    assert parse("--config", "recipe.yaml", "--r", "8").lora.r == 8


# ---- round trip ----

names = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1).filter(
    lambda text: text.lower() not in ("none", "null")  # these mean None
)
plain_words = st.from_regex(r"[a-z_]{1,8}(\.[0-9]{1,2})?", fullmatch=True)
positive = st.floats(min_value=1e-9, max_value=1e3)
values = st.none() | st.booleans() | st.integers() | names | positive | st.lists(st.integers())
configs = st.builds(
    TrainConfig,
    model=names,
    output_dir=names,
    data=st.builds(DataConfig, data=names, eval_data=st.none() | names, packing=st.booleans()),
    revision=st.none() | names,
    lora=st.builds(
        LoraConfig,
        r=st.integers(1, 512),
        lora_alpha=positive,
        target_modules=st.sampled_from(["all-linear", r".*\.[qv]_proj", "(a|b)"])
        | st.lists(plain_words, min_size=1).map(tuple),
        use_rslora=st.booleans(),
    ),
    quant=st.builds(
        QuantConfig,
        double_quant=st.booleans(),
        compute_dtype=st.sampled_from(["auto", "bf16", "fp16", "fp32"]),
        skip_modules=st.lists(names).map(tuple),
    ),
    learning_rate=st.none() | positive,
    seed=st.integers(),
    max_steps=st.integers(1, 10**9),
    report_to=st.lists(names).map(tuple),
    trainer=st.dictionaries(plain_words, values, max_size=3),
)


# Without shrinking, which takes minutes for a config of this size.
@settings(max_examples=50, deadline=None, database=None, phases=[Phase.generate])
@given(configs)
def test_a_flat_config_is_parsed_back_unchanged(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    path.write_text(yaml.safe_dump(flat(config), sort_keys=False), encoding="utf-8")
    assert cli.parse(TrainConfig, ["--config", str(path)], prog="train.py") == config


# ---- the commands ----


@pytest.mark.parametrize("config_class", [TrainConfig, MergeConfig, ChatConfig, EvaluateConfig])
def test_help_fits_two_screens(config_class, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        cli.parse(config_class, ["--bogus", "--help"], prog="python -m it")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith("usage: python -m it ")
    assert len(text.splitlines()) <= 88 and max(map(len, text.splitlines())) <= 80
    with pytest.raises(SystemExit):
        cli.parse(config_class, ["--help-all"], prog="train.py")
    every = capsys.readouterr().out
    for name in ("config", *dict(settings_of(config_class))):
        assert f"  --{name.replace('_', '-')} " in every.replace("\n", " \n"), name
    assert ("--rank-pattern {NAME: VALUE}" in every) == (config_class is TrainConfig)
    assert "--rank-pattern" not in text


class OutOfMemoryError(RuntimeError):
    """As torch names its own."""


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (UserError("wanted this,\ngot that"), 2, "error: wanted this, got that\n"),
        (KeyboardInterrupt(), 130, "interrupted: --resume continues from the last checkpoint"),
        (OutOfMemoryError(), 2, "error: the GPU's memory ran out after 0.00 GiB: lower --max-len"),
        (BrokenPipeError(), 1, ""),
        (ZeroDivisionError(), None, ""),
    ],
)
def test_a_command_stops_with_one_line(raised, code, line, capfd, monkeypatch):
    import qlora.training

    def train(config):
        assert config == parse()
        raise raised

    monkeypatch.setattr(qlora.training, "train", train)
    monkeypatch.setattr(__main__.os, "dup2", lambda *_: None)
    stops = pytest.raises(SystemExit if code else ZeroDivisionError)
    with stops as stop:
        __main__.run("train", prog="train.py", words=REQUIRED)
    assert getattr(stop.value, "code", None) == code
    said = capfd.readouterr().err
    assert said.startswith(line) and said.count("\n") == bool(line)


def test_the_console_command(capsys, monkeypatch):
    def qlora(*words):
        monkeypatch.setattr(sys, "argv", ["qlora", *words])
        with pytest.raises(SystemExit) as stop:
            __main__.main()
            sys.exit(0)
        said = capsys.readouterr()
        return stop.value.code, said.out + said.err

    code, help_text = qlora("--help")
    assert code == 0 and [line.split()[0] for line in help_text.splitlines()[3:]] == [
        *__main__.COMMANDS
    ]
    assert qlora() == (code, help_text)
    assert qlora("--version") == (0, f"qlora {__version__}\n")
    assert qlora("trian") == (2, "error: unknown command trian. Did you mean train?\n")
    assert "train, merge" in qlora("zzz")[1]
    assert qlora("train", "--help")[1].startswith("usage: qlora train --model")
    assert qlora("merge", "--adaptr") == (
        2, "error: unknown flag --adaptr. Did you mean --adapter?\n"
    )  # fmt: skip


@pytest.mark.parametrize("name", __main__.COMMANDS)
def test_the_function_of_each_command_exists(name):
    _, path, _ = __main__.COMMANDS[name]
    module, _, function = path.partition(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))


@pytest.mark.parametrize(
    "script",
    ["train.py", "merge_dequant.py"]
    + [f"qlora.{name}" for name in ("chat", "evaluate", "report", "portable")],
)
def test_errors_do_not_import_torch(script, tmp_path):
    path = ROOT / script
    start = f"path({str(path)!r}" if path.is_file() else f"module({script!r}"
    code = f"import runpy, sys\ntry:\n    runpy.run_{start}, run_name='__main__')\n"
    code += "finally:\n    assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, "--zzz"],
        cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: unknown flag --zzz.") and done.stderr.count("\n") == 1
