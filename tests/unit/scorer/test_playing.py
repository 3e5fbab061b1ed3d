"""Whole answers with recorded decisions: they are decoding's own, and training sees what they were taken on."""

from __future__ import annotations

import pytest
import torch

from tests.unit.scorer.conftest import NEW, NUM_DRAFTS
from verl_speculator.decoding import DraftModel
from verl_speculator.scorer.closed_loop import SpeculativeDecodingRollout
from verl_speculator.scorer.config import ScoringModelConfig
from verl_speculator.scorer.data import collect_windows
from verl_speculator.scorer.model import AutoModelForSPDScoring
from verl_speculator.scorer.playing import play_answers, score_windows

HIDDEN = 32


@pytest.fixture(params=[0, 3], ids=["frozen", "lora"])
def actor(target, request):
    actor = AutoModelForSPDScoring.from_config(ScoringModelConfig(HIDDEN, lora_rank=request.param), target.model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in actor.named_parameters():
            if "head.out" in name or "lora_B" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return actor


def play(actor, target, draft_model, questions, **options):
    prompts = [question.tokens for question in questions]
    drafter = DraftModel(draft_model, NUM_DRAFTS)
    return play_answers(actor, target, drafter, prompts, max_new_tokens=NEW, num_draft_tokens=NUM_DRAFTS, **options)


def test_by_the_threshold_the_answers_are_those_of_decoding(actor, target, draft_model, questions):
    played = play(actor, target, draft_model, questions, threshold=0.45)
    rollout = SpeculativeDecodingRollout(
        target, DraftModel(draft_model, NUM_DRAFTS), actor, num_drafts=NUM_DRAFTS, max_new_tokens=NEW, threshold=0.45
    )
    decoded = rollout.generate_sequences([question.tokens for question in questions])

    assert [answer.tokens for answer in played] == decoded.tokens
    assert [answer.calls for answer in played] == decoded.target_calls
    accepted = [[one for one in answer.decisions if one.accepted] for answer in played]
    assert sum(map(len, accepted)) >= sum(map(len, decoded.lossy_tokens)) > 0


def test_actions_are_drawn_by_the_recorded_odds_and_again_by_the_same_seed(actor, target, draft_model, questions):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return play(actor, target, draft_model, questions * 3, generator=generator, temperature=0.5)

    one, same, other = draw(0), draw(0), draw(1)
    decisions = [decision for answer in one for decision in answer.decisions]
    expected = torch.tensor([decision.log_odds / 0.5 for decision in decisions]).sigmoid()
    taken = torch.tensor([decision.accepted for decision in decisions]).float()

    assert len(decisions) > 50
    # The number of accepts is a sum of independent draws.
    deviation = (expected * (1 - expected)).sum().sqrt()
    assert abs(taken.sum() - expected.sum()) < 4 * deviation
    assert [answer.tokens for answer in one] == [answer.tokens for answer in same]
    assert [answer.tokens for answer in one] != [answer.tokens for answer in other]


def test_training_sees_what_the_decision_was_taken_on(actor, target, draft_model, questions):
    played = play(actor, target, draft_model, questions, generator=torch.Generator().manual_seed(0))

    for answer in played:
        recorded = torch.tensor([decision.log_odds for decision in answer.decisions])
        if not actor.scoring_config.lora_rank:
            features = torch.stack([decision.features for decision in answer.decisions]).clone()
            assert answer.windows == []
            torch.testing.assert_close(actor.head(features).diff(dim=-1).flatten(), recorded, rtol=1e-5, atol=1e-5)
            continue
        scored = score_windows(actor, [window for window, _ in answer.windows])
        again = [log_odds[slots] for (_, slots), (log_odds, _) in zip(answer.windows, scored, strict=True)]
        torch.testing.assert_close(torch.cat(again), recorded, rtol=1e-4, atol=1e-4)


def test_windows_are_scored_as_decoding_scores_them(actor, target, draft_model, questions):
    windows, scalars, _ = collect_windows(
        target, DraftModel(draft_model, NUM_DRAFTS), questions, num_drafts=NUM_DRAFTS, max_new_tokens=NEW, batch_size=4
    )
    names = actor.scoring_config.scalars
    assert scalars[: len(names)] == names
    strict = play(actor, target, draft_model, questions, threshold=1.1)

    # Strictly decoded, each round with a mismatch is decided once: on its first.
    first = {}
    for window, (log_odds, _) in zip(
        windows, score_windows(actor, [_cut(one, len(names)) for one in windows]), strict=True
    ):
        first.setdefault(window.prompt_index, []).append(float(log_odds[window.mismatches[0]]))
    for index, answer in enumerate(strict):
        assert [decision.log_odds for decision in answer.decisions] == pytest.approx(first.get(index, []), abs=1e-4)
        assert not any(decision.accepted for decision in answer.decisions)


def _cut(window, count):
    from dataclasses import replace

    return replace(window, scalars=[row[:count] for row in window.scalars])
