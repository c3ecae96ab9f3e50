"""Several sources as one, and the rows that are split off to evaluate on."""

import pytest
from conftest import tiny_tokenizer, write_rows

from qlora.config import DataConfig
from qlora.data.mixing import prepare_training
from qlora.data.rows import fingerprint
from qlora.errors import UserError


def texts(rows, tokenizer):
    return [
        text.removesuffix("<|im_end|>") for text in tokenizer.batch_decode(rows["input_ids"][:])
    ]


def prepare(paths, seed=1, **settings):
    tokenizer = tiny_tokenizer()
    config = DataConfig(tuple(map(str, paths)), max_length=64, **settings)
    training, held_out = prepare_training(config, tokenizer, seed=seed, max_length=64, task=TASK)
    parts = [training, *([held_out] if held_out else [])]
    for rows, stats in parts:
        assert set(rows.column_names) == {"input_ids", "labels", "length"}
        assert (stats.rows, stats.tokens) == (len(rows), sum(rows["length"]))
        assert stats.fingerprint in ("", fingerprint(rows))
    return [texts(rows, tokenizer) for rows, _ in parts]


TASK = "causal-lm"


@pytest.fixture
def paths(tmp_path):
    counts = {"a": 300, "b": 90}
    rows = {name: [{"text": f"{name}{i}"} for i in range(n)] for name, n in counts.items()}
    return [write_rows(tmp_path / f"{name}.jsonl", part) for name, part in rows.items()]


def test_sources_are_mixed_by_weight(paths):
    (every,) = prepare(paths)
    assert len(set(every)) == 390
    (mixed,) = prepare(paths, data_weights=(3, 1))
    assert sum(text[0] == "b" for text in mixed) == 90 and len(set(mixed)) == len(mixed) == 360
    assert [mixed] == prepare(paths, data_weights=(0.75, 0.25))
    assert [mixed] != prepare(paths, seed=2, data_weights=(3, 1))
    with pytest.raises(UserError, match=r"--data-weights: 1e-09 of 300 rows is no row of .*b\.js"):
        prepare(paths, data_weights=(1, 1e-9))


def test_eval_share_depends_on_seed_and_contents_only(paths, tmp_path):
    training, held_out = prepare(paths, eval_share=0.1)
    assert len(held_out) == 39 and not {*training} & {*held_out}
    assert len(training) + len(held_out) == 390
    again = prepare(paths[::-1], eval_share=0.1)
    assert [set(part) for part in again] == [{*training}, {*held_out}]
    assert set(prepare(paths, seed=2, eval_share=0.1)[1]) != {*held_out}
    twice = write_rows(tmp_path / "twice.jsonl", [{"text": f"{i % 20}"} for i in range(60)])
    training, held_out = prepare([twice], eval_share=0.1)  # equal rows are on one side
    assert len(held_out) == 6 and not {*training} & {*held_out}
    with pytest.raises(UserError, match=r"0\.99: .* has 1 different rows, of which none is left"):
        prepare([write_rows(tmp_path / "one.jsonl", [{"text": "a"}])], eval_share=0.99)


def test_labels_of_several_sources_are_united(tmp_path):
    films = [{"text": f"{i}", "label": "pos"} for i in range(4)]
    words = [{"sentence": f"{i}", "label": ("neg", "pos")[i % 2]} for i in range(6)]
    sources = [write_rows(tmp_path / "a.jsonl", films), write_rows(tmp_path / "b.jsonl", words)]
    config = DataConfig(tuple(map(str, sources)), max_length=64)
    options = {"max_length": 64, "task": "seq-cls"}
    (rows, stats), _ = prepare_training(config, tiny_tokenizer(), seed=1, **options)
    assert stats.classes == ("neg", "pos") and rows["labels"][:] == [1] * 4 + [0, 1] * 3
