"""Packs against brute force and a slow best fit; batches against transformers' flattening."""

from functools import cache
from math import ceil

import pytest
import torch
from conftest import tiny_tokenizer
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening

from qlora.data.rows import FlatCollator, PackCollator, PackedRows, best_fit_decreasing

CAPACITY = 24
some_lengths = st.lists(st.integers(1, CAPACITY), max_size=60)
quick = settings(max_examples=200, deadline=None, database=None)


def sums(packs: list[list[int]], lengths: list[int]) -> list[int]:
    return sorted(sum(lengths[i] for i in pack) for pack in packs)


@quick
@given(some_lengths)
def test_every_row_is_in_one_pack_and_no_pack_is_too_long(lengths):
    packs = best_fit_decreasing(lengths, CAPACITY)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(0 < total <= CAPACITY for total in sums(packs, lengths))
    assert packs == best_fit_decreasing(lengths, CAPACITY)


@quick
@given(some_lengths)
def test_it_is_best_fit_decreasing(lengths):
    """Against a search through all packs. Of two equally full ones either may be taken."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(free) if room >= length]
        if fitting:
            free[min(fitting, key=free.__getitem__)] -= length
        else:
            free.append(CAPACITY - length)
    packs = best_fit_decreasing(lengths, CAPACITY)
    assert sums(packs, lengths) == sorted(CAPACITY - room for room in free)


def fewest(lengths: tuple[int, ...]) -> int:
    """The fewest packs possible, by trying everything."""

    @cache
    def rest(left: tuple[int, ...], free: tuple[int, ...]) -> int:
        if not left:
            return len(free)
        length, left = left[0], left[1:]
        found = [rest(left, tuple(sorted((*free, CAPACITY - length))))]
        for i, room in enumerate(free):
            if room >= length and room not in free[:i]:
                smaller = (*free[:i], room - length, *free[i + 1 :])
                found.append(rest(left, tuple(sorted(smaller))))
        return min(found)

    return rest(tuple(sorted(lengths, reverse=True)), ())


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.integers(3, CAPACITY), min_size=1, max_size=8))
def test_it_takes_few_packs(lengths):
    """11/9 of the fewest and 6/9 (Dósa, 2007)."""
    packs = best_fit_decreasing(lengths, CAPACITY)
    assert len(packs) <= (11 * fewest(tuple(lengths)) + 6) / 9


def test_many_rows_are_packed_full():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 500, (20_000,), generator=generator).tolist()
    packs = best_fit_decreasing(lengths, 2048)
    assert len(packs) == ceil(sum(lengths) / 2048)  # no fewer are possible


# ---- packs and batches

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9], "length": 5},
    {"input_ids": [15, 16], "labels": [-100, 16], "length": 2},
    {"input_ids": [25, 26, 27], "labels": [-100, -100, 27], "length": 3},
]


def plain(row: dict) -> dict:
    return {name: row[name] for name in ("input_ids", "labels")}


def test_a_pack_is_its_rows_one_after_the_other():
    packed = PackedRows(Dataset.from_list(ROWS), 8)
    assert packed.packs == [[0, 2], [1]] and len(packed) == 2
    assert packed[0] == [ROWS[0], ROWS[2]]
    assert packed.describe() == (
        "packing: 3 rows in 2 of up to 8 tokens, 62.5% full; "
        "--per-device-train-batch-size counts the packed ones"
    )


@pytest.mark.parametrize("as_packs", [True, False], ids=["packs", "rows"])
def test_flat_batches_are_those_of_transformers(as_packs):
    flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    packed = PackedRows(Dataset.from_list(ROWS), 8)
    order = [0, 2, 1] if as_packs else [0, 1, 2]
    wanted = flatten([plain(ROWS[i]) for i in order])
    got = FlatCollator()(list(packed) if as_packs else [plain(row) for row in ROWS])
    assert got.pop("attention_mask").tolist() == [[1] * 10]
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(torch.as_tensor(got[name]), torch.as_tensor(value)), name
    assert got["cu_seq_lens_q"].dtype == torch.int32


def test_padded_packs_end_with_a_row_of_pads():
    tokenizer = tiny_tokenizer()
    packed = PackedRows(Dataset.from_list([*ROWS, ROWS[0]]), 10)
    assert packed.packs == [[0, 3], [2, 1]]
    batch = PackCollator(tokenizer.pad_token_id)(list(packed))
    assert batch["input_ids"].tolist()[1] == [25, 26, 27, 15, 16] + [0] * 11
    assert batch["labels"].tolist()[1] == [-100, -100, 27, -100, 16] + [-100] * 11
    assert batch["position_ids"].tolist()[1] == [0, 1, 2, 0, 1, *range(11)]
    assert batch["attention_mask"].sum(1).tolist() == [10, 5]
    assert batch["labels"][0, 0] == batch["labels"][0, 5] == -100
