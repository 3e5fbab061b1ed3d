import math

import pytest
import torch

from verl_speculator.decoding import (
    AcceptanceCounts,
    Interval,
    acceptance_length_interval,
    ratio_interval,
    tokens_per_round_interval,
)


def prompt(accepted: list[int], drafted: list[int] | None = None) -> AcceptanceCounts:
    return AcceptanceCounts.from_rounds(accepted, drafted or [3] * len(accepted), 3)


def test_the_mean_is_the_acceptance_length_of_all_prompts_together():
    prompts = [prompt([0, 1]), prompt([3] * 10), prompt([2, 2, 0, 1])]

    found = acceptance_length_interval(prompts)

    assert found.mean == pytest.approx(1 + 36 / 16)
    assert found.low < found.mean < found.high
    assert found == acceptance_length_interval(prompts)


def test_the_interval_has_the_width_of_the_normal_approximation():
    """With many prompts of one round each, the ratio is a mean and its error the textbook's."""
    accepted = torch.randint(4, (2_000,), generator=torch.Generator().manual_seed(0)).double()

    found = acceptance_length_interval([prompt([int(number)]) for number in accepted])

    half = 1.96 * float(accepted.std()) / math.sqrt(2_000)
    assert found.high - found.mean == pytest.approx(half, rel=0.1)
    assert found.mean - found.low == pytest.approx(half, rel=0.1)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for seed in range(100):
        drafts = torch.randint(1, 30, (60,), generator=generator)
        # Prompts differ in how easy they are, and the mean of the easiness is 0.5 whatever the length.
        accepted = drafts * torch.rand(60, generator=generator)
        found = ratio_interval(accepted.tolist(), drafts.tolist(), confidence=0.9, seed=seed)
        covered += found.low <= 0.5 <= found.high
    assert 80 <= covered <= 97  # 90 expected, 3 standard deviations, and a little too narrow as every bootstrap


def test_one_prompt_says_nothing_about_others():
    assert acceptance_length_interval([prompt([2, 1])]) == Interval(2.5, 1.0, 4.0)
    assert acceptance_length_interval([prompt([2, 1]), prompt([0], [0])]) == Interval(2.5, 1.0, 4.0)
    assert acceptance_length_interval([]) == Interval(1.0, 1.0, 1.0)


def test_rounds_without_a_draft_count_per_round_only():
    prompts = [prompt([2, 0, 0, 1], [3, 0, 0, 2]), prompt([0, 3], [0, 3])]

    assert acceptance_length_interval(prompts).mean == 1 + 6 / 3
    assert tokens_per_round_interval(prompts).mean == 1 + 6 / 6


def test_nothing_to_divide_by_is_refused():
    with pytest.raises(ValueError, match="more than 0"):
        ratio_interval([1.0], [0.0])
