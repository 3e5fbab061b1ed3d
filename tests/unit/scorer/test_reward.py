from __future__ import annotations

import dataclasses

import pytest

from verl_speculator.errors import CheckpointError, ConfigError
from verl_speculator.scorer.controllers import Controllers, learned_threshold
from verl_speculator.scorer.reward import Outcome, compute_spd_reward
from verl_speculator.scorer.settings import RewardSettings, RolloutSettings, ThresholdSettings
from verl_speculator.scorer.spd_scorer_reward import compute_score

OUTCOME = Outcome(
    correct=True,
    extracted=True,
    strict_correct=True,
    accepted=3,
    strict_accepted=1,
    drafted=4,
    calls=6,
    strict_calls=12,
    mismatches=2,
    accepted_mismatches=1,
)


@pytest.mark.parametrize(("correct", "strict", "expected"), [(1, 1, 0.9), (1, 0, 0.7), (0, 1, -0.5), (0, 0, 0.1)])
def test_each_case_has_its_coefficient(correct, strict, expected):
    settings = RewardSettings(right_right=0.9, right_wrong=0.7, wrong_right=-0.5, wrong_wrong=0.1)
    outcome = dataclasses.replace(OUTCOME, correct=bool(correct), strict_correct=bool(strict))

    assert compute_spd_reward(outcome, settings)[0] == pytest.approx(expected)


def test_a_sparse_reward_is_the_answer_alone():
    settings = RewardSettings()

    assert compute_spd_reward(OUTCOME, settings)[0] == 1
    assert compute_spd_reward(dataclasses.replace(OUTCOME, correct=False), settings)[0] == 0


def test_length_dense_cost_and_step_add_up():
    settings = RewardSettings(length_weight=0.2, dense_weight=0.4, step_weight=0.5, step_reward_path="mine.py")

    reward, parts = compute_spd_reward(OUTCOME, settings, cost_price=0.3, step_reward=0.6)

    assert parts == pytest.approx(
        {"answer": 1.0, "length": 0.2 * 3 / 4, "dense": 0.4 * 2 / 4, "cost": -0.3 * 6 / 12, "step": 0.5 * 0.6}
    )
    assert reward == pytest.approx(sum(parts.values()))


def test_drafts_that_did_harm_are_a_loss():
    settings = RewardSettings(dense_weight=0.4)
    harmed = dataclasses.replace(OUTCOME, correct=False)
    wrong_anyway = dataclasses.replace(harmed, strict_correct=False)

    assert compute_spd_reward(harmed, settings)[1]["dense"] == pytest.approx(-0.2)
    assert compute_spd_reward(wrong_anyway, settings)[1]["dense"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("so #### 12", (1.0, 1.0)), ("so #### 13", (0.0, 1.0)), ("I do not know", (0.0, 0.0))],
)
def test_an_answer_that_cannot_be_extracted_is_wrong_and_counted(text, expected):
    assert tuple(compute_score("gsm8k", text, "6 + 6 #### 12").values()) == expected


def test_the_users_pattern_finds_the_answer():
    assert compute_score("x", "a=3 b=4", "4", {"answer_pattern": r"b=(\d+)"})["score"] == 1


def test_the_price_rises_while_the_bound_is_kept_and_falls_while_not():
    settings = RewardSettings(cost=0.5, cost_step=2.0, cost_max=0.53, accuracy_loss=0.01)
    controllers = Controllers.start(settings, RolloutSettings("target"))

    controllers.update_price(settings, accuracy=0.80, strict_accuracy=0.90)
    assert controllers.cost_price == pytest.approx(0.5 + 2 * (-0.10 + 0.01))
    controllers.update_price(settings, accuracy=0.2, strict_accuracy=0.9)
    assert controllers.cost_price == 0
    for _ in range(40):
        controllers.update_price(settings, accuracy=0.9, strict_accuracy=0.9)
    assert controllers.cost_price == 0.53


def test_an_adaptive_threshold_settles_at_its_acceptance_rate():
    rollout = RolloutSettings("target", threshold=ThresholdSettings("adaptive", 0.25, 0.02))
    controllers = Controllers.start(RewardSettings(), rollout)
    scores = [step / 100 for step in range(100)]

    for _ in range(300):
        controllers.update_threshold(rollout, scores)

    assert sum(score >= controllers.threshold for score in scores) / 100 == pytest.approx(0.25, abs=0.02)


def test_a_fixed_threshold_stays():
    rollout = RolloutSettings("target", score_threshold=0.7)
    controllers = Controllers.start(RewardSettings(), rollout)
    controllers.update_threshold(rollout, [0.9] * 10)

    assert controllers.threshold == 0.7


def test_running_statistics_are_those_of_a_weighted_sample():
    """Each step counts as a share of all so far; against the mean and variance of the same sample, weighted."""
    rollout = RolloutSettings("target", score_momentum=0.25)
    controllers = Controllers.start(RewardSettings(), rollout)
    assert (controllers.score_mean, controllers.score_scale) == (0.0, 1.0)
    steps = [[2.0, 4.0, -1.0], [], [5.0], [0.5, 1.5]]
    for step in steps:
        controllers.update_statistics(rollout, step)

    weights = [0.75 * 0.75 / 3] * 3 + [0.75 * 0.25] + [0.25 / 2] * 2
    values = [value for step in steps for value in step]
    mean = sum(w * v for w, v in zip(weights, values, strict=True))
    assert controllers.score_mean == pytest.approx(mean)
    variance = sum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True))
    assert controllers.score_scale == pytest.approx(variance**0.5)
    off = Controllers.start(RewardSettings(), RolloutSettings("target"))
    off.update_statistics(RolloutSettings("target"), [3.0, 4.0])
    assert (off.score_mean, off.score_scale) == (0.0, 1.0)


@pytest.mark.parametrize("logit", [-3.0, -0.4, 0.0, 0.7, 2.5])
def test_a_learned_threshold_decides_as_the_bias_did(logit):
    import math

    start, now = 0.3, -0.9
    with_bias = logit + now > 0
    score = 1 / (1 + math.exp(-(logit + start)))

    assert (score > learned_threshold(start, now)) == with_bias


def test_controllers_come_back_from_a_checkpoint(tmp_path):
    saved = Controllers(0.25, 0.625, score_mean=-1.5, score_variance=4.0, has_statistics=True)
    saved.save(tmp_path / "global_step_3")
    loaded = Controllers(0.0, 0.5)
    loaded.load(tmp_path / "global_step_3")

    assert loaded == saved
    with pytest.raises(CheckpointError, match=r"global_step_4.*missing or damaged"):
        loaded.load(tmp_path / "global_step_4")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RewardSettings(step_weight=1.0), "step_reward_path"),
        (lambda: RewardSettings(cost=-1), r"reward\.reward_kwargs\.cost=-1 must be at least 0"),
        (lambda: RolloutSettings("t", closed_loop=True), "needs rollout.draft_model_path"),
        (lambda: RolloutSettings("t", score_threshold=2), "between 0 and 1"),
        (lambda: ThresholdSettings("moving"), "fixed, adaptive, learned"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
