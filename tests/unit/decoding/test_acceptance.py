"""Acceptance rules at work, against decoding written down without cache, batch or shared code."""

from __future__ import annotations

import math

import pytest
import torch

from tests.unit.decoding.support import build_model, build_noisy_model, greedy_by_transformers, pad_left
from verl_speculator.decoding import (
    DraftModel,
    NgramDrafter,
    SamplingParams,
    generate,
    parse_rule,
    speculative_generate,
)
from verl_speculator.decoding.acceptance import Verification
from verl_speculator.decoding.rules import AcceptAll, EntropyGate, Random
from verl_speculator.errors import ConfigError

PROMPTS = [[5, 9, 2], [17, 3, 8, 44, 21, 6], [30]]
NUM_DRAFTS, NEW = 3, 20


@pytest.fixture(scope="module")
def target():
    return build_model("llama", seed=3)


@pytest.fixture(scope="module")
def draft(target):
    return build_noisy_model("llama", seed=3)


@torch.no_grad()
def by_hand(target, draft, prompt, decide, stop=()):
    """Tokens of one row, places of accepted mismatches, target calls; `decide(p, q, token, following)` is the rule."""
    text, lossy = list(prompt), []
    text.append(int(target(torch.tensor([text])).logits[0, -1].argmax()))
    calls = 1
    while len(text) - len(prompt) < NEW and text[-1] not in stop:
        begin, drafted, q = len(text), list(text), []
        for _ in range(NUM_DRAFTS):
            q.append(draft(torch.tensor([drafted])).logits[0, -1].double())
            drafted.append(int(q[-1].argmax()))
        logits = target(torch.tensor([drafted])).logits[0, begin - 1 :].double()
        own = logits.argmax(-1).tolist()
        calls += 1
        for slot in range(NUM_DRAFTS + 1):
            if slot == NUM_DRAFTS:
                text.append(own[slot])
                break
            token = drafted[begin + slot]
            if token != own[slot]:
                following = [drafted[begin + after] == own[after] for after in range(slot + 1, NUM_DRAFTS)]
                ends = token in stop or own[slot] in stop
                if ends or not decide(logits[slot], q[slot], token, following):
                    text.append(own[slot])
                    break
                lossy.append(len(text) - len(prompt))
            text.append(token)
    answer = text[len(prompt) :][:NEW]
    ended = [place for place, token in enumerate(answer) if token in stop]
    answer = answer[: ended[0] + 1] if ended else answer
    return answer, [place for place in lossy if place < len(answer)], calls


def probability(logits, token):
    return float(logits.softmax(-1)[token])


def rank(logits, token):
    return int((logits > logits[token]).sum())


def divergence(p, q):
    p, q = p.softmax(-1), q.softmax(-1)
    return float((p * (p / q).log()).sum())


def entropy_share(logits):
    p = logits.softmax(-1)
    return float(-(p * p.log()).sum()) / math.log(len(p))


RULES = {
    "accept-all": lambda p, q, token, following: True,
    "probability:0.05": lambda p, q, token, following: probability(p, token) >= 0.05,
    "top-k:3": lambda p, q, token, following: rank(p, token) < 3,
    "kl:0.4": lambda p, q, token, following: divergence(p, q) <= 0.4 and float(p.softmax(-1).max()) <= 0.9,
    "kl:0.4,0.5": lambda p, q, token, following: divergence(p, q) <= 0.4 and float(p.softmax(-1).max()) <= 0.5,
    "margin:0.6": lambda p, q, token, following: rank(p, token) == 1 and p[token] >= 0.6 * p.max() and p[token] > 0,
    "entropy:0.2": lambda p, q, token, following: entropy_share(p) >= 0.2 and following[:1] == [True],
    "entropy:0.2,0": lambda p, q, token, following: entropy_share(p) >= 0.2,
}


@pytest.mark.parametrize("text", RULES)
def test_each_rule_keeps_what_its_definition_says(target, draft, text):
    ids, mask = pad_left(PROMPTS)
    result = speculative_generate(
        target, DraftModel(draft, NUM_DRAFTS), ids, mask, max_new_tokens=NEW, lossy_rule=parse_rule(text)
    )

    expected = [by_hand(target, draft, prompt, RULES[text]) for prompt in PROMPTS]
    assert result.tokens == [tokens for tokens, _, _ in expected]
    assert result.lossy_tokens == [lossy for _, lossy, _ in expected]
    assert result.target_calls == [calls for _, _, calls in expected]
    assert any(result.lossy_tokens), "a rule that accepts nothing here has not been tested"
    strict = greedy_by_transformers(target, PROMPTS, NEW)
    assert result.tokens != strict
    assert result.is_lossy


def test_a_draft_model_changes_nothing_without_a_rule(target, draft):
    ids, mask = pad_left(PROMPTS)

    result = speculative_generate(target, DraftModel(draft, NUM_DRAFTS), ids, mask, max_new_tokens=NEW)
    itself = speculative_generate(target, DraftModel(target, NUM_DRAFTS), ids, mask, max_new_tokens=NEW)

    assert result.tokens == itself.tokens == greedy_by_transformers(target, PROMPTS, NEW)
    assert not result.is_lossy
    assert 1 < result.acceptance_length < itself.acceptance_length == NUM_DRAFTS + 1


class Nothing:
    needs_draft_logits = False
    target_calls = 1

    def accepts(self, verification):
        return torch.zeros_like(verification.matches)


def test_a_rule_that_accepts_nothing_is_strict_and_its_own_forwards_count(target, draft):
    ids, mask = pad_left(PROMPTS)

    strict = speculative_generate(target, DraftModel(draft, NUM_DRAFTS), ids, mask, max_new_tokens=NEW)
    asked = speculative_generate(
        target, DraftModel(draft, NUM_DRAFTS), ids, mask, max_new_tokens=NEW, lossy_rule=Nothing()
    )

    assert asked.tokens == strict.tokens
    assert asked.accepted_per_round == strict.accepted_per_round
    assert asked.lossy_tokens == [[], [], []]
    # One forward more for each round in which something differed.
    differed = [sum(kept < NUM_DRAFTS for kept in rounds) for rounds in strict.accepted_per_round]
    assert asked.scoring_calls == differed
    assert asked.target_forwards.used == strict.target_forwards.used + sum(differed)


def test_where_a_text_ends_is_the_targets_decision(target, draft):
    free = speculative_generate(
        target, DraftModel(draft, NUM_DRAFTS), *pad_left(PROMPTS), max_new_tokens=NEW, lossy_rule=AcceptAll()
    )
    # A token that was let pass though the target would not have said it: as the end of the text it may not.
    row = next(row for row, places in enumerate(free.lossy_tokens) if places)
    stop = free.tokens[row][free.lossy_tokens[row][0]]

    result = speculative_generate(
        target,
        DraftModel(draft, NUM_DRAFTS),
        *pad_left(PROMPTS),
        max_new_tokens=NEW,
        lossy_rule=AcceptAll(),
        eos_token_id=stop,
    )

    expected = [by_hand(target, draft, prompt, RULES["accept-all"], stop=(stop,)) for prompt in PROMPTS]
    assert result.tokens == [tokens for tokens, _, _ in expected]
    for tokens, lossy in zip(result.tokens, result.lossy_tokens, strict=True):
        assert stop not in [tokens[place] for place in lossy]


def test_sampled_decoding_with_accept_all_keeps_every_draft(target, draft):
    ids, mask = pad_left(PROMPTS)

    result = speculative_generate(
        target,
        DraftModel(draft, NUM_DRAFTS),
        ids,
        mask,
        max_new_tokens=NEW,
        sampling=SamplingParams(1.0),
        generator=torch.Generator().manual_seed(0),
        lossy_rule=AcceptAll(),
    )

    assert all(kept == NUM_DRAFTS for rounds in result.accepted_per_round for kept in rounds)


def test_random_acceptance_has_its_rate_and_its_seed():
    verification = made_up(batch=4000, drafts=5)

    first, again = Random(0.3, seed=4).accepts(verification), Random(0.3, seed=4).accepts(verification)

    assert torch.equal(first, again)
    assert abs(first.float().mean().item() - 0.3) < 0.03


def test_what_is_judged_ends_with_the_first_reject():
    verification = made_up(batch=1, drafts=5, matches=[[False, True, False, False, False]])
    accepts = torch.tensor([[True, False, True, False, True]])

    assert verification.kept(accepts).tolist() == [[True, True, True, False, False]]
    assert verification.judged(accepts).tolist() == [[True, False, True, True, False]]


def test_an_entropy_gate_needs_the_drafts_that_it_waits_for():
    verification = made_up(batch=1, drafts=3, matches=[[False, True, False]])

    assert EntropyGate(0.0, 1).accepts(verification).tolist() == [[True, False, False]]
    assert EntropyGate(0.0, 2).accepts(verification).tolist() == [[False, False, False]]


def made_up(batch: int, drafts: int, matches: list[list[bool]] | None = None) -> Verification:
    generator = torch.Generator().manual_seed(1)
    return Verification(
        tokens=torch.ones(batch, 4, dtype=torch.long),
        context_lengths=torch.full((batch,), 4),
        prompt_lengths=torch.full((batch,), 2),
        drafts=torch.randint(7, (batch, drafts), generator=generator),
        lengths=torch.full((batch,), drafts),
        target_tokens=torch.randint(7, (batch, drafts + 1), generator=generator),
        logits=torch.randn(batch, drafts + 1, 7, generator=generator),
        hidden_states=torch.randn(batch, drafts + 1, 8, generator=generator),
        draft_logits=None,
        matches=torch.zeros(batch, drafts, dtype=torch.bool) if matches is None else torch.tensor(matches),
        stop_tokens=frozenset(),
        rows=list(range(batch)),
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("probabilty:0.1", "'probability' is"),
        ("probability", "written probability:P"),
        ("probability:lots", "written probability:P"),
        ("probability:2", "threshold=2"),
        ("top-k:0", "k=0"),
        ("strict:1", "no acceptance rule"),
        ("accept-all:1", "written accept-all"),
    ],
)
def test_mistakes_are_named(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_rule(text)


def test_a_divergence_needs_a_drafter_that_has_a_distribution(target):
    ids, mask = pad_left(PROMPTS)
    with pytest.raises(ConfigError, match="NgramDrafter"):
        speculative_generate(target, NgramDrafter(2), ids, mask, max_new_tokens=4, lossy_rule=parse_rule("kl:1"))


def test_plain_decoding_is_not_lossy(target):
    assert not generate(target, *pad_left(PROMPTS), max_new_tokens=4).is_lossy
