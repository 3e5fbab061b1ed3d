"""Windows and labels, against the target's own forward on each text, without cache or batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.unit.scorer.conftest import NEW, NUM_DRAFTS
from verl_speculator.decoding import NgramDrafter, generate
from verl_speculator.errors import DataError, MissingFileError
from verl_speculator.scorer.answers import AnswerCheck
from verl_speculator.scorer.config import DRAFT_SCALARS, SCALARS
from verl_speculator.scorer.data import collect_windows
from verl_speculator.scorer.labels import Oracle, mine_labels
from verl_speculator.scorer.windows import UNKNOWN, read_windows, write_windows


@pytest.fixture(scope="module")
def collected(target, draft_model, questions, check):
    from verl_speculator.decoding import DraftModel

    return collect_windows(
        target,
        DraftModel(draft_model, NUM_DRAFTS),
        questions,
        num_drafts=NUM_DRAFTS,
        max_new_tokens=NEW,
        batch_size=4,
        check=check,
    )


@torch.no_grad()
def greedy(target, text, most):
    text = list(text)
    start = len(text)
    while len(text) < most:
        text.append(int(target.model(torch.tensor([text])).logits[0, -1].argmax()))
        if text[-1] in target.stop_tokens:
            break
    return text[start:]


def test_windows_are_where_the_draft_leaves_the_strict_text(target, draft_model, questions, collected):
    windows, scalars, counts = collected
    assert scalars == (*SCALARS, *DRAFT_SCALARS)
    assert counts.num_prompts == len(questions)
    assert counts.num_windows == len(windows) > 6
    assert counts.num_rounds_without_mismatch == counts.num_rounds - len(windows)
    for window in windows:
        question = questions[window.prompt_index]
        strict = question.tokens + greedy(target, question.tokens, len(question.tokens) + NEW)
        start = window.draft_start_idx
        assert window.prompt_length == len(question.tokens)
        assert window.input_ids[:start] == strict[:start]
        assert 1 <= len(window.drafts) <= NUM_DRAFTS
        assert window.mismatches
        # The drafter's own greedy text, and what the target says to it.
        with torch.no_grad():
            drafted = draft_model(torch.tensor([window.input_ids])).logits[0, start - 1 : -1].argmax(-1)
            said = target.model(torch.tensor([window.input_ids])).logits[0, start - 1 :].argmax(-1)
        assert window.drafts == drafted.tolist()
        assert window.target_ids == said.tolist()
        assert not set(window.drafts) & set(target.stop_tokens)
        assert len(window.scalars) == len(window.drafts) == len(window.labels) == len(window.correct)
        assert set(window.labels) == {UNKNOWN}
        assert window.answer == question.answer
        assert [len(row) for row in window.scalars] == [len(scalars)] * len(window.drafts)
    order = [window.prompt_index for window in windows]
    assert order == sorted(order)


def test_strict_calls_are_those_of_the_whole_answer(target, questions, collected):
    windows, _, counts = collected
    calls = {window.prompt_index: window.strict_calls for window in windows}
    for index in calls:
        rounds = [window for window in windows if window.prompt_index == index]
        assert calls[index] >= 1 + len(rounds)
    assert sum(calls.values()) - len(calls) <= counts.num_rounds


def test_a_drafter_without_a_distribution_gives_fewer_scalars(target, questions, check):
    _, scalars, _ = collect_windows(
        target, NgramDrafter(2), questions[:2], num_drafts=2, max_new_tokens=8, batch_size=2, check=check
    )

    assert scalars == SCALARS


def test_exploring_leaves_the_strict_path(target, drafter, questions, check):
    windows, _, _ = collect_windows(
        target, drafter, questions, num_drafts=3, max_new_tokens=NEW, batch_size=4, check=check, explore=1.0
    )

    off = [
        window
        for window in windows
        if window.input_ids[: window.draft_start_idx]
        != (
            questions[window.prompt_index].tokens
            + greedy(target, questions[window.prompt_index].tokens, window.prompt_length + NEW)
        )[: window.draft_start_idx]
    ]
    assert off


def test_labels_say_what_the_target_makes_of_each_mismatch(target, collected, check):
    windows, _, _ = collected

    labelled, counts = mine_labels(target, windows, max_new_tokens=NEW, batch_size=5, check=check)

    def answer(window, end):
        prefix = window.input_ids[: window.draft_start_idx + end]
        text = prefix[window.prompt_length :] + greedy(target, prefix, window.prompt_length + NEW)
        return check.extract(" ".join(str(token) for token in text if token not in target.stop_tokens))

    harmless = harmful = unknown = 0
    for window in labelled:
        strict, astray = answer(window, 0), False
        for slot in range(len(window.drafts)):
            if slot not in window.mismatches:
                assert (window.labels[slot], window.correct[slot]) == (UNKNOWN, UNKNOWN)
                continue
            given = answer(window, slot + 1)
            assert window.correct[slot] == int(given == window.answer)
            if astray:
                assert window.labels[slot] == UNKNOWN
                unknown += 1
                continue
            assert window.labels[slot] == int(given is not None and given == strict)
            harmless += window.labels[slot]
            harmful += 1 - window.labels[slot]
            astray = not window.labels[slot]
    assert (counts.num_harmless, counts.num_harmful, counts.num_unknown) == (harmless, harmful, unknown)
    assert unknown
    assert harmless
    assert harmful


def test_windows_come_back_from_their_file(collected, tmp_path):
    windows, scalars, _ = collected
    write_windows(tmp_path / "w.parquet", windows, scalars, {"num_drafts": 3})

    file = read_windows(tmp_path / "w.parquet")

    rounded = [
        dataclasses.replace(window, scalars=torch.tensor(window.scalars, dtype=torch.float32).tolist())
        for window in windows
    ]
    assert file.windows == rounded
    assert (file.scalars, file.info) == (scalars, {"num_drafts": 3})
    with pytest.raises(MissingFileError, match="scorer data"):
        read_windows(tmp_path / "none.parquet")
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"input_ids": [[1]]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="holds no windows"):
        read_windows(tmp_path / "other.parquet")


def test_no_window_at_all_is_an_error(target):
    with pytest.raises(DataError, match="no windows to label"):
        mine_labels(target, [], max_new_tokens=4, batch_size=2)


def test_the_oracle_saves_calls_and_never_changes_an_answer(target, drafter, questions):
    from verl_speculator.scorer.closed_loop import answer_questions

    # An answer of one digit, so that another text may well have the same.
    check = AnswerCheck(r"(\d)\d* \d+$")
    options = {"num_drafts": NUM_DRAFTS, "max_new_tokens": NEW, "batch_size": 3, "check": check}
    strict = answer_questions(target, drafter, questions, lambda batch: None, **options)

    told = answer_questions(
        target,
        drafter,
        questions,
        lambda batch: Oracle(target, [strict.answers[index] for index in batch], check, NEW),
        **options,
    )

    assert told.answers == strict.answers
    assert sum(told.target_calls) < sum(strict.target_calls)
    assert told.num_lossy_accepted > 0
    for question, tokens in zip(questions, strict.tokens, strict=True):
        ids = torch.tensor([question.tokens])
        plain = generate(target.model, ids, max_new_tokens=NEW, eos_token_id=target.stop_tokens)
        assert tokens == plain.tokens[0]
