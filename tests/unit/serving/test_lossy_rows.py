"""A rule on vLLM's rows, against the same rule request by request as decoding puts it to work."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from verl_speculator.decoding.acceptance import Verification
from verl_speculator.decoding.rules import parse_rule
from verl_speculator.errors import ConfigError
from verl_speculator.scorer.config import DRAFT_SCALARS, SCALARS, ScoringModelConfig
from verl_speculator.scorer.model import ScoreHead, ScoringActor
from verl_speculator.scorer.rule import ScorerRule
from verl_speculator.serving.lossy_rows import ServedRule, VerifiedRows, check_served_rule

VOCAB, HIDDEN, MOST = 11, 6, 3


def make_rule(name: str) -> Any:
    if name != "scorer":
        return parse_rule(name)
    torch.manual_seed(3)
    embed = torch.nn.Embedding(VOCAB, HIDDEN)
    backbone = SimpleNamespace(config=None, get_input_embeddings=lambda: embed)
    config = ScoringModelConfig(HIDDEN, scalars=(*SCALARS, *DRAFT_SCALARS), lookahead=1, inner_dim=8)
    actor = ScoringActor(config, backbone, ScoreHead(config))
    torch.nn.init.normal_(actor.head.out.weight)
    return ScorerRule(actor)


class Request:
    """One request of a step, with everything as it is by itself."""

    def __init__(self, generator: random.Random) -> None:
        self.count = generator.randrange(0, MOST + 1)
        self.logits = 2 * torch.randn(self.count + 1, VOCAB)
        self.states = torch.randn(self.count + 1, HIDDEN)
        self.draft_logits = torch.randn(MOST, VOCAB)
        self.tokens = torch.randint(VOCAB, (self.count + 1,))
        for slot in range(self.count):  # as many matches as mismatches
            if generator.random() < 0.5:
                self.tokens[slot + 1] = self.logits[slot].argmax()
            elif generator.random() < 0.3:  # as a grammar does
                self.logits[slot, self.tokens[slot + 1]] = -torch.inf
        self.prompt_length = generator.randrange(1, 9)
        self.context_length = self.prompt_length + generator.randrange(1, 30)
        self.stops = generator.sample(range(VOCAB), generator.randrange(0, 3))
        self.is_lossy = generator.random() < 0.8
        self.invalid = [generator.random() < 0.1 for _ in range(self.count + 1)]

    def kept_lossily(self, rule: Any) -> list[int]:
        """The slots that the rule keeps alone."""
        drafts = self.tokens[None, 1:]
        if not self.is_lossy or not self.count:
            return []
        own = self.logits.argmax(-1)[None]
        verification = Verification(
            tokens=torch.zeros(1, self.context_length, dtype=torch.long),
            context_lengths=torch.tensor([self.context_length]),
            prompt_lengths=torch.tensor([self.prompt_length]),
            drafts=drafts,
            lengths=torch.tensor([self.count]),
            target_tokens=own,
            logits=self.logits[None],
            hidden_states=self.states[None] * 2,
            draft_logits=self.draft_logits[None, : self.count],
            matches=drafts == own[:, :-1],
            stop_tokens=frozenset(self.stops),
            rows=[0],
        )
        accepts, kept = rule.accepts(verification)[0], []
        for slot in range(self.count):
            if bool(verification.matches[0, slot]):
                continue
            ruled_out = bool(self.logits[slot, self.tokens[slot + 1]].isneginf()) or self.invalid[slot + 1]
            if not verification.mismatches[0, slot] or ruled_out or not accepts[slot]:
                break
            kept.append(slot)
        return kept


def rows_of(requests: list[Request]) -> VerifiedRows:
    width = max(len(request.stops) for request in requests)
    counts = torch.tensor([request.count for request in requests])
    return VerifiedRows(
        tokens=torch.cat([request.tokens for request in requests]).int(),
        positions=torch.cat([torch.arange(r.count + 1) + r.context_length - 1 for r in requests]),
        hidden_states=torch.cat([request.states for request in requests]),
        starts=(counts + 1).cumsum(0) - counts - 1,
        num_drafts=counts,
        prompt_lengths=torch.tensor([request.prompt_length for request in requests]),
        stop_tokens=torch.tensor([[*r.stops, *[-1] * (width - len(r.stops))] for r in requests], dtype=torch.long),
        is_lossy=torch.tensor([request.is_lossy for request in requests]),
        invalid=torch.tensor([flag for request in requests for flag in request.invalid]),
        draft_logits=torch.stack([request.draft_logits for request in requests]),
    )


@pytest.mark.parametrize("name", ["accept-all", "top-k:3", "kl:1.5", "entropy:0.1,0", "scorer"])
def test_rows_of_random_steps(name: str) -> None:
    generator = random.Random(1)
    torch.manual_seed(1)
    counted: list[int] = []
    rule, sums = make_rule(name), 0
    counter = SimpleNamespace(add=lambda count: counted.append(int(count)))
    served = ServedRule(rule, MOST, lambda states: states * 2, counter)
    with torch.no_grad():
        for step in range(40):
            requests = [Request(generator) for _ in range(generator.randrange(1, 6))]
            if step % 4 == 0:  # a step in which nothing is copied
                requests = [request for request in requests if request.count == MOST] or [Request(generator)]
            logits = torch.cat([request.logits for request in requests])
            expected, row = logits.clone(), 0
            kept = [request.kept_lossily(rule) for request in requests]
            for request, slots in zip(requests, kept, strict=True):
                for slot in slots:
                    token = request.tokens[slot + 1]
                    value = expected[row + slot, token].clone()
                    expected[row + slot] = -torch.inf
                    expected[row + slot, token] = 0 * value
                row += request.count + 1
            served.apply(rows_of(requests), logits)
            assert torch.equal(logits, expected)
            assert counted.pop() == sum(map(len, kept))
            sums += sum(map(len, kept))
    assert sums > 5


def test_drafts_whose_logits_are_gone_are_not_judged() -> None:
    generator = random.Random(2)
    torch.manual_seed(2)
    rows = rows_of([Request(generator) for _ in range(4)])
    logits = torch.randn(3, MOST, VOCAB)
    some = rows.with_draft_logits(logits, torch.tensor([2, -1, 0, 1]))
    assert some.is_lossy.tolist() == [a and b for a, b in zip(rows.is_lossy.tolist(), [1, 0, 1, 1], strict=True)]
    assert some.draft_logits is not None
    assert torch.equal(some.draft_logits[[0, 2, 3]], logits[[2, 0, 1]])


def test_a_scorer_that_cannot_be_served_is_refused(tmp_path) -> None:
    for name, settings in (("lora", {"lora_rank": 4}), ("other", {"hidden_size": 7}), ("good", {})):
        config = ScoringModelConfig(**{"hidden_size": HIDDEN, **settings})
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "spd_scorer", **config.to_dict()}))
    check_served_rule(f"scorer:{tmp_path / 'good'}@0.3", HIDDEN)
    check_served_rule("margin:0.8", HIDDEN)
    with pytest.raises(ConfigError, match=r"has lora_rank=4: .* which vLLM does not run; serve one with lora_rank=0"):
        check_served_rule(f"scorer:{tmp_path / 'good'}+{tmp_path / 'lora'}", HIDDEN)
    with pytest.raises(ConfigError, match="was trained on hidden size 7 and the base model has 6"):
        check_served_rule(f"scorer:{tmp_path / 'other'}", HIDDEN)
