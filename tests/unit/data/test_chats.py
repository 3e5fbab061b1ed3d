from __future__ import annotations

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from verl_speculator.data.chats import check_chat_file, check_training_file, read_chats, resolve_files
from verl_speculator.errors import ConfigError, DataError, MissingFileError

KEY = "data.train_files"
USER = {"role": "user", "content": "w1 w2"}
ANSWER = {"role": "assistant", "content": "w3"}


@pytest.fixture
def chats(tmp_path):
    def write(*rows, name="chats.parquet"):
        pq.write_table(pa.table({"messages": list(rows)}), tmp_path / name)
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize("value", ["a.parquet", ["a.parquet"], OmegaConf.create(["a.parquet"])])
def test_one_file_or_a_list(value) -> None:
    assert resolve_files(value, KEY) == ["a.parquet"]


@pytest.mark.parametrize("value", [None, "", [], [3], 3])
def test_no_file(value) -> None:
    with pytest.raises(ConfigError, match=r"^data\.train_files must be a parquet file or a list of them"):
        resolve_files(value, KEY)


def test_counts_rows(chat_data) -> None:
    assert check_chat_file(str(chat_data.train), "messages", KEY) == 64
    assert check_chat_file(str(chat_data.val), "messages", KEY) == 8


def test_other_columns_and_contents_are_welcome(tmp_path) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}], "name": "x"}]
    pq.write_table(pa.table({"id": [1], "chat": [parts], "tools": ["[]"]}), tmp_path / "a.parquet")
    assert check_chat_file(str(tmp_path / "a.parquet"), "chat", KEY) == 1


def test_remote_file_is_not_looked_at() -> None:
    assert check_chat_file("hdfs://somewhere/train.parquet", "messages", KEY) == math.inf


def test_missing_file(tmp_path) -> None:
    with pytest.raises(MissingFileError, match=r"^data\.train_files: .*absent\.parquet' does not exist"):
        check_chat_file(str(tmp_path / "absent.parquet"), "messages", KEY)
    with pytest.raises(MissingFileError, match="is a folder: give the parquet files in it"):
        check_chat_file(str(tmp_path), "messages", KEY)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"messages": []}, "has no rows"),
        ({"prompt": ["x"]}, r"has no column 'messages', only prompt; set data\.messages_key"),
        ({}, "only none at all"),
        ({"messages": [None]}, "must hold lists"),
        ({"messages": ['[{"role": "user"}]']}, "must hold lists"),
        ({"messages": [[{"role": "user"}]]}, "must hold lists"),
        ({"messages": [[]]}, "must hold lists"),
    ],
)
def test_not_chats(tmp_path, columns, message) -> None:
    file = tmp_path / "bad.parquet"
    pq.write_table(pa.table(columns), file)
    with pytest.raises(DataError, match=message) as caught:
        check_chat_file(str(file), "messages", KEY)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("contents", [b"", b"{}", b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_not_parquet(tmp_path, contents) -> None:
    (tmp_path / "bad.parquet").write_bytes(contents)
    with pytest.raises(DataError, match="is not a readable parquet file") as caught:
        check_chat_file(str(tmp_path / "bad.parquet"), "messages", KEY)
    assert "\n" not in str(caught.value)


def test_damaged_in_the_middle(chat_data, tmp_path) -> None:
    whole = chat_data.train.read_bytes()
    (tmp_path / "bad.parquet").write_bytes(whole[:4] + b"\xff" * 400 + whole[404:])
    with pytest.raises(DataError, match="is not a readable parquet file"):
        check_chat_file(str(tmp_path / "bad.parquet"), "messages", KEY)


def test_last_answer_is_dropped_and_kept_as_the_reference(chats) -> None:
    first, second, third = read_chats(
        [chats([USER, ANSWER], [USER, ANSWER, USER], [USER, ANSWER, USER, ANSWER])], "messages", None
    )
    assert (first.asked, first.answer) == ([USER], ANSWER)
    assert (second.asked, second.answer) == ([USER, ANSWER, USER], None)
    assert (third.asked, third.answer) == ([USER, ANSWER, USER], ANSWER)
    assert third.row == 2
    assert third.request == "w1 w2"


def test_limit_takes_the_first_rows_over_all_files(chats) -> None:
    files = [chats([USER], [USER], name="a.parquet"), chats([USER, ANSWER], name="b.parquet")]
    assert [chat.row for chat in read_chats(files, "messages", None)] == [0, 1, 0]
    assert [chat.file for chat in read_chats(files, "messages", 2)] == [files[0]] * 2


@pytest.mark.parametrize("row", [[], [ANSWER], [{"role": "user", "content": None}]])
def test_row_with_nothing_to_answer_is_named(chats, row) -> None:
    file = chats([USER], row)
    with pytest.raises(DataError, match=r"row 1, has nothing to answer"):
        read_chats([file], "messages")


def test_an_earlier_answer_may_be_a_call_of_a_tool(chats) -> None:
    call = {"role": "assistant", "tool_calls": "search"}
    (chat,) = read_chats([chats([USER, call, USER])], "messages")
    assert (chat.asked, chat.answer) == ([USER, call, USER], None)


@pytest.mark.parametrize("row", [None, [None], ["hello"]])
def test_row_that_is_no_list_of_messages_is_named(chats, row) -> None:
    file = chats(["hello"] if row == ["hello"] else [USER], row, name="other.parquet")
    reads = "row 0" if row == ["hello"] else "row 1"
    with pytest.raises(DataError, match=rf"^--data: .*other\.parquet', {reads}, is not a list of messages"):
        read_chats([file], "messages")


def test_files_without_a_chat(chats) -> None:
    file = str(chats([USER]))
    pq.write_table(pq.read_table(file).slice(0, 0), file)
    with pytest.raises(DataError, match=r"^data\.x: .* holds no chat"):
        read_chats([file], "messages", key="data.x")


def test_a_file_of_tokens(tmp_path) -> None:
    file = tmp_path / "tokens.parquet"

    def write(**columns) -> str:
        rows = {"input_ids": [[1, 2]], "loss_mask": [[0, 1]], "tokenizer": ["x"], **columns}
        pq.write_table(pa.table({name: values for name, values in rows.items() if values}), file)
        return str(file)

    assert check_training_file(write(), "messages", KEY) == 1
    with pytest.raises(DataError, match=r"^data\.train_files: .*tokens\.parquet' holds tokens and has no column 'tok"):
        check_training_file(write(tokenizer=None), "messages", KEY)
    with pytest.raises(DataError, match=r"column 'input_ids' must hold lists of integers, not list<.*string>"):
        check_training_file(write(input_ids=[["w1"]]), "messages", KEY)
    with pytest.raises(DataError, match="has no column 'messages', only input_ids, tokenizer"):
        check_training_file(write(loss_mask=None), "messages", KEY)


def test_any_other_training_file_is_one_of_chats(chat_data, tmp_path) -> None:
    assert check_training_file(str(chat_data.train), "messages", KEY) == 64
    assert check_training_file("hdfs://somewhere/train.parquet", "messages", KEY) == math.inf
    (tmp_path / "bad.parquet").write_bytes(b"{}")
    with pytest.raises(DataError, match="is not a readable parquet file"):
        check_training_file(str(tmp_path / "bad.parquet"), "messages", KEY)


def test_tools_of_a_chat(tmp_path) -> None:
    file, tool = tmp_path / "chats.parquet", {"name": "add", "parameters": None}
    for tools in ([tool], json.dumps([{"name": "add"}])):
        pq.write_table(pa.table({"messages": [[USER]] * 2, "tools": [tools, None]}), file)
        assert [chat.tools for chat in read_chats([str(file)], "messages")] == [[{"name": "add"}], None]
    for tools, words in (
        ("add(", "has tools that are not JSON"),
        ('{"name": 1}', "must have a list of tools, not dict"),
    ):
        pq.write_table(pa.table({"messages": [[USER]], "tools": [tools]}), file)
        with pytest.raises(DataError, match=rf"^--data: .*row 0, {words}"):
            read_chats([str(file)], "messages")
