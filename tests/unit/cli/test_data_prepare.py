"""`verl-speculator data prepare`: what it reads, what it leaves out, and what it says about that."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl_speculator import cli
from verl_speculator.data.chats import check_chat_file

CHAT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]


@pytest.fixture
def prepare(tmp_path, capsys):
    """Runs the command; its output. Errors are the caller's to expect."""

    def run(*arguments: object, output: str = "out", error: bool = False) -> str:
        command = ["data", "prepare", *map(str, arguments), "--output", str(tmp_path / output)]
        assert cli.main(command) == (2 if error else 0)
        captured = capsys.readouterr()
        return captured.err if error else captured.out

    return run


def messages_in(file: Path) -> list[list[dict[str, str]]]:
    assert check_chat_file(str(file), "messages", "data.train_files") > 0
    return pq.read_table(file).column("messages").to_pylist()


def write_lines(file: Path, rows: list[object]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def chats(count: int) -> list[dict]:
    return [{"messages": [{"role": "user", "content": f"{i}?"}, CHAT[1]], "id": i} for i in range(count)]


def asked(file: Path) -> list[str]:
    return [chat[0]["content"] for chat in messages_in(file)]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_messages_from_every_file_type(tmp_path, prepare, suffix):
    source = tmp_path / f"chats.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(chats(20)), source)
    elif suffix == "json":
        source.write_text(json.dumps(chats(20), indent=1))
    else:
        write_lines(source, chats(20))
    said = prepare(source, "--test-fraction", 0.2)
    train, test = (asked(tmp_path / "out" / f"{split}.parquet") for split in ("train", "test"))
    assert (len(train), len(test)) == (16, 4)
    assert set(train + test) == {f"{i}?" for i in range(20)}
    assert "      16 conversations in" in said


def test_the_split_is_shuffled_by_the_seed_alone(tmp_path, prepare):
    source = write_lines(tmp_path / "chats.jsonl", chats(30))
    splits = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare(source, "--seed", seed, output=folder)
        splits.append(asked(tmp_path / folder / "train.parquet"))
    assert splits[0] == splits[1] != splits[2]
    assert len(splits[0]) == 28


def test_more_chats_than_are_shuffled_together(tmp_path, prepare, monkeypatch):
    monkeypatch.setattr("verl_speculator.data.preparation._ROWS_AT_ONCE", 7)
    prepare(write_lines(tmp_path / "chats.jsonl", chats(40)), "--test-fraction", 0.1)
    train, test = (asked(tmp_path / "out" / f"{split}.parquet") for split in ("train", "test"))
    assert (len(train), len(test)) == (36, 4)
    assert set(train + test) == {f"{i}?" for i in range(40)}


def test_one_file_and_several_sources(tmp_path, prepare):
    folder = tmp_path / "logs" / "more"
    folder.mkdir(parents=True)
    for name in ("logs/a.json", "logs/more/b.jsonl", "c.jsonl"):
        write_lines(tmp_path / name, [{"messages": [{"role": "user", "content": name}, CHAT[1]]}])
    (tmp_path / "logs" / "notes.txt").write_text("no data")
    prepare(tmp_path / "logs", tmp_path / "?.jsonl", output="all.parquet")
    assert sorted(asked(tmp_path / "all.parquet")) == ["c.jsonl", "logs/a.json", "logs/more/b.jsonl"]
    prepare(tmp_path / "logs" / "**" / "*.json*", "--limit", 1, output="some.parquet")
    assert asked(tmp_path / "some.parquet") == ["logs/a.json"]


def test_share_gpt_conversations(tmp_path, prepare):
    conversation = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "2 + 2?"},
        {"from": "gpt", "value": "4"},
    ]
    rows = [{"conversations": conversation}] * 2 + [{"conversations": conversation[:2]}]
    source = write_lines(tmp_path / "chats.jsonl", rows)
    said = prepare(source, "--test-fraction", 0)
    expected = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert messages_in(tmp_path / "out" / "train.parquet") == [expected] * 2
    assert "       1 rows left out: without an answer" in said
    assert "chats.jsonl', line 3)" in said
    assert not (tmp_path / "out" / "test.parquet").exists()
    prepare(source, "--unanswered", output="asked.parquet")
    assert len(messages_in(tmp_path / "asked.parquet")) == 3


def test_prompts_and_responses_with_a_test_file_of_their_own(tmp_path, prepare):
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    train.write_text('rules,ask,say\nBe brief.,2 + 2?,4\n,"a, b?","line\nbreak"\n')
    test.write_text("rules,ask,say\n,1 + 1?,2\n")
    keys = ["--prompt-key", "ask", "--response-key", "say", "--system-key", "rules"]
    prepare(train, "--test-source", test, *keys)
    assert sorted(messages_in(tmp_path / "out" / "train.parquet"), key=len) == [
        [{"role": "user", "content": "a, b?"}, {"role": "assistant", "content": "line\nbreak"}],
        [{"role": "system", "content": "Be brief."}, *CHAT],
    ]
    assert messages_in(tmp_path / "out" / "test.parquet")[0][1]["content"] == "2"


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"question": "a", "answer": "b"}, "a"),
        ({"instruction": "a", "input": "", "output": "b"}, "a"),
        ({"instruction": "Sum up.", "input": "A text.", "output": "b"}, "Sum up.\n\nA text."),
    ],
)
def test_columns_are_known_by_their_names(tmp_path, prepare, row, prompt):
    prepare(write_lines(tmp_path / "rows.jsonl", [row]), output="out.parquet")
    assert messages_in(tmp_path / "out.parquet") == [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": "b"}]
    ]


def test_tools_stay(tmp_path, prepare):
    rows = [{**chats(1)[0], "tools": tools} for tools in ([{"name": "add"}], '[{"name": "add"}]', None)]
    prepare(write_lines(tmp_path / "rows.jsonl", rows), output="out.parquet")
    got = pq.read_table(tmp_path / "out.parquet")["tools"].to_pylist()
    assert sorted(got, key=str) == [None, '[{"name": "add"}]', '[{"name": "add"}]']


def test_a_data_set_that_the_datasets_library_loads(tmp_path, prepare, monkeypatch):
    # With a split a folder goes the way of a name on the hub, without a network.
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        write_lines(folder / f"{split}.jsonl", [{"messages": [{"role": "user", "content": split}, CHAT[1]]}] * 2)
    prepare(folder, "--split", "train", "--test-split", "test")
    for split in ("train", "test"):
        assert asked(tmp_path / "out" / f"{split}.parquet") == [split] * 2


@pytest.mark.parametrize("cut", [0.3, 0.77])
@pytest.mark.parametrize("form", ["array", "lines", "indented"])
@pytest.mark.parametrize("at_once", [5, 1 << 20])
def test_a_file_that_ends_in_the_middle(tmp_path, prepare, monkeypatch, cut, form, at_once):
    monkeypatch.setattr("verl_speculator.data.sources._CHARACTERS_AT_ONCE", at_once)
    rows = [{"id": 1.25, "messages": [{"role": "user", "content": f'{i} "é😀\\ {{['}, CHAT[1]]} for i in range(6)]
    whole = {
        "array": json.dumps(rows),
        "lines": "".join(json.dumps(row) + "\n" for row in rows),
        "indented": json.dumps(rows, indent=1, ensure_ascii=False),
    }[form]
    source = tmp_path / "chats.json"
    source.write_text(whole)
    prepare(source, output="whole.parquet")
    assert sorted(asked(tmp_path / "whole.parquet")) == [row["messages"][0]["content"] for row in rows]

    text = whole[: int(len(whole) * cut)]
    source.write_text(text)
    said = prepare(source, output="cut.parquet")
    kept = len(asked(tmp_path / "cut.parquet"))
    begin = [place.start() for place in re.finditer(r'\{\s*"id"', text)]
    assert kept == len(begin) - 1
    line = text.count("\n", 0, begin[-1]) + 1
    assert f"1 rows left out: the file ends in the middle of the object that begins at character {begin[-1]} " in said
    assert f"chats.json', line {line})" in said
    assert "ends in the middle" in prepare(source, "--strict", output="strict.parquet", error=True)
    assert not (tmp_path / "strict.parquet").exists()


def test_an_array_without_its_end(tmp_path, prepare):
    source = tmp_path / "chats.json"
    source.write_text(json.dumps(chats(2))[:-1])
    assert "the file ends before its array does" in prepare(source, output="out.parquet")
    assert len(messages_in(tmp_path / "out.parquet")) == 2


def test_rows_that_cannot_be_used_are_counted_and_named(tmp_path, prepare):
    good = [json.dumps(row) for row in chats(3)]
    bad = ['{"messages": [}', "[1, 2]", '{"messages": "hi"}', *['{"messages": []}'] * 4]
    (tmp_path / "chats.jsonl").write_text("\n".join([good[0], *bad[:2], good[1], *bad[2:], good[2]]))
    said = prepare(tmp_path / "chats.jsonl", output="out.parquet")
    assert sorted(asked(tmp_path / "out.parquet")) == ["0?", "1?", "2?"]
    file = f"{str(tmp_path / 'chats.jsonl')!r}"
    assert said.splitlines()[1:] == [
        f"       1 rows left out: is not JSON (Expecting value) ({file}, line 2)",
        f"       1 rows left out: is a list and no object ({file}, line 3)",
        f"       1 rows left out: column 'messages' must be a list of messages, not str ({file}, line 5)",
        f"       4 rows left out: empty or without a turn of the user ({file}, line 6; {file}, line 7; {file}, line 8; "
        "...)",
    ]


@pytest.mark.parametrize(
    ("rows", "arguments", "said"),
    [
        ([], [], "no row has a chat that can be used"),
        ([{"text": "hi"}], [], "line 1, has no column 'messages', only text; name its own with --messages-key"),
        ([{"messages": "hi"}], [], "must be a list of messages, not str"),
        ([{"messages": ["hi"]}], [], "must hold messages, not str"),
        ([{"messages": [{"speaker": "a", "text": "b"}]}], [], "keys speaker, text; it needs role and content"),
        ([{"messages": [{"role": "alien", "content": "b"}]}], [], "message of 'alien'; known are system, user"),
        ([{"messages": [*CHAT, {"role": "user", "content": None}]}], [], "without text, such as a call of a tool"),
        ([{"messages": CHAT[:1]}], [], "without an answer"),
        ([{"messages": CHAT}], [], "1 usable conversation is too few"),
        ([{"messages": CHAT}] * 2, ["--test-fraction", "1"], "--test-fraction must be at least 0 and less than 1"),
        ([{"q": 1, "a": "b"}], ["--prompt-key", "q", "--response-key", "a"], "column 'q' must hold text, not int"),
        ([{"q": "a"}], ["--prompt-key", "q"], "--prompt-key and --response-key go together"),
        ([{"q": "a"}], ["--system-key", "q"], "--system-key needs --prompt-key"),
        ([{"messages": CHAT}], ["--test-split", "test"], "--test-source"),
        ([{"messages": CHAT}], ["--limit", "0"], "--limit must be at least 1"),
        ([{"messages": CHAT}, {"messages": []}], ["--strict"], "line 2: empty or without a turn of the user"),
    ],
)
def test_mistakes_in_data_end_in_one_sentence(tmp_path, prepare, rows, arguments, said):
    error = prepare(write_lines(tmp_path / "chats.jsonl", rows), *arguments, error=True)
    assert re.fullmatch(rf"error: .*{re.escape(said)}.*\n", error), error
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gone.jsonl", None, "there is no file"),
        ("gone/*.json", None, "there is no file like"),
        ("broken.parquet", "no parquet", "cannot be read"),
        ("list.json", "[1, 2]", "is a number and no object"),
        ("chats.txt", "hello", "must end in one of"),
    ],
)
def test_unreadable_files_end_in_one_sentence(tmp_path, prepare, name, content, said):
    if content is not None:
        (tmp_path / name).write_text(content)
    assert re.fullmatch(rf"error: .*{said}.*\n", prepare(tmp_path / name, error=True))
