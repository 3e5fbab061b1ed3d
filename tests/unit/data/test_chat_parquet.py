from __future__ import annotations

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from verl_speculator.data.chat_parquet import check_chat_file, resolve_files
from verl_speculator.errors import ConfigError, DataError, MissingFileError

KEY = "data.train_files"
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


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
