"""The page about a run: what it says, that it stands alone, and what it refuses."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from qlora import cli
from qlora.apps import report
from qlora.apps.report import next_commands, page, read_merge, read_run, remarks, show_seconds
from qlora.apps.report import report as write_report
from qlora.config import ReportConfig
from qlora.errors import UserError

ROOT = Path(__file__).parents[2]
COUNTS = {
    "rows": 400,
    "tokens": 28008,
    "supervised_tokens": 10220,
    "cut_rows": 3,
    "dropped_rows": 0,
}
FACTS = {
    "config": {"model": "owner/base", "data": "mine.jsonl", "r": 16, "learning_rate": 1.32e-3,
               "target_modules": ["q_proj", "v_proj"], "max_length": 256, "packing": False,
               "eval_data": None},
    "versions": {"qlora": "0.1.0", "torch": "2.13.0"},
    "base": {"resolved": "/somewhere/base"},
    "data": {"training": {"source": "mine.jsonl", **COUNTS}},
    "device": {"name": "NVIDIA T4", "memory_bytes": 16 * 2**30},
}  # fmt: skip
ROWS = [
    {"step": i, "epoch": i / 10, "loss": 3 / i, "tokens_per_second": 900.0,
     "peak_bytes": 4 * 2**30, "seconds": 61.0 * i}
    for i in range(1, 11)
] + [{"step": 5, "eval_loss": 0.5}, {"step": 10, "eval_loss": 0.4, "epoch": 1.0}]  # fmt: skip
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)> & \u2028 \"'"
SAMPLES = [
    {"prompt": EVIL, "wanted": "yes", "before": EVIL, "after": "yes "},
    {"prompt": "again", "wanted": "no", "before": None, "after": None},
]
MERGE = {
    "adapters": {}, "onto": "nf4", "format": "bf16",
    "layers": {f"m.{i}.{k}": {"delta_over_weight": 0.02, "kept": 0.875 + i / 8}
               for i in range(2) for k in ("q_proj", "v_proj")},
    "verify": {"rows": 50, "loss_base": 3.1, "loss_live": 0.5, "loss_merged": 0.6, "kl": 0.01,
               "kept": 0.9615, "agreement": 0.99},
}  # fmt: skip


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run as train.py leaves it, so far as a report reads it."""
    out = tmp_path / "my run"
    out.mkdir()
    (out / "run.yaml").write_text(yaml.safe_dump(FACTS))
    (out / "metrics.jsonl").write_text(lines(ROWS))
    (out / "samples.jsonl").write_text(lines(SAMPLES), encoding="utf-8")
    (out / "adapter_model.safetensors").touch()
    return out


def merged(folder: Path, name: str, **changes) -> Path:
    out = folder.parent / name
    out.mkdir()
    values = {**MERGE, "adapters": {str(folder): 1.0}, **changes}
    (out / "merge_report.json").write_text(json.dumps(values))
    return out


class Page(HTMLParser):
    """The words, tags and attributes of a page, and whether its tags are closed in order."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.tags, self.links, self.open = "", [], [], []
        self.feed(text)
        self.close()
        self.words = " ".join(self.words.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


# ---- what it says


def test_what_a_page_says(folder):
    text = page(read_run(folder), MERGE)
    found = Page(text)
    assert found.open == []
    for said in (
        "my run", "base, fine-tuned on mine.jsonl", "NVIDIA T4", "of 16.0 GiB, 25%",
        "4.00 GiB", "10 min 10 s", "900 tokens a second", "0.3000", "3.0000 at the start",
        "0.4000", "lowest 0.4000, at step 10", "1 × the data", "28,008", "10,220",
        "q_proj, v_proj", "0.00132", "version of torch", "after: ✓ as wanted",
        "(not asked)", "(not asked yet)", "3 training rows were longer than 256 tokens",
        "onto the dequantized 4-bit base", "96.15%", "2.00%", "87.5%", "93.8%",
        "python -m qlora.chat --adapter",
    ):  # fmt: skip
        assert said in found.words, said
    assert found.tags.count("svg") == 2


def test_a_page_stands_alone(folder):
    """No network, no scripts; light and dark."""
    many = [{**ROWS[0], "step": i} for i in range(1, 700)]
    (folder / "metrics.jsonl").write_text(lines(many))
    (folder / "samples.jsonl").unlink()
    text = page(read_run(folder), MERGE)
    found = Page(text)
    assert not {"script", "link", "iframe", "object", "img"} & {*found.tags}
    assert "image" in found.tags  # a line of many rows, as pixels
    assert all(link.startswith(("#", "data:image/png;")) for link in found.links)
    assert not re.search(r"@import|url\((?!#)|\son\w+=", text)
    assert {*re.findall(r"https?://[^\s\"']*", text)} <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",  # names, not addresses
        "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd",
    }
    assert "prefers-color-scheme: dark" in text


def test_what_comes_from_files_is_text(folder):
    values = {**FACTS, "config": {**FACTS["config"], "model": EVIL, "data": EVIL}}
    values["data"] = {"training": {"source": EVIL, **COUNTS}}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    evil = {**MERGE, "onto": EVIL, "layers": {"m.0.<b>q": {"delta_over_weight": 0.1, "kept": 1}}}
    found = Page(page(read_run(folder), evil))
    assert found.words.count("<script>alert(1)</script>") >= 5
    assert not {"script", "img"} & {*found.tags}
    assert "<b>q" in found.words


def test_the_least_that_a_run_has(folder):
    """As an older one, without the counts of data, a device, times and samples."""
    for name in ("data", "device", "versions"):
        values = yaml.safe_load((folder / "run.yaml").read_text())
        del values[name]
        (folder / "run.yaml").write_text(yaml.safe_dump(values))
    (folder / "metrics.jsonl").write_text(lines([{"step": 1, "loss": 2.0}]))
    (folder / "samples.jsonl").unlink()
    found = Page(page(read_run(folder)))
    assert "2.0000" in found.words and "Answers before" not in found.words
    assert "Merge" not in found.words


def test_remarks(folder):
    assert remarks(read_run(folder)) == [
        "3 training rows were longer than 256 tokens and lost their end."
    ]
    (folder / "adapter_model.safetensors").unlink()
    rows = [
        {"step": 1, "loss": 2.0, "eval_loss": 0.3},
        {"step": 2, "loss": float("nan"), "eval_loss": 0.5},
    ]
    (folder / "metrics.jsonl").write_text(lines(rows))
    said = " ".join(remarks(read_run(folder)))
    assert "has not ended" in said and "From step 2 on the loss is not a number" in said
    assert "best at step 1 (0.3000) and has become worse" in said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(4.6, "5 s"), (59.7, "1 min 0 s"), (725, "12 min 5 s"), (12000, "3 h 20 min")],
)
def test_times(seconds, said):
    assert show_seconds(seconds) == said


# ---- a merge of it


def test_the_newest_merge_beside_it_is_found(folder):
    assert read_merge(folder, None) is None
    old, new = merged(folder, "old", format="fp16"), merged(folder, "new")
    merged(folder, "others", adapters={"/elsewhere": 1.0})
    (merged(folder, "broken") / "merge_report.json").write_text("{")
    os.utime(old / "merge_report.json", (1, 1))
    assert read_merge(folder, None)["format"] == "bf16"
    os.utime(new / "merge_report.json", (0, 0))
    assert read_merge(folder, None)["format"] == "fp16"
    assert read_merge(folder, str(new))["format"] == "bf16"


@pytest.mark.parametrize(
    ("adapter", "found"), [("my run", True), ("elsewhere/my run", False), ("run", False)]
)
def test_a_merge_that_was_started_elsewhere(adapter, found, folder):
    merged(folder, "merged", adapters={adapter: 1.0})
    assert (read_merge(folder, None) is not None) is found


def test_a_merge_that_was_not_measured(folder):
    found = Page(page(read_run(folder), {**MERGE, "verify": None, "layers": {}}))
    assert "was not measured" in found.words and found.tags.count("svg") == 1


# ---- the command


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qlora.report", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_the_command(folder):
    done = command(folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert str(folder / "report.html") in done.stdout
    assert next_commands(folder, merged=False)[-1] in done.stdout
    assert Page((folder / "report.html").read_text(encoding="utf-8")).words
    assert [p.name for p in folder.iterdir() if "partial" in p.name] == []


def test_it_needs_no_torch(folder):
    """A report is there at once."""
    code = (
        "import sys, qlora.apps.report as r; r.report(r.ReportConfig(sys.argv[1]));"
        "assert not {'torch', 'transformers', 'datasets'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, check=True, capture_output=True)


def test_the_flag_may_be_left_out():
    def parse(*words):
        return cli.parse(ReportConfig, words, prog="python -m qlora.report")

    assert parse("out") == parse("--adapter", "out") == ReportConfig("out")
    assert parse("out", "--merged", "m") == ReportConfig("out", "m")
    with pytest.raises(UserError, match="no flag takes more"):
        parse("out", "more")
    with pytest.raises(UserError, match="missing --adapter"):
        parse()


def test_a_page_is_not_half_written(folder, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "page", stop)
    with pytest.raises(KeyboardInterrupt):
        write_report(ReportConfig(str(folder)))
    assert not (folder / "report.html").exists()


BAD = {
    "no folder": (shutil.rmtree, "holds no run: give an --output-dir"),
    "no run": (lambda f: (f / "run.yaml").unlink(), "holds no run: give an --output-dir"),
    "not ours": (lambda f: (f / "run.yaml").write_text("a: 1\n"), "is not what train.py writes"),
    "not yaml": (lambda f: (f / "run.yaml").write_text("a: [\n"), "is not what train.py writes"),
    "no rows": (lambda f: (f / "metrics.jsonl").unlink(), "has logged nothing yet"),
    "no loss": (
        lambda f: (f / "metrics.jsonl").write_text('{"step": 1, "eval_loss": 1.0}\n'),
        "has logged nothing yet",
    ),
    "half a file": (
        lambda f: (f / "metrics.jsonl").write_text(lines(ROWS)[:-9]),
        'metrics.jsonl, line 12: a JSON object is wanted, got \'{"step": 10',
    ),
    "other rows": (
        lambda f: (f / "metrics.jsonl").write_text('{"loss": 1.0}\n'),
        "line 1: it has no step",
    ),
    "half the samples": (
        lambda f: (f / "samples.jsonl").write_text('{"prompt": "a", "wan'),
        "samples.jsonl, line 1: a JSON object is wanted",
    ),
    "no text": (
        lambda f: (f / "metrics.jsonl").write_bytes(b'{"step\xff'),
        "metrics.jsonl, line 1: a JSON object is wanted",
    ),
    "other samples": (
        lambda f: (f / "samples.jsonl").write_text('{"question": "a"}\n'),
        "samples.jsonl, line 1: it has no prompt, wanted, before, after",
    ),
}


@pytest.mark.parametrize(("damage", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_one_clear_line(damage, said, folder):
    damage(folder)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        write_report(ReportConfig(str(folder)))
    assert "\n" not in str(error.value)
    assert not (folder / "report.html").exists()


def test_a_folder_that_cannot_be_written_to(folder, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(UserError, match=r"no write permission for .*: copy it, and report on the"):
        write_report(ReportConfig(str(folder)))
    assert not (folder / "report.html").exists()


def test_bad_input_exits_with_2(folder):
    (folder / "metrics.jsonl").unlink()
    done = command(folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_merged_has_to_be_a_merge(folder):
    with pytest.raises(
        UserError, match=r"holds no complete merge_report.json: give an --output-dir"
    ):
        write_report(ReportConfig(str(folder), merged=str(folder)))
