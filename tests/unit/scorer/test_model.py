"""The scorer: what it reads, that training and decoding see the same numbers, and its files."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from tests.unit.scorer.conftest import NEW, NUM_DRAFTS
from verl_speculator.decoding import DraftModel, speculative_generate
from verl_speculator.errors import CheckpointError, ConfigError, MissingFileError
from verl_speculator.scorer.config import DRAFT_SCALARS, SCALARS, ScoringModelConfig
from verl_speculator.scorer.features import draft_scalars, head_features
from verl_speculator.scorer.model import AutoModelForSPDScoring
from verl_speculator.scorer.rule import ScorerRule

HIDDEN = 32
ALL = (*SCALARS, *DRAFT_SCALARS)


def stirred(actor, seed=0):
    """A scorer that has an opinion: fresh ones say the same of everything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in actor.named_parameters():
            if "head.out" in name or "lora_B" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return actor


class Seen:
    """Accepts what a scorer does, and keeps what it was shown."""

    def __init__(self, rule, explore):
        self.rule, self.explore = rule, explore
        self.needs_draft_logits, self.target_calls = True, rule.target_calls
        self.rounds = []

    def accepts(self, verification):
        self.rounds.append((verification, self.rule.scores(verification)))
        return self.rounds[-1][1] >= 0.5 if self.explore else torch.zeros_like(verification.matches)


def shown(target, draft_model, actor, questions):
    seen = Seen(ScorerRule(actor), explore=True)
    ids = torch.tensor([[0] * (8 - len(q.tokens)) + q.tokens for q in questions])
    mask = torch.tensor([[0] * (8 - len(q.tokens)) + [1] * len(q.tokens) for q in questions])
    drafter = DraftModel(draft_model, NUM_DRAFTS)
    result = speculative_generate(target.model, drafter, ids, mask, max_new_tokens=NEW, lossy_rule=seen)
    return seen.rounds, result


def test_scalars_by_hand(target, draft_model, questions):
    actor = AutoModelForSPDScoring.from_config(ScoringModelConfig(HIDDEN), target.model)
    rounds, _ = shown(target, draft_model, actor, questions)
    verification = rounds[1][0]
    found = draft_scalars(verification, ALL)

    for row in range(len(verification.rows)):
        context = verification.tokens[row, -int(verification.context_lengths[row]) :].tolist()
        text = context + verification.drafts[row].tolist()
        with torch.no_grad():
            logits = target.model(torch.tensor([text])).logits[0, len(context) - 1 :].double()
            # What the drafter chose from, without its cache.
            q = draft_model(torch.tensor([text])).logits[0, len(context) - 1 :].double()
        own = logits.argmax(-1).tolist()
        for slot, token in enumerate(verification.drafts[row].tolist()):
            p = logits[slot].softmax(-1)
            matches = [text[len(context) + after] == own[after] for after in range(slot + 1, NUM_DRAFTS)]
            run = matches.index(False) if False in matches else len(matches)
            expected = {
                "draft_logprob": p[token].log(),
                "target_logprob": p.max().log(),
                "margin": logits[slot].max() - logits[slot][token],
                "entropy": -(p * p.log()).sum(),
                "rank": (1.0 + (p > p[token]).sum()).log(),
                "position": torch.tensor(
                    1.0 + len(context) + slot - len(questions[verification.rows[row]].tokens)
                ).log(),
                "following_matches": torch.tensor(float(run)),
                "following_drafts": torch.tensor(float(NUM_DRAFTS - 1 - slot)),
                "kl": (p * (p.log() - q[slot].log_softmax(-1))).sum(),
                "draft_confidence": q[slot].log_softmax(-1)[token],
            }
            by_hand = torch.stack([expected[name].double() for name in ALL]).float()
            torch.testing.assert_close(found[row, slot], by_hand, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("lookahead", [0, 2])
def test_training_and_decoding_judge_alike(target, draft_model, questions, lora_rank, lookahead):
    config = ScoringModelConfig(HIDDEN, lora_rank=lora_rank, lookahead=lookahead, scalars=ALL, inner_dim=16)
    torch.manual_seed(0)
    actor = stirred(AutoModelForSPDScoring.from_config(config, target.model))
    rounds, _ = shown(target, draft_model, actor, questions)
    spread = []
    for verification, scores in rounds[:4]:
        scalars = draft_scalars(verification, ALL)
        for row in range(len(verification.rows)):
            context = verification.tokens[row, -int(verification.context_lengths[row]) :]
            ids = torch.cat([context, verification.drafts[row]])
            start, pad = len(context), 3
            # A window as training has it, padded on the right.
            window = torch.cat([ids, ids.new_zeros(pad)])[None]
            target_ids = torch.full_like(window, -1)
            target_ids[0, start : start + NUM_DRAFTS] = verification.target_tokens[row, :-1]
            beside = torch.full((1, window.size(1), len(ALL)), 9.0)
            beside[0, start : start + NUM_DRAFTS] = scalars[row]
            draft_mask = torch.zeros_like(window)
            draft_mask[0, start : start + NUM_DRAFTS] = 1
            mask = torch.ones_like(window)
            mask[0, -pad:] = 0
            logits = actor(window, mask, target_ids=target_ids, scalars=beside, draft_mask=draft_mask).logits
            assert logits.shape == (1, window.size(1), 2)
            accept = logits.softmax(-1)[0, :, 1]
            torch.testing.assert_close(accept[start : start + NUM_DRAFTS], scores[row], atol=1e-5, rtol=1e-4)
            # What is not decided is accepted for certain: no action there has any weight.
            log_probs = logits.log_softmax(-1)[0, :, 1]
            undecided = torch.cat([torch.arange(start), torch.arange(start + NUM_DRAFTS, window.size(1))])
            assert log_probs[undecided].eq(0).all()
            matched = verification.matches[row].nonzero().flatten() + start
            assert log_probs[matched].eq(0).all()
            spread += scores[row][~verification.matches[row]].tolist()
    assert max(spread) - min(spread) > 0.05, "a scorer without an opinion agrees with anything"


def test_lookahead_sees_the_next_drafts_and_nothing_past_the_end():
    hidden = torch.arange(4.0)[None, :, None] + 1  # [1, k + 1, 1]: 1, 2, 3, 4
    matches = torch.tensor([[False, True, True]])
    drafted = torch.tensor([[True, True, False]])
    found = head_features(
        hidden, matches, drafted, torch.full((1, 3, 1), 7.0), torch.full((1, 3, 1), 5.0), lookahead=2, use_states=True
    )

    # before, after, the target's token; for each of the next two: state, is there one, does it match; the scalar.
    assert found[0, 0].tolist() == [1, 2, 7, 3, 1, 1, 0, 0, 0, 5]
    assert found[0, 1].tolist() == [2, 3, 7, 0, 0, 0, 0, 0, 0, 5]
    assert found.size(-1) == ScoringModelConfig(1, lookahead=2, scalars=("rank",)).num_features


def test_a_fresh_scorer_is_as_biased_as_it_is_told(target, draft_model, questions):
    config = ScoringModelConfig(HIDDEN, accept_bias=2.0)
    actor = AutoModelForSPDScoring.from_config(config, target.model)
    rounds, _ = shown(target, draft_model, actor, questions)
    verification, scores = rounds[0]

    expected = torch.where(verification.matches, 1.0, torch.tensor(2.0).sigmoid())
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_files_hold_the_scorer_alone_and_give_its_scores_back(target, draft_model, questions, tmp_path, lora_rank):
    config = ScoringModelConfig(
        HIDDEN, lora_rank=lora_rank, inner_dim=16, threshold=0.7, thresholds_by_position=((4, 0.6),)
    )
    actor = stirred(AutoModelForSPDScoring.from_config(config, target.model))
    actor.save_pretrained(tmp_path)

    again = AutoModelForSPDScoring.from_pretrained(tmp_path, target.model)

    assert again.scoring_config == config
    verification, _ = shown(target, draft_model, actor, questions)[0][0]
    assert torch.equal(again.score_tokens(verification), actor.score_tokens(verification))
    saved = load_file(tmp_path / "model.safetensors")
    assert all(name.startswith(("head.", "lora.")) for name in saved)
    assert any("lora_A" in name for name in saved) == bool(lora_rank)
    assert sum(tensor.numel() for tensor in saved.values()) < sum(p.numel() for p in target.model.parameters())


def test_lora_shares_the_targets_weights_and_leaves_it_alone(target):
    ids = torch.tensor([[4, 8, 15, 16]])
    with torch.no_grad():
        before = target.model(ids).logits
    actor = stirred(AutoModelForSPDScoring.from_config(ScoringModelConfig(HIDDEN, lora_rank=2), target.model))

    with torch.no_grad():
        assert torch.equal(target.model(ids).logits, before)
        assert not torch.equal(actor.states(ids, None, None), target.model.get_decoder()(ids).last_hidden_state)
    own = {parameter.data_ptr() for parameter in target.model.parameters()}
    names = dict(actor.backbone.named_parameters())
    frozen = [parameter for parameter in names.values() if not parameter.requires_grad]
    assert {parameter.data_ptr() for parameter in frozen} <= own
    trained = {name for name, parameter in actor.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name or name.startswith("head.") for name in trained)


def test_only_the_head_trains_on_a_frozen_target(target):
    actor = AutoModelForSPDScoring.from_config(ScoringModelConfig(HIDDEN), target.model).train()

    trained = {name for name, parameter in actor.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in actor.named_parameters() if name.startswith("head.")}
    assert not actor.backbone.training
    assert actor.target_calls == 0


def test_what_a_user_can_do_wrong(target, tmp_path):
    with pytest.raises(ConfigError, match="hidden_size=33 of the scorer is not the target's, 32"):
        AutoModelForSPDScoring.from_config(ScoringModelConfig(33), target.model)
    with pytest.raises(ConfigError, match="target_model_path"):
        AutoModelForSPDScoring.from_config(ScoringModelConfig(32))
    with pytest.raises(ConfigError, match=r"'lora_rnk'.*'lora_rank' is meant"):
        ScoringModelConfig.from_dict({"hidden_size": 3, "lora_rnk": 1})
    with pytest.raises(ConfigError, match="'speed' is none of"):
        ScoringModelConfig(3, scalars=("speed",))
    with pytest.raises(ConfigError, match="threshold=2"):
        ScoringModelConfig(3, threshold=2)
    with pytest.raises(MissingFileError, match=r"no config\.json"):
        AutoModelForSPDScoring.from_pretrained(tmp_path, target.model)

    actor = AutoModelForSPDScoring.from_config(ScoringModelConfig(32, inner_dim=8), target.model)
    actor.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "inner_dim": 9}))
    with pytest.raises(CheckpointError, match=r"has shape .*8.* and should have .*9"):
        AutoModelForSPDScoring.from_pretrained(tmp_path, target.model)
    (tmp_path / "config.json").write_text(json.dumps({**values, "num_layers": 2}))
    with pytest.raises(CheckpointError, match="missing or too much"):
        AutoModelForSPDScoring.from_pretrained(tmp_path, target.model)
    (tmp_path / "config.json").write_text(json.dumps({**values, "model_type": "llama"}))
    with pytest.raises(CheckpointError, match="not of a scorer"):
        AutoModelForSPDScoring.from_pretrained(tmp_path, target.model)


def test_an_ensemble_averages(target, draft_model, questions):
    config = ScoringModelConfig(HIDDEN)
    actors = [stirred(AutoModelForSPDScoring.from_config(config, target.model), seed) for seed in (1, 2)]
    verification, _ = shown(target, draft_model, actors[0], questions)[0][0]

    both = ScorerRule(actors, threshold=0.5)

    expected = (actors[0].score_tokens(verification) + actors[1].score_tokens(verification)) / 2
    torch.testing.assert_close(both.scores(verification), expected)
    warmer = dataclasses.replace(config, temperature=2.0)
    softened = AutoModelForSPDScoring.from_config(warmer, target.model)
    softened.head.load_state_dict(actors[0].head.state_dict())
    logit = actors[0].score_tokens(verification).logit()
    undecided = verification.mismatches
    torch.testing.assert_close(softened.score_tokens(verification).logit()[undecided], logit[undecided] / 2)
    softened.scoring_config = dataclasses.replace(warmer, score_mean=0.5, score_scale=3.0)
    normalised = (logit[undecided] - 0.5) / (3.0 * 2.0)
    torch.testing.assert_close(softened.score_tokens(verification).logit()[undecided], normalised)


def test_thresholds_may_depend_on_the_place(target, draft_model, questions):
    config = ScoringModelConfig(HIDDEN, threshold=1.0, thresholds_by_position=((3, 0.0), (5, 1.0)))
    actor = AutoModelForSPDScoring.from_config(config, target.model)
    rounds, _ = shown(target, draft_model, actor, questions)
    seen = set()

    for verification, _ in rounds:
        accepts = ScorerRule(actor).accepts(verification)[verification.mismatches]
        places = verification.positions[verification.mismatches]
        assert accepts.tolist() == [3 <= place < 5 for place in places.tolist()]
        seen |= set(accepts.tolist())
        assert ScorerRule(actor, threshold=0.0).accepts(verification).all()
    assert seen == {True, False}
    with pytest.raises(ConfigError, match="in ascending order"):
        ScoringModelConfig(3, thresholds_by_position=((5, 0.1), (3, 0.2)))
