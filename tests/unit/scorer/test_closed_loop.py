from __future__ import annotations

import dataclasses
import json
import math
import statistics

import pytest
import torch

from tests.unit.scorer.conftest import NEW, NUM_DRAFTS
from verl_speculator.decoding import parse_rule
from verl_speculator.errors import ConfigError, MissingFileError
from verl_speculator.reports.scorer import format_rules, render_page
from verl_speculator.scorer import comparison
from verl_speculator.scorer.closed_loop import (
    Answered,
    Choice,
    SpeculativeDecodingRollout,
    answer_questions,
    choose_setting,
    compare,
    paired_loss,
    score_quantiles,
)
from verl_speculator.scorer.comparison import ComparisonSettings, RuleSpec, compare_rules
from verl_speculator.scorer.config import ScoringModelConfig
from verl_speculator.scorer.model import AutoModelForSPDScoring
from verl_speculator.scorer.rule import ScorerRule


def answered(correct, calls, tokens=10):
    n = len(correct)
    return Answered(correct, ["1"] * n, [tokens] * n, [calls] * n, [[1]] * n, [[]] * n)


def test_the_loss_is_paired():
    strict = [True] * 80 + [False] * 20
    rule = [False] * 3 + [True] * 77 + [True] * 2 + [False] * 18

    loss, upper = paired_loss(strict, rule)

    differences = [int(a) - int(b) for a, b in zip(strict, rule, strict=True)]
    assert loss == pytest.approx(0.01)
    assert upper == pytest.approx(0.01 + 1.6449 * statistics.stdev(differences) / math.sqrt(100), abs=1e-5)
    assert paired_loss(strict, strict) == (0.0, 0.03)


def test_the_chosen_setting_saves_most_within_the_bound():
    strict = answered([True] * 1000, calls=5)
    of = {
        0.9: answered([True] * 1000, calls=5),
        0.7: answered([True] * 998 + [False] * 2, calls=4),
        0.5: answered([True] * 995 + [False] * 5, calls=3),
        0.3: answered([True] * 900 + [False] * 100, calls=2),
        0.2: answered([True] * 800 + [False] * 200, calls=2),
        0.1: answered([True] * 1000, calls=1),
    }

    choice = choose_setting("a rule", list(of), of.__getitem__, strict, accuracy_bound=0.01)

    assert choice.setting == 0.5
    # Halving: the careful ones need not be tried, nor what is bolder than one that breaks the bound.
    assert [one.setting for one in choice.tried] == [0.7, 0.5, 0.3]
    nothing = choose_setting("a rule", [0.3, 0.2], of.__getitem__, strict, accuracy_bound=0.01)
    assert nothing.setting is None
    with pytest.raises(ConfigError, match="accuracy_bound=2"):
        choose_setting("a rule", [0.3], of.__getitem__, strict, accuracy_bound=2)


def test_thresholds_go_from_careful_to_bold():
    thresholds = score_quantiles(torch.linspace(0, 1, 101), 9)

    assert thresholds == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_figures_are_those_of_the_decoding(target, drafter, questions, check):
    options = {"num_drafts": NUM_DRAFTS, "max_new_tokens": NEW, "batch_size": 4, "check": check}
    strict = answer_questions(target, drafter, questions, lambda batch: None, **options)
    bold = answer_questions(target, drafter, questions, lambda batch: parse_rule("top-k:3"), **options)
    alone = SpeculativeDecodingRollout(
        target, drafter, parse_rule("top-k:3"), num_drafts=NUM_DRAFTS, max_new_tokens=NEW
    ).generate_sequences([questions[2].tokens])

    result = compare("top-k", 3, bold, strict)

    # In another batch the same numbers come out.
    assert bold.tokens[2] == alone.tokens[0]
    assert bold.lossy_tokens[2] == alone.lossy_tokens[0]
    assert bold.target_calls[2] == alone.target_calls[0]
    assert result.tokens_per_target_call == sum(map(len, bold.tokens)) / sum(bold.target_calls)
    assert result.is_lossy
    assert not result.equals_strict
    assert compare("strict", None, strict, strict).equals_strict
    assert result.num_lossy_accepted == sum(map(len, bold.lossy_tokens)) > 0


def test_a_comparison_from_rules_to_a_page(target, drafter, questions, check, tmp_path):
    torch.manual_seed(0)
    actor = AutoModelForSPDScoring.from_config(ScoringModelConfig(32, inner_dim=8), target.model)
    torch.nn.init.normal_(actor.head.out.weight)
    actor.save_pretrained(tmp_path / "head")
    specs = [
        RuleSpec.parse(text)
        for text in ("top-k", "accept-all", "p=probability:0.1", f"scorer:{tmp_path / 'head'}", "nothing=top-k:1")
    ]

    found = compare_rules(
        target,
        drafter,
        questions,
        questions,
        specs,
        ComparisonSettings(NUM_DRAFTS, NEW, 4, accuracy_bound=0.9, num_examples=2, num_oracle=3),
        check=check,
    )

    assert list(found.results) == ["strict", "top-k", "accept-all", "p", "head", "nothing", "oracle"]
    assert found.results["accept-all"].tokens_per_target_call > found.results["strict"].tokens_per_target_call
    assert found.results["nothing"].equals_strict
    assert found.choices.keys() == {"top-k", "head"}
    values = json.loads(json.dumps({"accuracy_bound": 0.9, "target": "T", "draft": "D", **found.to_dict()}))
    marked = [
        piece
        for output in values["examples"][0]["outputs"]
        if output["rule"] == "accept-all"
        for piece in output["pieces"]
        if piece[1]
    ]
    assert marked
    page = render_page(values)
    assert page.count('<mark class="lossy"') == sum(
        piece[1] for one in values["examples"] for output in one["outputs"] for piece in output["pieces"]
    )
    assert "strict (lossless)" in format_rules(values)
    assert "<svg" in page


def test_thresholds_are_chosen_by_the_place_in_the_answer():
    """Places 0, 3, 5 and 9 save the more the lower their threshold; what they harm differs."""
    harm = {0: {0.5: 50, 0.3: 90}, 3: {0.5: 2, 0.3: 60}, 5: {0.3: 60}, 9: {}}

    def decode(make, doing):
        thresholds, wrong, calls = make([]).thresholds, 0, 0
        for place, harmed in harm.items():
            (threshold,) = [value for start, value in thresholds if start <= place][-1:]
            wrong += harmed.get(threshold, 0)
            calls += round(10 * threshold)
        return answered([True] * (1000 - wrong) + [False] * wrong, calls=calls, tokens=100)

    strict = answered([True] * 1000, calls=100, tokens=100)
    rule, spec = ScorerRule([object()], 0.5), RuleSpec("head", "scorer:head")
    settings = ComparisonSettings(3, 8, 4, accuracy_bound=0.01, threshold_places=(3, 4, 9))
    found = comparison._by_position(spec, rule, (0.9, 0.7, 0.5, 0.3), Choice(0.7, []), strict, decode, settings)

    # From 4 on nothing is gained: 0.5 is there already, and 0.3 breaks the bound at 5.
    assert found.by_position == ((0, 0.7), (3, 0.5), (9, 0.3))
    assert found.setting == 0.7
    settings = dataclasses.replace(settings, threshold_places=(4,))
    harm[3] = harm[5] = harm[9] = harm[0]
    alone = comparison._by_position(spec, rule, (0.9, 0.7, 0.5, 0.3), Choice(0.7, []), strict, decode, settings)
    assert alone.by_position == ()


def test_rules_that_are_no_rules(tmp_path):
    with pytest.raises(ConfigError, match="no acceptance rule"):
        RuleSpec.parse("topk")
    with pytest.raises(MissingFileError, match="holds no scorer"):
        RuleSpec.parse(f"scorer:{tmp_path}")
