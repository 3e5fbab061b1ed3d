"""The target's own answers: against generation of one prompt at a time, and across interruptions."""

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl_speculator.data import backends
from verl_speculator.data.regeneration import RegenerationSettings, regenerate_answers
from verl_speculator.data.token_rows import tokenizer_fingerprint
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


def answer_alone(target, prompt: list[int]) -> list[int]:
    """Hugging Face's own greedy generation after one prompt."""
    model, tokenizer = target
    with torch.no_grad():
        said = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=6,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=0,
        )
    return said[0, len(prompt) :].tolist()


def expected_row(target, chat: list[tuple[str, str]]) -> tuple[list[int], list[int], list[tuple[str, str]]]:
    """Tokens, their mask and the chat, written out as the tiny template does it."""
    _, tokenizer = target
    ids: list[int] = []
    mask: list[int] = []
    turns: list[tuple[str, str]] = []
    text = ""
    for role, content in [*chat, ("assistant", "")] if chat[-1][0] == "user" else chat:
        if role != "assistant":
            text += f"<|im_start|>{role} {content}<|im_end|>"
            turns.append((role, content))
            continue
        prompt = tokenizer(f"{text}<|im_start|>assistant ", add_special_tokens=False)["input_ids"]
        said = answer_alone(target, ids + prompt)
        assert not set(said[:-1]) & set(tokenizer.all_special_ids), "the model is random: this seed writes text only"
        ids, mask = ids + prompt + said, mask + [0] * len(prompt) + [1] * len(said)
        turns.append((role, tokenizer.decode(said, skip_special_tokens=True)))
        # The template ends the turn of an answer that was cut.
        text = "" if said[-1] == tokenizer.eos_token_id else "<|im_end|>"
    return ids, mask, turns


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
    rows = pq.read_table(output).to_pylist()
    expected = [expected_row(target, chat) for chat in CHATS]
    assert read(output) == [turns for _, _, turns in expected]
    assert [(row["input_ids"], row["loss_mask"]) for row in rows] == [(ids, mask) for ids, mask, _ in expected]
    assert (written.num_chats, written.num_rows, written.num_answers) == (5, 5, 6)
    assert written.num_tokens == sum(sum(mask) for _, mask, _ in expected)
    assert [done for done, _ in seen] == list(range(6))
    assert seen[-1] == (5, 5)
    assert [path.name for path in tmp_path.iterdir() if "answers" in path.name] == ["answers.parquet"]


def test_answers_that_were_cut_are_counted(target, tmp_path):
    model, tokenizer = target
    chats = write(tmp_path / "chats.parquet", CHATS[:1])
    ids, mask, _ = expected_row(target, [("user", "w1 w2")])
    tokens = ids[mask.index(1) :]
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
    """Make generation stop as if the process was killed; returns the list of how many prompts each call had."""
    calls: list[int] = []
    generate = backends.generate

    def interrupted(*args, **kwargs):
        if len(calls) == num_batches:
            raise KeyboardInterrupt
        calls.append(len(args[1]))
        return generate(*args, **kwargs)

    monkeypatch.setattr(backends, "generate", interrupted)
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
    assert pq.read_table(tmp_path / "answers.parquet").equals(pq.read_table(tmp_path / "whole.parquet"))


def test_it_goes_on_with_another_batch_size_and_more_chats(target, tmp_path, monkeypatch):
    source = write(tmp_path / "chats.parquet", CHATS)
    output = tmp_path / "answers.parquet"
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            regenerate_answers(*target, [source], output, SETTINGS, limit=4)
    (parts,) = (tmp_path / "answers.parquet.parts").iterdir()
    done = [json.loads(line)["chat"][0] for line in parts.read_text().splitlines()]
    assert 1 <= len(done) < 4
    # Killed while it wrote a line.
    with parts.open("a") as stream:
        stream.write('{"chat": [3, 0, "')
    calls = interrupt_after(99, monkeypatch)
    regenerate_answers(*target, [source], output, dataclasses.replace(SETTINGS, batch_size=3))
    num_answers = {row: 2 if row == 1 else 1 for row in range(5)}
    assert sum(calls) == sum(num_answers[row] for row in range(5) if row not in done)
    regenerate_answers(*target, [source], tmp_path / "whole.parquet", SETTINGS)
    assert pq.read_table(output).equals(pq.read_table(tmp_path / "whole.parquet"))
    assert not (tmp_path / "answers.parquet.parts").exists()


@pytest.mark.parametrize("change", ["settings", "chats"])
def test_another_run_does_not_take_over_what_is_left(target, tmp_path, monkeypatch, change):
    chats, settings = [chat[:2] for chat in CHATS], SETTINGS
    source = write(tmp_path / "chats.parquet", chats)
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            regenerate_answers(*target, [source], tmp_path / "answers.parquet", settings)
    if change == "settings":
        settings = RegenerationSettings(max_new_tokens=5, batch_size=2)
    else:
        write(source, [[("user", f"{chat[0][1]} w0")] for chat in chats])
    calls = interrupt_after(99, monkeypatch)
    regenerate_answers(*target, [source], tmp_path / "answers.parquet", settings)
    assert sum(calls) == len(chats)


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


@pytest.mark.parametrize("name", ["max_new_tokens", "batch_size", "num_samples"])
def test_settings_out_of_range(name):
    with pytest.raises(ConfigError, match=name):
        RegenerationSettings(**{name: 0})


def test_several_answers_to_each_chat(target, tmp_path):
    settings = dataclasses.replace(SETTINGS, sampling=SamplingParams(1.5), num_samples=3)
    source = write(tmp_path / "chats.parquet", CHATS[:2])
    written = regenerate_answers(*target, [source], tmp_path / "out.parquet", settings)
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [(row["row"], row["sample"]) for row in rows] == [(i, k) for i in range(2) for k in range(3)]
    assert len({str(row["messages"]) for row in rows}) == 6
    assert (written.num_chats, written.num_answers) == (6, 9)
    with pytest.raises(ConfigError, match=r"^--num-samples above 1 needs --temperature above 0"):
        dataclasses.replace(SETTINGS, num_samples=2)


def test_rows_say_how_they_came_about(target, tmp_path):
    model, tokenizer = target
    source = write(tmp_path / "chats.parquet", CHATS[:2])
    regenerate_answers(*target, [source], tmp_path / "out.parquet", SETTINGS)
    # Put together with others, as files are.
    table = pa.concat_tables([pq.read_table(tmp_path / "out.parquet")] * 2)
    for row in table.to_pylist():
        assert row["tokenizer"] == tokenizer_fingerprint(tokenizer)
        origin = json.loads(row["origin"])
        assert origin["base"] == model.config._name_or_path
        assert (origin["temperature"], origin["max_new_tokens"], origin["backend"]) == (0.0, 6, "hf")


@pytest.mark.parametrize("strict", [False, True])
def test_chats_that_do_not_fit_are_left_out_and_counted(target, tmp_path, strict):
    long = " ".join(["w1"] * 300)  # of the base's 256 positions
    chats = [
        CHATS[0],
        [("user", long)],
        [("user", "w1"), ("assistant", "x"), ("user", long), ("assistant", "y"), ("user", "w2")],
    ]
    source = write(tmp_path / "chats.parquet", chats)
    settings = dataclasses.replace(SETTINGS, strict=strict)
    if strict:
        with pytest.raises(DataError, match=r"^--data: .*chats\.parquet', row [12], is too long for the 256 positions"):
            regenerate_answers(*target, [source], tmp_path / "out.parquet", settings)
        return
    written = regenerate_answers(*target, [source], tmp_path / "out.parquet", settings)
    assert (written.num_chats, written.num_rows, written.num_answers, written.num_too_long) == (2, 2, 2, 2)
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["row"] for row in rows] == [0, 2]
    assert [turn["role"] for turn in rows[1]["messages"]] == ["user", "assistant"]


def test_a_context_without_room(target, tmp_path):
    source = write(tmp_path / "chats.parquet", CHATS)
    with pytest.raises(ConfigError, match=r"^--max-new-tokens=256 leaves no room for a prompt in the 256 positions"):
        regenerate_answers(*target, [source], tmp_path / "out.parquet", RegenerationSettings(max_new_tokens=256))
