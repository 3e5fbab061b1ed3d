from __future__ import annotations

import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.support.tiny import tiny_tokenizer
from verl_speculator.data.chats import read_chats
from verl_speculator.data.prompts import encode_chats, left_pad, name_rows, split_by_length
from verl_speculator.errors import ConfigError, DataError

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


def test_encoded_as_the_template_writes_it(chats, tokenizer) -> None:
    (prompt,) = encode_chats(read_chats([chats([USER, ANSWER])], "messages", None), tokenizer)
    assert tokenizer.decode(prompt.prompt_ids) == "<|im_start|>user w1 w2<|im_end|><|im_start|>assistant "
    assert tokenizer.decode(prompt.answer_ids) == "w3<|im_end|>"


def test_template_that_rewrites_the_prompt_leaves_the_bare_answer(chats, tokenizer) -> None:
    own = tiny_tokenizer()
    own.chat_template = "{% for m in messages %}{{ messages|length }}{{ m['content'] }}{% endfor %}"
    (prompt,) = encode_chats(read_chats([chats([USER, ANSWER])], "messages", None), own)
    assert own.decode(prompt.prompt_ids) == "1w1 w2"
    assert own.decode(prompt.answer_ids) == "w3"


def test_template_mistakes(chats) -> None:
    read = read_chats([chats([USER])], "messages", None)
    own = tiny_tokenizer()
    own.chat_template = "{{ raise_exception('only even turns') }}"
    with pytest.raises(DataError, match=r"row 0: the chat template refuses it \(only even turns\)"):
        encode_chats(read, own)
    own.chat_template = "{# nothing #}"
    with pytest.raises(DataError, match=r"row 0, makes a prompt without tokens"):
        encode_chats(read, own)


def test_batches_are_padded_on_the_left(tokenizer) -> None:
    input_ids, mask = left_pad([[5, 6, 7], [8]], tokenizer, torch.device("cpu"))
    pad = tokenizer.pad_token_id
    assert input_ids.tolist() == [[5, 6, 7], [pad, pad, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    own = tiny_tokenizer()
    own.pad_token = None
    assert left_pad([[5, 6], [8]], own, torch.device("cpu"))[0].tolist() == [[5, 6], [0, 8]]


def test_prompts_that_are_too_long_are_counted_and_named(chats, tokenizer) -> None:
    long = {"role": "user", "content": "w1 " * 40}
    prompts = encode_chats(read_chats([chats([USER], [long], [USER], [long])], "messages", None), tokenizer)
    longest = len(prompts[1].prompt_ids)
    assert split_by_length(prompts, longest + 8, max_new_tokens=8) == (prompts, [])
    assert split_by_length(prompts, None, max_new_tokens=8) == (prompts, [])
    fitting, too_long = split_by_length(prompts, longest + 7, max_new_tokens=8)
    assert [prompt.chat.row for prompt in fitting] == [0, 2]
    assert [prompt.chat.row for prompt in too_long] == [1, 3]
    assert re.fullmatch(r"2 prompts \('.*chats.parquet', row 1; '.*chats.parquet', row 3\) are", name_rows(too_long))
    assert re.fullmatch(
        r"5 prompts \(.*row 1; .*row 3; .*row 1 and 2 more\) are", name_rows([*too_long * 2, fitting[0]])
    )
    assert re.fullmatch(r"1 prompt \(.*row 1\) is", name_rows(too_long[:1]))


def test_data_of_nothing_but_long_prompts(chats, tokenizer) -> None:
    prompts = encode_chats(read_chats([chats([USER])], "messages", None), tokenizer)
    length = len(prompts[0].prompt_ids)
    with pytest.raises(DataError, match=r"1 prompt \(.*row 0\) is too long: the shortest has") as error:
        split_by_length(prompts, length + 7, max_new_tokens=8)
    assert f"leave {length - 1}: lower --max-new-tokens" in str(error.value)
    with pytest.raises(ConfigError, match="--max-new-tokens=64 leaves no room"):
        split_by_length(prompts, 64, max_new_tokens=64)
