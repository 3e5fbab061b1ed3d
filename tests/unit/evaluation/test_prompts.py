from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.tiny import tiny_tokenizer
from verl_speculator.errors import ConfigError, DataError
from verl_speculator.evaluation.prompts import check_lengths, encode, read_chats

USER = {"role": "user", "content": "w1 w2"}
ANSWER = {"role": "assistant", "content": "w3"}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def chats(tmp_path):
    def write(*rows, key="messages", name="chats.parquet"):
        pq.write_table(pa.table({key: list(rows)}), tmp_path / name)
        return str(tmp_path / name)

    return write


def test_last_answer_is_dropped_and_kept_as_the_reference(chats) -> None:
    first, second, third = read_chats(
        [chats([USER, ANSWER], [USER, ANSWER, USER], [USER, ANSWER, USER, ANSWER])], "messages", None
    )
    assert (first.messages, first.answer) == ([USER], ANSWER)
    assert (second.messages, second.answer) == ([USER, ANSWER, USER], None)
    assert (third.messages, third.answer) == ([USER, ANSWER, USER], ANSWER)
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
        read_chats([file], "messages", None)


def test_encoded_as_the_template_writes_it(chats, tokenizer) -> None:
    (prompt,) = encode(read_chats([chats([USER, ANSWER])], "messages", None), tokenizer)
    assert tokenizer.decode(prompt.prompt_ids) == "<|im_start|>user w1 w2<|im_end|><|im_start|>assistant "
    assert tokenizer.decode(prompt.answer_ids) == "w3<|im_end|>"


def test_template_that_rewrites_the_prompt_leaves_the_bare_answer(chats, tokenizer) -> None:
    own = tiny_tokenizer()
    own.chat_template = "{% for m in messages %}{{ messages|length }}{{ m['content'] }}{% endfor %}"
    (prompt,) = encode(read_chats([chats([USER, ANSWER])], "messages", None), own)
    assert own.decode(prompt.prompt_ids) == "1w1 w2"
    assert own.decode(prompt.answer_ids) == "w3"


def test_template_mistakes(chats) -> None:
    read = read_chats([chats([USER])], "messages", None)
    own = tiny_tokenizer()
    own.chat_template = "{{ raise_exception('only even turns') }}"
    with pytest.raises(DataError, match=r"refuses .*row 0 \(only even turns\)"):
        encode(read, own)
    own.chat_template = None
    with pytest.raises(ConfigError, match="--chat-template FILE"):
        encode(read, own)


def test_prompts_that_are_too_long_are_counted_and_named(chats, tokenizer) -> None:
    long = {"role": "user", "content": "w1 " * 40}
    prompts = encode(read_chats([chats([USER], [long], [USER], [long])], "messages", None), tokenizer)
    longest = len(prompts[1].prompt_ids)
    check_lengths(prompts, longest + 8, max_new_tokens=8)
    check_lengths(prompts, None, max_new_tokens=8)
    with pytest.raises(DataError, match=r"2 of 4 prompts \(rows 1, 3\)") as error:
        check_lengths(prompts, longest + 7, max_new_tokens=8)
    assert f"row 1, with {longest} tokens" in str(error.value)
    assert f"leave {longest - 1}: lower --max-new-tokens" in str(error.value)
    with pytest.raises(ConfigError, match="--max-new-tokens=64 leaves no room"):
        check_lengths(prompts, 64, max_new_tokens=64)
