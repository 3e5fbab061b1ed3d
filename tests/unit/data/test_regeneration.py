"""The target's own answers: against generation of one prompt at a time, and across interruptions."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl_speculator.data import regeneration
from verl_speculator.data.regeneration import RegenerationSettings, regenerate_answers
from verl_speculator.decoding import SamplingParams
from verl_speculator.errors import ConfigError, DataError

SETTINGS = RegenerationSettings(max_new_tokens=6, batch_size=2)
CHATS = [
    [("user", "w1 w2"), ("assistant", "to be replaced")],
    [("system", "w9"), ("user", "w3"), ("assistant", "old"), ("user", "w4 w5 w6"), ("assistant", "old too")],
    [("user", "w7 w8 w9 w10")],
    [("user", "w11"), ("assistant", "x")],
    [("user", "w12 w13 w14"), ("assistant", "y")],
]


@pytest.fixture(scope="module")
def target(base_model: Path):
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(base_model)


def write(path: Path, chats: list) -> Path:
    rows = [[{"role": role, "content": content} for role, content in chat] for chat in chats]
    pq.write_table(pa.table({"messages": rows, "other": list(range(len(rows)))}), path)
    return path


def read(path: Path) -> list[list[tuple[str, str]]]:
    return [[(turn["role"], turn["content"]) for turn in chat] for chat in pq.read_table(path)["messages"].to_pylist()]


def answer_alone(target, messages: list[tuple[str, str]]) -> tuple[str, list[int]]:
    """Hugging Face's own greedy generation on one conversation: its text and its tokens."""
    model, tokenizer = target
    turns = [{"role": role, "content": content} for role, content in messages]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(
            **prompt, do_sample=False, max_new_tokens=6, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
        )[0, prompt["input_ids"].shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True), tokens.tolist()


def test_every_answer_is_the_models_own(target, tmp_path):
    output = tmp_path / "answers.parquet"
    seen = []
    written = regenerate_answers(
        *target,
        [write(tmp_path / "chats.parquet", CHATS)],
        output,
        SETTINGS,
        report=lambda *counts: seen.append(counts),
    )
    expected, num_tokens = [], 0
    for chat in CHATS:
        turns: list[tuple[str, str]] = []
        for role, content in [*chat, ("assistant", "")] if chat[-1][0] == "user" else chat:
            if role == "assistant":
                content, tokens = answer_alone(target, turns)
                num_tokens += len(tokens)
            turns.append((role, content))
        expected.append(turns)
    assert read(output) == expected
    assert (written.num_chats, written.num_answers, written.num_tokens) == (5, 6, num_tokens)
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert [path.name for path in tmp_path.iterdir() if "answers" in path.name] == ["answers.parquet"]


def test_answers_that_were_cut_are_counted(target, tmp_path):
    model, tokenizer = target
    chats = write(tmp_path / "chats.parquet", CHATS[:1])
    _, tokens = answer_alone(target, [("user", "w1 w2")])
    assert tokenizer.eos_token_id not in tokens, "the model is random: this seed does not end its answer"
    written = regenerate_answers(model, tokenizer, [chats], tmp_path / "out.parquet", SETTINGS)
    assert (written.num_cut, written.num_tokens) == (1, 6)

    # A model with several end tokens names them in its generation config.
    model.generation_config.eos_token_id, before = [tokens[0]], model.generation_config.eos_token_id
    try:
        stopped = regenerate_answers(model, tokenizer, [chats], tmp_path / "out.parquet", SETTINGS)
    finally:
        model.generation_config.eos_token_id = before
    assert (stopped.num_cut, stopped.num_tokens) == (0, 1)


def interrupt_after(num_batches: int, monkeypatch) -> list[int]:
    """Make generation stop as if the process was killed; returns the list that counts the calls."""
    calls: list[int] = []
    generate = regeneration.generate

    def interrupted(*args, **kwargs):
        if len(calls) == num_batches:
            raise KeyboardInterrupt
        calls.append(len(args[1]))
        return generate(*args, **kwargs)

    monkeypatch.setattr(regeneration, "generate", interrupted)
    return calls


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_interrupted_run_goes_on(target, tmp_path, monkeypatch, temperature):
    settings = RegenerationSettings(max_new_tokens=6, batch_size=2, sampling=SamplingParams(temperature))
    chats = [chat[:2] for chat in CHATS if chat[0][0] == "user"]
    source = write(tmp_path / "chats.parquet", chats)
    regenerate_answers(*target, [source], tmp_path / "whole.parquet", settings)

    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            regenerate_answers(*target, [source], tmp_path / "answers.parquet", settings)
    assert not (tmp_path / "answers.parquet").exists()
    calls = interrupt_after(99, monkeypatch)
    regenerate_answers(*target, [source], tmp_path / "answers.parquet", settings)
    assert calls == [2], "the first batch of two was done before"
    assert read(tmp_path / "answers.parquet") == read(tmp_path / "whole.parquet")


def test_another_run_does_not_take_over_what_is_left(target, tmp_path, monkeypatch):
    source = write(tmp_path / "chats.parquet", [chat[:2] for chat in CHATS])
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            regenerate_answers(*target, [source], tmp_path / "answers.parquet", SETTINGS)
    other = RegenerationSettings(max_new_tokens=5, batch_size=2)
    calls = interrupt_after(99, monkeypatch)
    regenerate_answers(*target, [source], tmp_path / "answers.parquet", other)
    assert sum(calls) >= len(CHATS)


def test_sampling_depends_on_the_seed(target, tmp_path):
    source = write(tmp_path / "chats.parquet", CHATS)
    sampling = SamplingParams(temperature=1.5)
    answers = [
        regenerate_answers(*target, [source], tmp_path / f"{i}.parquet", RegenerationSettings(6, 2, sampling, seed))
        and read(tmp_path / f"{i}.parquet")
        for i, seed in enumerate([0, 0, 1])
    ]
    assert answers[0] == answers[1] != answers[2]


def test_a_limit_takes_the_first_chats_of_all_files(target, tmp_path):
    files = [write(tmp_path / f"{i}.parquet", CHATS[:3]) for i in range(2)]
    regenerate_answers(*target, files, tmp_path / "out.parquet", SETTINGS, limit=4)
    assert [chat[0] for chat in read(tmp_path / "out.parquet")] == [
        CHATS[0][0], CHATS[1][0], CHATS[2][0], CHATS[0][0],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("chat", "words"),
    [([("assistant", "hello"), ("user", "x")], "nothing before it"), ([], "nothing to answer")],
)
def test_a_chat_with_nothing_to_answer(target, tmp_path, chat, words):
    files = [write(tmp_path / "good.parquet", CHATS[:3]), write(tmp_path / "bad.parquet", [CHATS[0], chat])]
    with pytest.raises(DataError, match=rf"^--data: .*bad\.parquet', row 1, .*{words}"):
        regenerate_answers(*target, files, tmp_path / "out.parquet", SETTINGS)


@pytest.mark.parametrize("name", ["max_new_tokens", "batch_size"])
def test_settings_out_of_range(name):
    with pytest.raises(ConfigError, match=name):
        RegenerationSettings(**{name: 0})
