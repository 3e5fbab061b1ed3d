"""What a target writes over several turns, as rows of tokens: by templates that leave it as it is and that do not."""

from __future__ import annotations

import pytest

from tests.support.templates import tokenizer_of
from verl_speculator.data.chats import Chat
from verl_speculator.data.conversations import Conversation
from verl_speculator.errors import DataError


def answer_all(tokenizer, asked: list[dict], answers: list[list[int]], options=None, tools=None, room=None):
    """The conversation after its answers, and the prompts that it asked."""
    one = Conversation.of(Chat("chats.parquet", 3, asked, None, tools), 3, 0)
    prompts = []
    for answer in answers:
        prompts.append(one.ask(tokenizer, options or {}, room))
        if prompts[-1] is not None:
            one.take(answer, tokenizer, {tokenizer.eos_token_id})
    return one, prompts


def asking(*questions: str) -> list[dict]:
    """A chat that asks all of these, with other answers."""
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "old"}] for text in questions]
    return [turn for pair in turns for turn in pair][:-1]


def tokens(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def served(tokenizer, messages, **options) -> list[int]:
    """What a server makes of the messages."""
    return tokens(
        tokenizer, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    )


def own(row) -> list[int]:
    return [token for token, mark in zip(row["input_ids"], row["loss_mask"], strict=True) if mark]


@pytest.mark.parametrize("family", ["chatml", "gemma2", "llama31"])
def test_a_template_that_leaves_answers_alone_gives_one_row(family):
    tokenizer = tokenizer_of(family)
    end = tokenizer.eos_token
    said = [tokens(tokenizer, text + end) for text in ("w1 w2", "w3")]
    one, prompts = answer_all(tokenizer, asking("w7", "w8"), said)
    (row,) = one.rows
    # With ordinary tokens, what a server makes of the chat is what the row has.
    first, second = [{"role": "user", "content": text} for text in ("w7", "w8")]
    answer = {"role": "assistant", "content": "w1 w2"}
    assert prompts == [served(tokenizer, [first]), served(tokenizer, [first, answer, second])]
    assert row["input_ids"] == prompts[1] + said[1]
    assert prompts[1][: len(prompts[0]) + len(said[0])] == prompts[0] + said[0]
    assert own(row) == said[0] + said[1]
    assert row["messages"] == [first, answer, second, {"role": "assistant", "content": "w3"}]
    assert (one.num_answers, one.num_tokens, one.num_cut) == (2, len(said[0]) + len(said[1]), 0)


def test_tokens_stay_as_they_were_written():
    tokenizer = tokenizer_of("chatml")
    # Letter by letter, which the tokenizer would not do.
    letters = tokenizer.convert_tokens_to_ids(list("w1Ġw2"))
    assert len(letters) > len(tokens(tokenizer, "w1 w2"))
    said = [*letters, tokenizer.eos_token_id]
    one, prompts = answer_all(tokenizer, asking("w7", "w8"), [said, said])
    (row,) = one.rows
    assert prompts[1][len(prompts[0]) :][: len(said)] == said
    assert own(row) == said * 2
    assert tokenizer.decode(row["input_ids"]) == (
        "<|im_start|>user\nw7<|im_end|>\n<|im_start|>assistant\nw1 w2<|im_end|>\n"
        "<|im_start|>user\nw8<|im_end|>\n<|im_start|>assistant\nw1 w2<|im_end|>"
    )


def test_an_answer_that_was_cut_has_no_end_of_its_own():
    tokenizer = tokenizer_of("chatml")
    said = [tokens(tokenizer, "w1 w2"), tokens(tokenizer, "w3")]
    one, _ = answer_all(tokenizer, asking("w7", "w8"), said)
    (row,) = one.rows
    assert own(row) == said[0] + said[1]
    assert row["input_ids"][-1] == said[1][-1]
    # The template ends the first turn, and not the target.
    assert tokenizer.decode(row["input_ids"]).startswith(
        "<|im_start|>user\nw7<|im_end|>\n<|im_start|>assistant\nw1 w2<|im_end|>\n"
    )
    assert one.num_cut == 2


@pytest.mark.parametrize(
    ("family", "options", "answer"),
    [
        ("r1", {}, "w1\n</think>\n\nw2"),
        ("qwen3", {}, "<think>\nw1\n</think>\n\nw2"),
        # The prompt of the first turn has an empty reasoning that is not in the second.
        ("qwen3", {"enable_thinking": False}, "w2"),
        # The template would strip it.
        ("gemma2", {}, " w2"),
    ],
)
def test_what_a_template_changes_begins_a_row_of_its_own(family, options, answer):
    tokenizer = tokenizer_of(family)
    said = [tokens(tokenizer, answer + tokenizer.eos_token), tokens(tokenizer, "w3" + tokenizer.eos_token)]
    one, prompts = answer_all(tokenizer, asking("w7", "w8"), said, options)
    first, second = [{"role": "user", "content": text} for text in ("w7", "w8")]
    messages = [first, {"role": "assistant", "content": answer}, second]
    assert prompts == [served(tokenizer, [first], **options), served(tokenizer, messages, **options)]
    assert [row["input_ids"] for row in one.rows] == [prompts[0] + said[0], prompts[1] + said[1]]
    assert [own(row) for row in one.rows] == said
    assert one.rows[0]["messages"] == messages[:2]
    assert one.rows[1]["messages"] == [*messages, {"role": "assistant", "content": "w3"}]


def test_tools_and_a_system_turn_are_in_the_prompt():
    tokenizer = tokenizer_of("llama31")
    asked = [{"role": "system", "content": "w5"}, *asking("w7")]
    said = tokens(tokenizer, '{"name": "add"}<|eot_id|>')
    one, (prompt,) = answer_all(tokenizer, asked, [said], tools=[{"name": "add"}])
    assert prompt == served(tokenizer, asked, tools=[{"name": "add"}])
    assert 'ipython\n{"name": "add"}\nw5<|eot_id|>' in tokenizer.decode(prompt)
    assert own(one.rows[0]) == said


def test_a_chat_ends_where_its_context_does():
    tokenizer = tokenizer_of("chatml")
    said = tokens(tokenizer, "w1<|im_end|>")
    room = len(served(tokenizer, asking("w7")))
    one, prompts = answer_all(tokenizer, asking("w7", "w8", "w9"), [said, said], room=room)
    assert prompts[1] is None
    assert one.is_too_long
    assert not one.asked
    assert [own(row) for row in one.rows] == [said]
    assert one.rows[0]["messages"][-1]["content"] == "w1"


def test_a_template_that_refuses():
    asked = [{"role": "system", "content": "w5"}, *asking("w7")]
    with pytest.raises(
        DataError, match=r"^--data: 'chats\.parquet', row 3: the chat template refuses it \(System role"
    ):
        answer_all(tokenizer_of("gemma2"), asked, [[1]])
