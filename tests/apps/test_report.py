"""The page of a run: what it says, that it stands alone, and what it refuses."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from conftest import write_rows

from qlora.apps import report
from qlora.apps.report import next_commands, page, read_merge, read_run, remarks, show_seconds
from qlora.config import ReportConfig
from qlora.errors import UserError

FACTS = {
    "config": {"model": "owner/base", "data": "mine.jsonl", "r": 16, "learning_rate": 1.32e-3,
               "target_modules": ["q_proj", "v_proj"], "max_length": 256, "packing": False,
               "eval_data": None},
    "versions": {"qlora": "0.1.0", "torch": "2.13.0"},
    "base": {"resolved": "/somewhere/base"},
    "data": {"training": {"source": "mine.jsonl", "rows": 400, "tokens": 28008, "cut_rows": 3,
                          "supervised_tokens": 10220, "dropped_rows": 0}},
    "device": {"name": "NVIDIA T4", "memory_bytes": 16 * 2**30},
}  # fmt: skip
LOGGED = [
    {"step": i, "epoch": i / 10, "loss": 3 / i, "tokens_per_second": 900.0,
     "peak_bytes": 4 * 2**30, "planned_bytes": 5 * 2**30, "seconds": 61.0 * i}
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run as train.py leaves it, as far as a report reads it."""
    out = tmp_path / "my run"
    out.mkdir()
    (out / "run.yaml").write_text(yaml.safe_dump(FACTS))
    write_rows(out / "metrics.jsonl", LOGGED)
    write_rows(out / "samples.jsonl", SAMPLES)
    (out / "adapter_model.safetensors").touch()
    return out


class Page(HTMLParser):
    """The words, tags and links of a page; its tags must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.tags, self.links, self.open = "", [], [], []
        self.feed(text)
        self.close()
        self.words = " ".join(self.words.split())
        assert self.open == []

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")]

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        self.open += [] if tag in ("meta", "br", "img", "link", "input") else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def test_page_says(folder):
    found = Page(page(read_run(folder), MERGE))
    for said in (
        "my run", "base, fine-tuned on mine.jsonl", "NVIDIA T4", "of 16.0 GiB, 25%",
        "4.00 GiB", "; planned 5.00 GiB", "10 min 10 s", "900 tokens a second", "0.3000",
        "3.0000 at the start",
        "0.4000", "lowest 0.4000, at step 10", "1 × the data", "28,008", "10,220",
        "q_proj, v_proj", "0.00132", "version of torch", "after: ✓ as wanted",
        "(not asked)", "(not asked yet)", "3 training rows had more than 256 tokens",
        "onto the dequantized 4-bit base", "96.15%", "2.00%", "87.5%", "93.8%",
        "python -m qlora.chat --adapter", "my run/run.yaml' --output-dir NEW_FOLDER",
    ):  # fmt: skip
        assert said in found.words, said
    assert found.tags.count("svg") == 2 and found.words.count("✓") == 1
    found = Page(page(read_run(folder), {**MERGE, "verify": None, "layers": {}}))
    assert "was not measured" in found.words and found.tags.count("svg") == 1


def test_page_stands_alone(folder):
    write_rows(folder / "metrics.jsonl", [{**LOGGED[0], "step": i} for i in range(1, 700)])
    (folder / "samples.jsonl").unlink()
    text = page(read_run(folder), MERGE)
    found = Page(text)
    assert not {"script", "link", "iframe", "object", "img"} & {*found.tags}
    assert "image" in found.tags  # a line of many rows, as pixels
    assert all(link.startswith(("#", "data:image/png;")) for link in found.links)
    assert not re.search(r"@import|url\((?!#)|\son\w+=", text)
    addresses = re.findall(r"https?://[^\s\"']*", text)  # of www.w3.org: names of formats
    assert all(address.startswith("http://www.w3.org/") for address in addresses)
    assert "prefers-color-scheme: dark" in text


def test_texts_from_files_are_escaped(folder):
    values = {**FACTS, "config": {**FACTS["config"], "model": EVIL, "data": EVIL}}
    values["data"] = {"training": FACTS["data"]["training"] | {"source": EVIL}}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    evil = {**MERGE, "onto": EVIL, "layers": {"m.0.<b>q": {"delta_over_weight": 0.1, "kept": 1}}}
    found = Page(page(read_run(folder), evil))
    assert found.words.count("<script>alert(1)</script>") >= 5 and "<b>q" in found.words
    assert not {"script", "img"} & {*found.tags}


def test_page_of_an_old_run(folder):
    old = {key: FACTS[key] for key in ("config", "base")}  # no counts of data, no device
    (folder / "run.yaml").write_text(yaml.safe_dump(old))
    write_rows(folder / "metrics.jsonl", [{"step": 1, "loss": 2.0}])
    (folder / "samples.jsonl").unlink()
    words = Page(page(read_run(folder))).words
    assert "2.0000" in words and "Answers before" not in words and "Merge" not in words


def test_remarks_and_seconds(folder):
    shown = [show_seconds(seconds) for seconds in (4.6, 59.7, 725, 12000)]
    assert shown == ["5 s", "1 min 0 s", "12 min 5 s", "3 h 20 min"]
    assert len(remarks(read_run(folder))) == 1  # of the rows that were cut
    (folder / "adapter_model.safetensors").unlink()
    second = {"step": 2, "loss": float("nan"), "eval_loss": 0.5}
    write_rows(folder / "metrics.jsonl", [{"step": 1, "loss": 2.0, "eval_loss": 0.3}, second])
    said = " ".join(remarks(read_run(folder)))
    assert "has not ended" in said and "The loss is not finite from step 2" in said
    assert "lowest at step 1 (0.3000) and has risen since" in said


def merged(folder: Path, name: str, **changes) -> Path:
    out = folder.parent / name
    out.mkdir()
    values = {**MERGE, "adapters": {str(folder): 1.0}, **changes}
    (out / "merge_report.json").write_text(json.dumps(values))
    return out


def test_newest_merge_beside_the_run_is_found(folder):
    assert read_merge(folder, None) is None
    old, new = merged(folder, "old", format="fp16"), merged(folder, "new")
    merged(folder, "others", adapters={"/elsewhere": 1.0})
    (merged(folder, "broken") / "merge_report.json").write_text("{")
    os.utime(old / "merge_report.json", (1, 1))
    assert read_merge(folder, None)["format"] == "bf16"
    os.utime(new / "merge_report.json", (0, 0))
    assert read_merge(folder, None)["format"] == "fp16"
    assert read_merge(folder, str(new))["format"] == "bf16"
    with pytest.raises(UserError, match=r"has no complete merge_report\.json: pass the --output"):
        read_merge(folder, str(folder))


@pytest.mark.parametrize("adapter", ["my run", "elsewhere/my run", "run"])
def test_merge_is_found_by_a_relative_path(adapter, folder):
    merged(folder, "merged", adapters={adapter: 1.0})
    assert (read_merge(folder, None) is not None) is (adapter == "my run")


def test_command_writes_the_page_without_torch(folder):
    code = (
        "import sys; from qlora.apps.report import *; report(ReportConfig(sys.argv[1]));"
        "assert not {'torch', 'transformers', 'datasets'} & {*sys.modules}"
    )
    words = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert str(folder / "report.html") in done.stdout
    assert next_commands(folder, merged=False)[-1] in done.stdout
    assert Page((folder / "report.html").read_text(encoding="utf-8")).words


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("run.yaml", None, "has no run.yaml: pass an --output-dir"),
        ("run.yaml", "a: 1\n", "is not a run file of train.py"),
        ("run.yaml", "a: [\n", "is not a run file of train.py"),
        ("metrics.jsonl", None, "has no training loss yet"),
        ("metrics.jsonl", '{"step": 1, "eval_loss": 1.0}\n', "has no training loss yet"),
        ("metrics.jsonl", '{"step\xff', "line 1: wanted a JSON object"),
        ("metrics.jsonl", '{"loss": 1.0}\n', "line 1: it has no step"),
        ("samples.jsonl", '{"question": "a"}\n', "it has no prompt, wanted, before, after"),
    ],
)
def test_damaged_files_are_named(name, text, said, folder):
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=re.escape(said)):
        report.report(ReportConfig(str(folder)))
    assert not (folder / "report.html").exists()


def test_folder_without_write_permission(folder, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(UserError, match=r"no write permission for .*: copy it, and report on"):
        report.report(ReportConfig(str(folder)))
