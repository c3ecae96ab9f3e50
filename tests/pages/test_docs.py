"""The API reference builds, README's figures match the records, and the wheel trains and merges."""

import json
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest

import qlora

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8").replace("\u00a0", " ")


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("api")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        import api

        api.write_pages(folder)
    files = folder.rglob("*.html")
    return {".".join(f.relative_to(folder).with_suffix("").parts): f.read_text() for f in files}


def test_names_in_the_docs_have_an_entry(pages):
    """Names like `qlora.training.keep_updates`, and imports from qlora's packages."""
    text = "\n".join(p.read_text() for p in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    named = {*re.findall(r"`(qlora\.\w+\.\w+)", text), *(f"qlora.{name}" for name in qlora.__all__)}
    for module, names in re.findall(r"from (qlora\.\w+) import ([\w, ]+)", text):
        named |= {f"{module}.{name}" for name in names.split(", ")}
    assert len(named) > 20
    for name in named:
        module, _, member = name.rpartition(".")
        assert f'id="{member}"' in pages.get(module, ""), f"{name} has no entry"


def test_docstrings_render(pages):
    """No section is plain text, no formula in italics, no list or table inside a paragraph."""
    for name, page in pages.items():
        for said in re.findall(r'<div class="docstring">(.*?)</section>', page, re.S):
            assert not re.search(r"<p>(Args|Returns|Raises|Yields):", said), (name, said)
            assert not re.search(r"<em>|<strong>(?!\w+:</strong>)", said), (name, said)
            for text in re.findall(r"<p>(.*?)</p>", said, re.S):
                assert not re.search(r" {3}|\n *[-•] ", text), (name, text)


def latest(name: str, *keys: str) -> dict:
    """The last record for each combination of `keys`."""
    lines = (ROOT / f"benchmarks/results/{name}.jsonl").read_text("utf-8").splitlines()
    return {tuple(row[key] for key in keys): row for row in map(json.loads, lines)}


def figures_of_the_readme(step_table) -> Iterator[str]:
    """The cells of its table, from the records."""
    merges = latest("merge", "way", "adapter")

    def gain(way: str, *digits: int) -> str:
        kept = [merges[way, adapter]["kept"] for adapter in ("ad_e2e", "ad_gsm_r16")]
        return " / ".join(f"{100 * k:.{d}f}" for k, d in zip(kept, digits, strict=False)) + " %"

    yield f"| {gain('NF4, calibrated', 1, 1)} | PEFT {gain('NF4 by PEFT', 1, 1)}; "
    yield f"GPTQ {100 * merges['NF4, GPTQ', 'ad_e2e']['kept']:.1f} % (E2E)"
    yield f"| {gain('bf16 onto NF4 (the default)', 2, 1)} | onto the original weights "
    yield f"{gain('bf16 onto the original weights', 1, 1)} |"
    (whole,) = latest("merge_7b").values()
    yield f"{whole['above_torch_resident_bytes'] / 1e9:.2f} GB above torch, "
    yield f"{whole['merge_seconds']:.0f} s |"
    beside = {way: row["peak_resident_bytes"] / 1e6
              for (way,), row in latest("merge_against_peft", "way").items()}  # fmt: skip
    yield f"| {beside['ours, onto the original weights']:.0f} MB | "
    yield f"PEFT {beside['PEFT, base in 16 bits']:.0f} MB |"
    runs = {
        (run["dtype"], run["checkpointing"]): step_table.with_ratios(run["sides"])
        for run in step_table.latest(ROOT / "benchmarks/results/step.jsonl")
    }
    fp32, bf16 = (runs[dtype, True] for dtype in ("float32", "bfloat16"))
    memory = {
        side: " / ".join(f"{run[side]['above_loaded_bytes'] / 2**20:.0f}" for run in (fp32, bf16))
        for side in ("ours", "peft")
    }
    yield f"| {memory['ours']} MiB | PEFT {memory['peft']} MiB |"
    without = [runs[dtype, False]["ours"]["speed"] for dtype in ("float32", "bfloat16")]
    yield f"without checkpointing {without[0]:.2f} / {without[1]:.2f} |"
    yield f"| {fp32['ours']['speed']:.2f} / {bf16['ours']['speed']:.2f} times PEFT's |"
    (cost,) = latest("adapter_cost").values()
    seconds = cost["seconds"]
    ours, peft = (seconds[f"step, {of}DoRA"] / seconds[f"step, {of}LoRA"] for of in ("", "PEFT's "))
    yield f"| {100 * (ours - 1):.0f} % | PEFT {100 * (peft - 1):.0f} % |"


def test_table_matches_the_records(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import step_table

    assert not [figure for figure in figures_of_the_readme(step_table) if figure not in README]


def test_memory_matches_the_notebook():
    book = json.loads((ROOT / "notebooks/03_finetune_7b_on_one_gpu.ipynb").read_text("utf-8"))
    texts = [o["text"] for c in book["cells"] for o in c.get("outputs", ()) if "text" in o]
    sums = dict(re.findall(r"^(\w+\.yaml) .* ([\d.]+ GiB)$", "".join(map("".join, texts)), re.M))
    assert len(sums) == 4
    for recipe, size in sums.items():
        assert re.search(rf"`configs/{recipe}` .*\| {size} \|", README)
        assert f"Planned peak: {size} " in (ROOT / f"configs/{recipe}").read_text("utf-8")


def test_picture_matches_the_records(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import merge_picture

    said = merge_picture.in_words(merge_picture.kept(ROOT / "benchmarks/results/merge.jsonl"))
    drawn = merge_picture.PICTURE.read_text("utf-8").replace("&apos;", "'")
    assert said in drawn, "python benchmarks/merge_picture.py draws it anew"
    (for_the_blind,) = re.findall(r"!\[(.*?)\]\(docs/merge.svg\)", README, re.S)
    for share in re.findall(r"[\d.]+ %", said):
        assert share in for_the_blind


def test_the_wheel_trains_and_merges(tmp_path):
    done = subprocess.run([ROOT / ".ci/dist", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "  train " in done.stdout and "  portable " in done.stdout
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    names = ZipFile(wheel).namelist()
    assert "qlora/apps/report.html" in names and "qlora/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"qlora"}
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("/LICENSE") for name in archive.getnames())
