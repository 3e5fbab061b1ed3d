"""Chats as tokens: against strings written out by hand, and against verl's dataset where that can render them."""

from __future__ import annotations

import pytest

from tests.support.templates import CHATML, tokenizer_of
from verl_speculator.data.rendering import render_chat
from verl_speculator.errors import DataError

WHERE = "data.train_files: 'chats.parquet', row 3"


def chat(*turns: str) -> list[dict[str, str]]:
    """Turns of the user and the assistant, one after the other; a first one that begins with `system:` is that."""
    system = [{"role": "system", "content": turns[0].removeprefix("system:")}] if turns[0].startswith("system:") else []
    roles = ("user", "assistant")
    others = turns[len(system) :]
    return system + [{"role": roles[i % 2], "content": text} for i, text in enumerate(others)]


def pieces(tokenizer, rendered) -> tuple[str, list[str]]:
    """The whole text, and the parts of it that are trained."""
    parts, before = [], 0
    for token, own in zip(rendered.input_ids, rendered.loss_mask, strict=True):
        if own and not before:
            parts.append([])
        if own:
            parts[-1].append(token)
        before = own
    return tokenizer.decode(rendered.input_ids), [tokenizer.decode(part) for part in parts]


@pytest.mark.parametrize(
    ("family", "turns", "options", "text", "trained"),
    [
        (
            "gemma2",
            ("a", "b ", "c", "d"),
            {},
            "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n"
            "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\nd<end_of_turn>\n",
            ["b<end_of_turn>\n", "d<end_of_turn>\n"],
        ),
        (
            "mistral",
            ("a", "b", "c", "d"),
            {},
            "<s>[INST] a[/INST] b</s>[INST] c[/INST] d</s>",
            [" b</s>", " d</s>"],
        ),
        ("mistral", ("system:s", "a", "b"), {}, "<s>[INST] s\n\na[/INST] b</s>", [" b</s>"]),
        (
            # The earlier answer as it stands before the last question: without the empty reasoning.
            "qwen3",
            ("system:s", "a", "b", "c", "d"),
            {},
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
            "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nd<|im_end|>\n",
            ["b<|im_end|>\n", "<think>\n\n</think>\n\nd<|im_end|>\n"],
        ),
        (
            "qwen3",
            ("a", "<think>\nt\n</think>\n\nb", "c", "<think>\nu\n</think>\n\nd"),
            {"enable_thinking": True},
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
            "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n<think>\nu\n</think>\n\nd<|im_end|>\n",
            ["b<|im_end|>\n", "<think>\nu\n</think>\n\nd<|im_end|>\n"],
        ),
        (
            # The prompt has the empty reasoning already.
            "qwen3",
            ("a", "b", "c", "d"),
            {"enable_thinking": False},
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
            "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nd<|im_end|>\n",
            ["b<|im_end|>\n", "d<|im_end|>\n"],
        ),
        (
            "r1",
            ("system:s", "a", "t</think>b", "c", "d"),
            {},
            "<|begin|>s<|User|>a<|Assistant|>b<|end|><|User|>c<|Assistant|>d<|end|>",
            ["b<|end|>", "d<|end|>"],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 9 else "",
)
def test_a_chat_is_rendered_at_once_and_its_answers_found(family, turns, options, text, trained):
    tokenizer = tokenizer_of(family)
    rendered = render_chat(tokenizer, chat(*turns), WHERE, options=options)
    assert pieces(tokenizer, rendered) == (text, trained)
    assert rendered.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_tools_and_calls_of_them():
    tokenizer = tokenizer_of("llama31")
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        *chat("system:s", "a"),
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": " b"},
    ]
    text, trained = pieces(tokenizer, render_chat(tokenizer, messages, WHERE, tools=[{"name": "add"}]))
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    called = '{"name": "add", "parameters": {"a": 1}}<|eot_id|>'
    assert text == (
        "<|begin|>" + header.format("system") + 'Environment: ipython\n{"name": "add"}\ns<|eot_id|>'
        f"{header.format('user')}a<|eot_id|>{header.format('assistant')}{called}"
        f"{header.format('ipython')}2<|eot_id|>{header.format('assistant')}b<|eot_id|>"
    )
    assert trained == [called, "b<|eot_id|>"]


def test_the_templates_own_marks_come_first():
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = CHATML.replace(
        "m.content + '<|im_end|>\n' }}",
        "'' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
        "{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}",
    )
    _, trained = pieces(tokenizer, render_chat(tokenizer, chat("a", "b", "c", "d"), WHERE))
    assert trained == ["b<|im_end|>", "d<|im_end|>"]


@pytest.mark.parametrize(
    ("family", "turns", "words"),
    [
        ("gemma2", ("system:s", "a", "b"), r"the chat template refuses it \(System role not supported\)"),
        # What the first answer was asked is not in the chat any more.
        ("mistral", ("system:s", "a", "b", "c", "d"), r"renders what came before turn 3 otherwise .* {% generation %}"),
    ],
)
def test_what_cannot_be_rendered_is_one_sentence(family, turns, words):
    with pytest.raises(DataError, match=rf"^data\.train_files: 'chats\.parquet', row 3: .*{words}") as caught:
        render_chat(tokenizer_of(family), chat(*turns), WHERE)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_does_not_know_places_in_the_text():
    with pytest.raises(DataError, match="does not say which text a token stands for"):
        render_chat(object(), chat("a", "b"), WHERE)
