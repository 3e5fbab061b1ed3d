"""Rows of training: those of verl's dataset where it can render a chat, and tokens as they are."""

from __future__ import annotations

import dataclasses

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.support.templates import tokenizer_of
from tests.support.tiny import tiny_tokenizer, write_chats
from verl_speculator.data import training_rows
from verl_speculator.data.token_rows import tokenizer_fingerprint
from verl_speculator.data.training_rows import RowSettings, TrainingRows
from verl_speculator.errors import DataError

SETTINGS = RowSettings("data.train_files", max_length=512)


def write_tokens(path, rows: list[tuple[list[int], list[int]]], **columns):
    mark = tokenizer_fingerprint(tiny_tokenizer())
    ids, masks = ([list(row[k]) for row in rows] for k in (0, 1))
    table = {"input_ids": ids, "loss_mask": masks, "tokenizer": [mark] * len(rows), **columns}
    pq.write_table(pa.table({name: column for name, column in table.items() if column is not None}), path)
    return str(path)


def read(rows: TrainingRows) -> list[tuple[list[int], list[int]]]:
    return [(item["input_ids"].tolist(), item["loss_mask"].tolist()) for item in (rows[i] for i in range(len(rows)))]


@pytest.mark.parametrize("family", ["tiny", "chatml", "llama31"])
def test_chats_are_those_of_verls_dataset(family, tmp_path):
    from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

    tokenizer = tiny_tokenizer() if family == "tiny" else tokenizer_of(family)
    file = write_chats(tmp_path / "chats.parquet", 12)
    several = [
        [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2  w3"}] * 2,
        [{"role": "user", "content": "é"}, {"role": "assistant", "content": "w4\n😀"}],
    ]
    pq.write_table(pa.table({"messages": pq.read_table(file)["messages"].to_pylist() + several}), file)
    if family == "llama31":  # verl's cuts away what it takes for a system turn, which this template always has
        several = []
    settings = {"pad_mode": "no_padding", "max_length": 40, "truncation": "right"}
    theirs = MultiTurnSFTDataset(str(file), tokenizer, settings)
    ours = TrainingRows([str(file)], tokenizer, dataclasses.replace(SETTINGS, max_length=40))
    assert len(ours) == len(theirs) == 14
    for index in range(14):
        assert ours[index].keys() == theirs[index].keys()
        for name, value in theirs[index].items():
            assert torch.equal(ours[index][name], value), (index, name)
            assert ours[index][name].dtype == value.dtype


def test_tokens_are_taken_as_they_are_next_to_chats(tmp_path):
    tokenizer = tiny_tokenizer()
    chats = write_chats(tmp_path / "chats.parquet", 3)
    rows = [([5, 6, 7, 2], [0, 0, 1, 1]), ([9, 8], [0, 1])]
    tokens = write_tokens(tmp_path / "tokens.parquet", rows)
    got = read(TrainingRows([tokens, str(chats), tokens], tokenizer, SETTINGS))
    alone = read(TrainingRows([str(chats)], tokenizer, SETTINGS))
    assert got == [*rows, *alone, *rows]
    cut = read(TrainingRows([tokens], tokenizer, dataclasses.replace(SETTINGS, max_length=3)))
    assert cut == [([5, 6, 7], [0, 0, 1]), rows[1]]


def test_rows_are_made_once(tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    file = str(write_chats(tmp_path / "chats.parquet", 3))
    first = read(TrainingRows([file], tokenizer, SETTINGS))
    with monkeypatch.context() as patch:
        patch.setattr(training_rows, "render_chat", None)
        # Another process, or another run with another cut.
        assert read(TrainingRows([file], tiny_tokenizer(), dataclasses.replace(SETTINGS, max_length=500))) == first
    # Another template or another file: other rows.
    other = tokenizer_of("chatml")
    assert read(TrainingRows([file], other, SETTINGS)) != first
    write_chats(tmp_path / "chats.parquet", 3, seed=5)
    assert read(TrainingRows([file], tokenizer, SETTINGS)) != first


@pytest.mark.parametrize("shuffle", [False, True])
def test_some_rows_of_all(tmp_path, shuffle):
    rows = [([i], [1]) for i in range(20)]
    tokens = write_tokens(tmp_path / "tokens.parquet", rows)
    settings = dataclasses.replace(SETTINGS, max_samples=6, shuffle=shuffle, seed=3)
    got = read(TrainingRows([tokens], tiny_tokenizer(), settings))
    assert len(got) == 6
    assert all(row in rows for row in got)
    assert (got == rows[:6]) is not shuffle


@pytest.mark.parametrize(
    ("rows", "columns", "words"),
    [
        (
            [([1, 2], [1])],
            {},
            r"row 0, must have as many entries in 'loss_mask' as in 'input_ids'.*: they have 1 and 2",
        ),
        ([([1], [1]), ([], [])], {}, "row 1, must have as many entries .* at least one"),
        ([([1, 999], [1, 1])], {}, r"row 0, has tokens outside of the \d+ of the tokenizer"),
        ([([1], [1])], {"tokenizer": None}, "holds tokens and has no column 'tokenizer' that says whose"),
        (
            [([1], [1])],
            {"tokenizer": ["another"], "origin": ['{"base": "B"}']},
            r"of another tokenizer \(that of 'B'\)",
        ),
        ([([1], [1])], {"tokenizer": [None]}, "holds tokens of another tokenizer: "),
    ],
)
def test_tokens_that_cannot_be_trained_on(tmp_path, rows, columns, words):
    file = write_tokens(tmp_path / "tokens.parquet", rows, **columns)
    with pytest.raises(DataError, match=rf"^data\.train_files: .*tokens\.parquet'.*{words}") as caught:
        TrainingRows([file], tiny_tokenizer(), SETTINGS)
    assert "\n" not in str(caught.value)


def test_tools_and_thinking_of_a_row(tmp_path):
    tokenizer = tokenizer_of("llama31")
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    table = pa.table({"messages": [messages] * 2, "tools": ['[{"name": "add"}]', None]})
    pq.write_table(table, tmp_path / "chats.parquet")
    texts = [
        tokenizer.decode(ids) for ids, _ in read(TrainingRows([str(tmp_path / "chats.parquet")], tokenizer, SETTINGS))
    ]
    assert ["add" in text for text in texts] == [True, False]

    tokenizer = tokenizer_of("qwen3")
    pq.write_table(pa.table({"messages": [messages] * 2, "enable_thinking": [True, False]}), tmp_path / "chats.parquet")
    rows = read(TrainingRows([str(tmp_path / "chats.parquet")], tokenizer, SETTINGS))
    trained = [tokenizer.decode([t for t, own in zip(*row, strict=True) if own]) for row in rows]
    assert trained == ["<think>\n\n</think>\n\nw2<|im_end|>\n", "w2<|im_end|>\n"]


def test_rows_that_are_too_long_may_be_refused(tmp_path):
    file = write_tokens(tmp_path / "tokens.parquet", [([1] * 5, [1] * 5), ([1] * 9, [1] * 9)])
    settings = dataclasses.replace(SETTINGS, truncation="error", max_length=9)
    assert len(TrainingRows([file], tiny_tokenizer(), settings)) == 2
    with pytest.raises(DataError, match=r"^data\.train_files: a row has 9 tokens, more than data\.max_length=8"):
        TrainingRows([file], tiny_tokenizer(), dataclasses.replace(settings, max_length=8))


def test_a_chat_that_the_template_refuses_is_named(tmp_path):
    messages = [{"role": "system", "content": "w1"}, {"role": "user", "content": "w1"}]
    pq.write_table(pa.table({"messages": [messages]}), tmp_path / "chats.parquet")
    with pytest.raises(DataError, match=r"^data\.train_files: .*chats\.parquet', row 0: the chat template refuses it"):
        TrainingRows([str(tmp_path / "chats.parquet")], tokenizer_of("gemma2"), SETTINGS)
