"""Flags and recipes: what they set, and the one line that comes out when they are wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from qlora import cli
from qlora.config import (
    ChatConfig,
    DataConfig,
    EvaluateConfig,
    LoraConfig,
    MergeConfig,
    QuantConfig,
    TrainConfig,
    flat,
)
from qlora.errors import UserError

ROOT = Path(__file__).parents[1]
REQUIRED = ["--model", "base", "--output-dir", "out", "--data", "rows.jsonl"]


def parse(*words):
    return cli.parse(TrainConfig, [*REQUIRED, *words], prog="train.py")


def refused(*words):
    """The line that these words are answered with."""
    with pytest.raises(UserError) as error:
        parse(*words)
    return str(error.value)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes recipe.yaml into the working directory."""
    monkeypatch.chdir(tmp_path)
    return (tmp_path / "recipe.yaml").write_text


# ---------------------------------------------------------------------------------------- flags


def test_the_required_flags_are_enough():
    assert parse() == TrainConfig(model="base", output_dir="out", data=DataConfig("rows.jsonl"))


def test_nested_settings_are_flags_without_a_prefix():
    config = parse("--r", "8", "--quant-type", "fp4", "--max-length=512", "--save-steps", "20")
    assert config.lora == LoraConfig(r=8)
    assert config.quant == QuantConfig(quant_type="fp4")
    assert config.data == DataConfig("rows.jsonl", max_length=512)
    assert config.save_steps == 20


def test_both_spellings_are_taken():
    assert parse("--lora_alpha", "8") == parse("--lora-alpha", "8") == parse("--lora_alpha=8")


def test_a_switch_has_an_opposite():
    assert not parse("--no-double-quant").quant.double_quant
    assert parse("--no_double_quant", "--double_quant").quant.double_quant
    assert parse("--resume").resume


@pytest.mark.parametrize(
    ("words", "target_modules"),
    [
        (["q_proj", "v_proj"], ("q_proj", "v_proj")),
        (["q_proj"], ("q_proj",)),
        (["all-linear"], "all-linear"),
        ([r".*\.[qv]_proj"], r".*\.[qv]_proj"),
        (["[q_proj, v_proj]"], ("q_proj", "v_proj")),
    ],
)
def test_target_modules(words, target_modules):
    assert parse("--target-modules", *words).lora.target_modules == target_modules


def test_numbers_as_people_write_them():
    config = parse("--learning-rate", "2e-4", "--max-steps", "-1", "--weight-decay", ".01")
    assert (config.learning_rate, config.max_steps, config.weight_decay) == (0.0002, -1, 0.01)


def test_none_takes_a_value_back():
    assert parse("--eval-data", "x", "--eval-data", "none").data.eval_data is None


def test_a_value_may_start_with_a_dash_after_an_equals_sign():
    assert parse("--revision=-x=y").revision == "-x=y"


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


def test_the_merge_has_its_own_flags():
    words = ["--adapter", "out", "--output-dir", "merged", "--onto", "original"]
    config = cli.parse(MergeConfig, words, prog="merge_dequant.py")
    assert config == MergeConfig(adapter=("out",), output_dir="merged", onto="original")


def test_several_adapters_with_weights():
    words = ["--adapter", "a", "b", "--weights", "0.5", "-1", "--output-dir", "merged"]
    config = cli.parse(MergeConfig, words, prog="merge_dequant.py")
    assert config.adapters == {"a": 0.5, "b": -1.0}
    with pytest.raises(UserError, match=r"weights must be one for each adapter: 2 adapters, 1 "):
        cli.parse(MergeConfig, [*words[:3], "--weights=0.5", *words[-2:]], prog="merge_dequant.py")
    with pytest.raises(UserError, match=r"--weights: wanted a number, got 'x'"):
        cli.parse(MergeConfig, [*words[:3], "--weights=x", *words[-2:]], prog="merge_dequant.py")


# --------------------------------------------------------------------------------- wrong flags


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--learnin-rate", "1"], "unknown flag --learnin-rate. Did you mean --learning-rate?"),
        (["--learnin_rate=1"], "unknown flag --learnin_rate. Did you mean --learning-rate?"),
        (["-r", "8"], "unknown flag -r. Did you mean --r?"),
        (
            ["--doubl-quant", "--zzz", "1"],
            "unknown flag --doubl-quant. Did you mean --double-quant? unknown flag --zzz. "
            "Any other of transformers.TrainingArguments: --trainer.NAME VALUE.",
        ),
        (["--r", "abc"], "--r: wanted a whole number, got 'abc'"),
        (["--r", "8.5"], "--r: wanted a whole number, got '8.5'"),
        (["--eval-steps", "few"], "--eval-steps: wanted a whole number, got 'few'"),
        (["--learning-rate", "fast"], "--learning-rate: wanted a number, got 'fast'"),
        (["--lora-alpha", "inf"], "--lora-alpha: wanted a number, got 'inf'"),
        (["--report-to", "[a: }]"], "--report-to: wanted a list of names, got '[a: }]'"),
        (["--report-to", "[[a]]"], "--report-to: wanted a list of names, got '[[a]]'"),
        (["--quant-type", "nf5"], "--quant-type: wanted nf4 or fp4, got 'nf5'"),
        (["--r"], "--r needs a value (one that starts with - is written --r=-…)"),
        (["--r", "--resume"], "--r needs a value (one that starts with - is written --r=-…)"),
        (["--config"], "--config needs a value"),
        (["--trainer.bf16"], "--trainer.bf16 needs a value"),
        (["--trainer.bf16", "{"], "--trainer.bf16: wanted a YAML value, got '{'"),
        (["--trainer", "3"], "--trainer: wanted {NAME: VALUE}, got '3'"),
        (
            ["--config", "a", "--config", "b"],
            "--config takes one recipe, got 2: put them into one file",
        ),
        (
            ["--resume", "false"],
            "no flag takes false: a value follows its flag, "
            "and a switch takes none but is turned off with --no-NAME",
        ),
        (["--r", "0"], "r must be a whole number above 0, got 0"),
        (["--learning-rate", "-1e-4"], "learning_rate must be above 0, got -0.0001"),
        (["--config", "no.yaml"], "--config no.yaml: No such file or directory"),
    ],
)
def test_a_wrong_flag(words, line):
    assert refused(*words) == line


def test_everything_that_is_missing_is_named():
    with pytest.raises(UserError) as error:
        cli.parse(TrainConfig, ["--model", "base"], prog="train.py")
    assert str(error.value) == (
        "missing --output-dir, --data: write a value here or in a --config file"
    )


def test_the_merge_takes_no_trainer_settings():
    with pytest.raises(UserError, match=r"^unknown flag --trainer\.bf16\.$"):
        cli.parse(MergeConfig, ["--trainer.bf16", "true"], prog="merge_dequant.py")


def test_a_long_value_comes_out_whole():
    path = "/a folder/" + "x" * 200
    assert refused("--r", path) == f"--r: wanted a whole number, got '{path}'"


# --------------------------------------------------------------------------------- the recipe


def test_a_recipe_sets_and_flags_win(recipe):
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


def test_a_recipe_may_hold_what_is_required(recipe):
    recipe("model: base\noutput_dir: out\ndata: rows.jsonl\n")
    assert cli.parse(TrainConfig, ["--config", "recipe.yaml"], prog="train.py") == parse()


def test_a_runs_own_record_is_a_recipe(recipe):
    recipe("config:\n  r: 8\nversions:\n  torch: 2.13.0\n")
    assert parse("--config=recipe.yaml").lora.r == 8


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "lora_alhpa: 3\nzzz: 1",
            "recipe.yaml: unknown key lora_alhpa. Did you mean lora_alpha? unknown key zzz.",
        ),
        ("r: abc", "recipe.yaml: r: wanted a whole number, got 'abc'"),
        ("r: [8, 16]", "recipe.yaml: r must be one value, got a list"),
        ("r: 8\nr: 16", "recipe.yaml: r is set twice: keep one of the two"),
        ("resume: maybe", "recipe.yaml: resume must be true or false, got 'maybe'"),
        (
            "report_to: [[a]]",
            "recipe.yaml: report_to must be a value or a list of them, got a list",
        ),
        (
            "trainer: bf16",
            "recipe.yaml: trainer must be a mapping of NAME: VALUE, got 'bf16'",
        ),
        ("[a]: 1", "recipe.yaml: unknown key a list."),
        ("- r", "recipe.yaml must have lines of `name: value`, got a list"),
        ("", "recipe.yaml must have lines of `name: value`, got nothing"),
        (
            "r: 8\nseed: [1",
            "recipe.yaml, line 2 is not YAML: expected ',' or ']', but got '<stream end>'",
        ),
        ("model:\nr: 0", "r must be a whole number above 0, got 0"),
    ],
)
def test_a_wrong_recipe(recipe, text, line):
    recipe(text)
    assert refused("--config", "recipe.yaml") == line


def test_a_flag_mends_a_wrong_value_of_the_recipe(recipe):
    recipe("r: abc")
    assert parse("--config", "recipe.yaml", "--r", "8").lora.r == 8


# --------------------------------------------------------------------------------- there and back

names = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1).filter(
    lambda text: text.lower() not in ("none", "null")  # which mean no value, on the command line
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


# Without shrinking, which takes minutes for a config of this many parts.
@settings(max_examples=50, deadline=None, database=None, phases=[Phase.generate])
@given(configs)
def test_a_flat_config_is_read_back_as_the_same(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    path.write_text(yaml.safe_dump(flat(config), sort_keys=False), encoding="utf-8")
    assert cli.parse(TrainConfig, ["--config", str(path)], prog="train.py") == config


# --------------------------------------------------------------------------------- the whole way


@pytest.mark.parametrize("config_class", [TrainConfig, MergeConfig, ChatConfig, EvaluateConfig])
def test_help_fits_two_screens(config_class, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        cli.parse(config_class, ["--bogus", "--help"], prog="train.py")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert len(text.splitlines()) <= 100
    assert "--help-all" in text
    with pytest.raises(SystemExit):
        cli.parse(config_class, ["--help-all"], prog="train.py")
    every = capsys.readouterr().out
    for name in ("config", *cli._settings(config_class)):
        assert "--" + name.replace("_", "-") in every
    assert ("--init-lora-weights {true,NAME}" in every) == (config_class is TrainConfig)


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (UserError("wanted this,\ngot that"), 2, "error: wanted this, got that\n"),
        (KeyboardInterrupt(), 130, "interrupted: all is kept\n"),
    ],
)
def test_run_says_it_in_one_line(raised, code, line, capsys, monkeypatch):
    def main(config):
        raise raised

    monkeypatch.setattr(sys, "argv", ["train.py", *REQUIRED])
    with pytest.raises(SystemExit) as stop:
        cli.run(main, TrainConfig, prog="train.py", interrupted="all is kept")
    assert stop.value.code == code
    assert capsys.readouterr().err == line


def test_run_keeps_the_traceback_of_a_bug(monkeypatch):
    def main(config):
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "argv", ["train.py", *REQUIRED])
    with pytest.raises(ZeroDivisionError):
        cli.run(main, TrainConfig, prog="train.py", interrupted="")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train.py", *REQUIRED, "--r", "abc"], "error: --r: wanted a whole number, got 'abc'\n"),
        (
            ["merge_dequant.py", "--adaptr", "out"],
            "error: unknown flag --adaptr. Did you mean --adapter?\n",
        ),
    ],
)
def test_a_script_from_another_folder(words, line, tmp_path):
    script, *flags = words
    done = subprocess.run(
        [sys.executable, ROOT / script, *flags], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)
