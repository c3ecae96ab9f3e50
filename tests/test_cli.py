"""Flags and recipes: the settings they give, and the one-line errors."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

import pytest
import yaml
from conftest import with_folders
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from qlora import __main__, __version__, cli
from qlora.config import DataConfig, TrainConfig, build, flat, settings_of
from qlora.errors import STOPS, Interrupted, UserError

ROOT = Path(__file__).parents[1]
REQUIRED = "--model base --output-dir out --data rows.jsonl "


def parse(line, command="train", *, required=REQUIRED):
    words = shlex.split((required if command == "train" else "") + line)
    return cli.parse(__main__.COMMANDS[command][0], words, prog="it")


def refused(line, command="train", **settings):
    with pytest.raises(UserError) as error:
        parse(line, command, **settings)
    return str(error.value)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return (tmp_path / "recipe.yaml").write_text


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("--r 8 --quant-type fp4", {"r": 8, "quant_type": "fp4"}),
        ("--max-length=512 --save-steps 20", {"max_length": 512, "save_steps": 20}),
        ("--lora_alpha 8", {"lora_alpha": 8}),
        ("--lora-alpha 8", {"lora_alpha": 8}),
        ("--lora_alpha=8", {"lora_alpha": 8}),
        ("--no-double-quant --resume", {"double_quant": False, "resume": True}),
        ("--no_double_quant --double_quant", {"double_quant": True}),
        ("--target-modules q_proj v_proj", {"target_modules": ["q_proj", "v_proj"]}),
        ("--target-modules q_proj,v_proj", {"target_modules": ["q_proj", "v_proj"]}),
        ("--target-modules 'q_proj, v_proj'", {"target_modules": ["q_proj", "v_proj"]}),
        ("--modules-to-save 'a;b' c", {"modules_to_save": ["a", "b", "c"]}),
        ("--layers-to-transform '1, 3'", {"layers_to_transform": [1, 3]}),
        ("--target-modules '[q_proj, v_proj]'", {"target_modules": ["q_proj", "v_proj"]}),
        ("--target-modules q_proj", {"target_modules": ["q_proj"]}),
        ("--target-modules '[\"q_proj\"]'", {"target_modules": ["q_proj"]}),
        ("--target-modules all-linear", {"target_modules": "all-linear"}),
        (r"--target-modules '.*\.[qv]_proj'", {"target_modules": r".*\.[qv]_proj"}),
        ("--learning-rate 2e-4", {"learning_rate": 0.0002}),
        ("--max-steps -1 --weight-decay .01", {"max_steps": -1, "weight_decay": 0.01}),
        ("--layers-to-transform 0,2 3", {"layers_to_transform": [0, 2, 3]}),
        ("--layers-to-transform '[0, 2]'", {"layers_to_transform": [0, 2]}),
        ("--eval-data x --eval-data none", {"eval_data": None}),
        ("--revision=-x=y", {"revision": "-x=y"}),
        ("--init-lora-weights true", {"init_lora_weights": True}),
        ("--rank-pattern '{q_proj: 8}'", {"rank_pattern": {"q_proj": 8}}),
        (
            "--trainer.adam-beta2 0.99 --trainer.adam_epsilon=1e-8 --trainer.bf16 true "
            "--trainer.save_strategy no --trainer.run_name one "
            "--trainer.x '[1, -2]' --trainer.start -1 --trainer '{run_name: two}'",
            {"trainer": {"adam_beta2": 0.99, "adam_epsilon": 1e-8, "bf16": True}
             | {"save_strategy": "no", "run_name": "two", "x": [1, -2], "start": -1}},
        ),
    ],
)  # fmt: skip
def test_flags_set_their_settings_and_no_others(line, wanted):
    assert flat(parse(line)) == flat(parse("")) | wanted


def test_several_adapters_with_weights_or_one_by_its_place():
    several = "--output-dir merged --adapter a b --weights"
    assert parse(f"{several} 0.5 -1e0", "merge").adapters == {"a": 0.5, "b": -1.0}
    assert "2 adapters, 1 weights" in refused(f"{several}=0.5", "merge")
    assert parse("--adapter 'my out' --output-dir m", "merge").adapters == {"my out": 1.0}
    none = parse("--adapter a --output-dir m --format nf4 --calibration none", "merge")
    assert none.calibration == "none"  # a word here, not the default
    assert parse("out --merged m", "report") == parse("--adapter=out --merged=m", "report")
    assert "unexpected more" in refused("out more", "report")


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--learnin-rate 1", ["--learnin-rate.", "Did you mean --learning-rate?"]),
        ("--learnin_rate=1", ["--learnin-rate.", "Did you mean --learning-rate?"]),
        ("--lora-alph 8", ["--lora-alph.", "Did you mean --lora-alpha?"]),
        ("-r 8", ["unknown flag -r. Did you mean --r?"]),
        ("--doubl-quant --zzz 1", ["--double-quant?", "--zzz.", "--trainer.NAME VALUE"]),
        ("--r abc", ["--r:", "a whole number", "'abc'"]),
        ("--r 8.5", ["--r:", "a whole number", "'8.5'"]),
        (f"--r '/a folder/{'x' * 200}'", ["a whole number", f"'/a folder/{'x' * 200}'"]),
        ("--eval-steps few", ["--eval-steps:", "a whole number", "'few'"]),
        ("--learning-rate fast", ["--learning-rate:", "a number", "'fast'"]),
        ("--lora-alpha inf", ["--lora-alpha:", "a number", "'inf'"]),
        ("--layers-to-transform 1 x", ["--layers-to-transform:", "'x'"]),
        ("--report-to '[a: }]'", ["--report-to", "is not YAML"]),
        ("--report-to '[[a]]'", ["--report-to:", "[['a']]"]),
        ("--quant-type nf5", ["quant_type", "nf4 or fp4", "'nf5'"]),
        ("--r", ["--r needs a value", "--r=-"]),
        ("--r --resume", ["--r needs a value"]),
        ("--config", ["--config needs a value"]),
        ("--trainer.bf16", ["--trainer.bf16 needs a value"]),
        ("--trainer.bf16 {", ["--trainer.bf16", "is not YAML"]),
        ("--trainer 3", ["--trainer:", "{NAME: VALUE}", "'3'"]),
        ("--config a --config b", ["--config takes one recipe, got 2"]),
        ("--resume false", ["unexpected false", "--no-NAME"]),
        ("--r 8 9", ["unexpected 9"]),
        ("--r 0", ["r must be a whole number above 0, got 0"]),
        ("--learning-rate -1e-4", ["learning_rate", "above 0", "-0.0001"]),
        ("--config no.yaml", ["no.yaml: No such file or directory"]),
        ("--fit", ["--fit needs --plan"]),
    ],
)
def test_an_invalid_flag_is_refused(line, parts):
    assert [part for part in parts if part not in refused(line)] == []


def test_required_flags_and_those_of_another_command():
    assert parse("") == TrainConfig(model="base", output_dir="out", data=DataConfig("rows.jsonl"))
    said = refused("--model base", required="")
    assert "missing --output-dir, --data: " in said and "--config" in said
    assert refused("--trainer.bf16 true", "merge").startswith("unknown flag --trainer.bf16.")


# ---- the recipe ----


def test_a_recipe_gives_what_flags_do_not(recipe):
    """Also required settings, one by its old name; a flag overrides even an invalid value."""
    recipe(
        "# 7B on 12 GB\nmodel: base\noutput_dir: out\ndata: rows.jsonl\nr: abc\nlora-alpha: 16\n"
        "learning_rate: 1e-4\nrevision: 1.10\ndouble_quant: no\nreport_to: [tensorboard]\n"
        "target_modules: [q_proj]\neval_data:\n"
        "trainer: {adam_epsilon: 1e-8, bf16: true, save_strategy: no}\nloss_without_logits: false\n"
    )
    config = parse("--config recipe.yaml --r 4 --trainer.bf16 false", required="")
    assert flat(config) == flat(parse("")) | {
        "r": 4, "lora_alpha": 16, "learning_rate": 0.0001, "double_quant": False,
        "revision": "1.10",  # a tag, not the number 1.1
        "report_to": ["tensorboard"], "target_modules": ["q_proj"], "fast_path": False,
        "trainer": {"adam_epsilon": 1e-8, "bf16": False, "save_strategy": "no"},
    }  # fmt: skip


def test_a_run_yaml_of_an_earlier_version_is_a_recipe():
    """As write_run_file wrote it at commit 636288c."""
    config = parse(f"--config '{ROOT}/tests/run_636288c.yaml'", required="")
    assert (config.model, config.data.data, config.revision) == ("base", "rows.jsonl", "1.10")
    assert (config.lora.r, config.lora.rank_pattern) == (4, {"q_proj": 8})
    assert config.learning_rate == 0.0005 and config.lora.target_modules == "all-linear"
    assert config.trainer == {"adam_epsilon": 1e-08} and not config.fast_path


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
        ("save_strategy: no", ["unknown key save_strategy.", "save_steps?"]),
        ("bf16: no", ["unknown key bf16.", "go under `trainer:`"]),
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
    line = refused("--config recipe.yaml")
    assert line.startswith("recipe.yaml")
    assert [part for part in parts if part not in line] == []


def test_settings_do_not_stand_below_data(recipe):
    recipe("data: {name: rows.jsonl}")
    line = refused("--config recipe.yaml", required="--model base --output-dir out ")
    assert line == "recipe.yaml: data: wanted a name or a list of names, got {'name': 'rows.jsonl'}"


# ---- round trip ----

names = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1).filter(
    lambda text: text.lower() not in ("none", "null")  # these mean None
)
plain_words = st.from_regex(r"[a-z_]{1,8}(\.[0-9]{1,2})?", fullmatch=True)
positive = st.floats(min_value=1e-9, max_value=1e3)
values = st.none() | st.booleans() | st.integers() | names | positive | st.lists(st.integers())
flat_settings = {
    "model": names, "output_dir": names, "data": names, "eval_data": st.none() | names,
    "packing": st.booleans(), "revision": st.none() | names, "r": st.integers(1, 512),
    "lora_alpha": positive, "use_rslora": st.booleans(), "double_quant": st.booleans(),
    "target_modules": st.sampled_from(["all-linear", r".*\.[qv]_proj", "(a|b)"])
    | st.lists(plain_words, min_size=1).map(tuple),
    "compute_dtype": st.sampled_from(["auto", "bf16", "fp16", "fp32"]),
    "skip_modules": st.lists(names).map(tuple), "learning_rate": st.none() | positive,
    "seed": st.integers(-(2**63) + 1, 2**63 - 1), "max_steps": st.integers(1, 10**9),
    "report_to": st.lists(names).map(tuple),
    "trainer": st.dictionaries(plain_words, values, max_size=3),
}  # fmt: skip


# Without shrinking, which takes minutes for a config of this size.
@settings(max_examples=50, deadline=None, database=None, phases=[Phase.generate])
@given(st.fixed_dictionaries(flat_settings))
def test_a_flat_config_is_parsed_back_unchanged(tmp_path_factory, given_settings):
    config = build(TrainConfig, given_settings)
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    path.write_text(yaml.safe_dump(flat(config), sort_keys=False), encoding="utf-8")
    assert parse(f"--config '{path}'", required="") == config


@pytest.mark.parametrize("command", ["train", "merge", "chat", "evaluate"])
def test_help_fits_two_screens(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        parse("--bogus --help", command, required="")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith("usage: it ")
    assert len(text.splitlines()) <= 88 and max(map(len, text.splitlines())) <= 80
    with pytest.raises(SystemExit):
        parse("--help-all", command)
    every = capsys.readouterr().out
    for name in ("config", *settings_of(__main__.COMMANDS[command][0])):
        assert f"  --{name.replace('_', '-')} " in every.replace("\n", " \n"), name
    assert ("--rank-pattern {NAME: VALUE}" in every) == (command == "train")
    assert "--rank-pattern" not in text


@pytest.mark.parametrize(("seconds", "lines"), [(0, 4), (30, 0)])
def test_progress_is_plain_lines_where_there_is_no_terminal(seconds, lines, capsys, monkeypatch):
    monkeypatch.setattr("qlora.cli.LINE_SECONDS", seconds)
    with cli.Progress(total=4, desc="Writing", unit_scale=True) as bar:
        for _ in range(4):
            bar.update()
            if not lines:
                cli.Progress.write("a line")  # which removes and redraws bars
    said = capsys.readouterr()
    assert said.out == "a line\n" * (4 - lines) and "\r" not in said.err
    assert said.err.count("\n") in (lines, lines + 1 if lines else 0)  # and one at the beginning
    assert not lines or "Writing: 50% of 4.00, 00:00 left\n" in said.err


class OutOfMemoryError(RuntimeError):
    """As torch names its own."""


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (UserError("wanted this,\ngot that"), 2, "error: wanted this, got that\n"),
        (KeyboardInterrupt(), 130, "interrupted: --resume continues from the last checkpoint"),
        (Interrupted("saved", 15), 143, "interrupted: saved"),
        (signal.SIGTERM, 143, "interrupted: --resume continues from the last checkpoint"),
        (signal.SIGHUP, 129, "interrupted: --resume continues from the last checkpoint"),
        (OutOfMemoryError(), 2, "error: the GPU's memory ran out after 0.00 GiB: lower --max-len"),
        (BrokenPipeError(), 1, ""),
        (ZeroDivisionError(), None, ""),
    ],
)
def test_a_command_stops_with_one_line(raised, code, line, capfd, monkeypatch):
    import qlora.plan.run

    def train(config, *, planned_bytes):
        assert config == parse("")
        if isinstance(raised, signal.Signals):
            os.kill(os.getpid(), raised)
        raise raised

    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOPS}
    monkeypatch.setattr(qlora.plan.run, "train", train)
    monkeypatch.setattr(__main__.os, "dup2", lambda *_: None)
    for variable in __main__.NO_BARS:  # restored after the test
        monkeypatch.setenv(variable, "0")
        monkeypatch.delenv(variable)
    stops = pytest.raises(SystemExit if code else ZeroDivisionError)
    with stops as stop:
        __main__.run("train", prog="train.py", words=REQUIRED.split())
    for number, handler in before.items():
        signal.signal(number, handler)
    assert getattr(stop.value, "code", None) == code
    assert all(os.environ[variable] == "1" for variable in __main__.NO_BARS)
    said = capfd.readouterr().err
    assert said.startswith(line) and said.count("\n") == bool(line)


@pytest.mark.parametrize("load, is_passive", [([100.0, 3.0], True), ([20.0, 20.0], False)])
def test_threads_wait_passively_beside_other_processes(load, is_passive, monkeypatch):
    monkeypatch.setattr(__main__, "cpu_percent", lambda *_, **__: load)
    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # restored after the test
    monkeypatch.delenv("OMP_WAIT_POLICY")
    __main__._wait_passively_beside_others()  # torch is loaded, and with it OpenMP
    assert "OMP_WAIT_POLICY" not in os.environ
    with monkeypatch.context() as patch:
        patch.setattr(sys, "modules", {})
        __main__._wait_passively_beside_others()
    assert os.environ.get("OMP_WAIT_POLICY") == ("PASSIVE" if is_passive else None)


def test_the_console_command(capsys, monkeypatch):
    def qlora(*words):
        monkeypatch.setattr(sys, "argv", ["qlora", *words])
        with pytest.raises(SystemExit) as stop:
            __main__.main()
            sys.exit(0)
        said = capsys.readouterr()
        return stop.value.code, said.out + said.err

    code, help_text = qlora("--help")
    listed = [line.split()[0] for line in help_text.splitlines()[3:]]
    assert code == 0 and listed == [*__main__.COMMANDS]
    assert all(callable(resolve_name(function)) for _, function, _ in __main__.COMMANDS.values())
    assert qlora() == (code, help_text)
    assert qlora("--version") == (0, f"qlora {__version__}\n")
    assert qlora("trian") == (2, "error: unknown command trian. Did you mean train?\n")
    assert "train, merge" in qlora("zzz")[1]
    assert qlora("train", "--help")[1].startswith("usage: qlora train --model")
    said = "error: unknown flag --adaptr. Did you mean --adapter?\n"
    assert qlora("merge", "--adaptr") == (2, said)


OTHERS = [name for name in __main__.COMMANDS if name not in ("train", "merge", "plan", "inspect")]
SCRIPTS = ["train.py", "merge_dequant.py", *(f"qlora.{name}" for name in OTHERS)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_errors_do_not_import_torch(script, tmp_path):
    (tmp_path / "torch.py").write_text("raise AssertionError")
    start = [ROOT / script] if (ROOT / script).is_file() else ["-m", script]
    done = subprocess.run(
        [sys.executable, *start, "--zzz"], capture_output=True, text=True, cwd=tmp_path,
        env=with_folders(tmp_path, ROOT),
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: unknown flag --zzz.") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("text", ["data: [a, b]", "data:\n- a\n- b"])
def test_a_recipe_may_list_several_data(text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"{text}\nmodel: m\noutput_dir: o\n")
    config = cli.parse(TrainConfig, ["--config", str(tmp_path / "recipe.yaml")], prog="train.py")
    assert config.data.sources == ("a", "b")
