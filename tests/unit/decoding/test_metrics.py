import pytest

from verl_speculator.decoding import AcceptanceCounts, DecodingResult, TargetForwards, predicted_speedup, sum_counts


def test_counts_of_known_drafts():
    counts = AcceptanceCounts.from_drafts([0, 3, 1, 2], num_draft_tokens=3)

    assert counts == AcceptanceCounts(4, 12, 6, [3, 2, 1], num_rounds=4)
    assert counts.acceptance_length == 2.5
    assert counts.acceptance_rate == 0.5
    assert counts.acceptance_rate_per_position == [0.75, 0.5, 0.25]


def test_positions_add_up_to_the_accepted_tokens():
    counts = AcceptanceCounts.from_drafts([4, 0, 2, 2, 1], num_draft_tokens=4)

    assert sum(counts.accepted_per_position) == counts.num_accepted_tokens


def test_sums_come_before_the_division():
    many_bad = AcceptanceCounts.from_drafts([0] * 9, num_draft_tokens=2)
    one_good = AcceptanceCounts.from_drafts([2], num_draft_tokens=2)

    # The mean of the two ratios would be (1 + 3) / 2.
    assert (many_bad + one_good).acceptance_length == pytest.approx(1.2)


def test_sum_of_different_draft_lengths():
    total = sum_counts([AcceptanceCounts.from_drafts([1], 1), AcceptanceCounts.from_drafts([3], 3)])

    assert total == AcceptanceCounts(2, 4, 4, [2, 1, 1], num_rounds=2)


def test_no_drafts_means_one_token_per_forward():
    empty = sum_counts([])

    assert (empty.acceptance_length, empty.acceptance_rate, empty.acceptance_rate_per_position) == (1.0, 0.0, [])


@pytest.mark.parametrize("accepted", [[-1], [3]])
def test_impossible_acceptance_is_refused(accepted):
    with pytest.raises(ValueError, match="between 0 and the 2 drafted tokens"):
        AcceptanceCounts.from_drafts(accepted, num_draft_tokens=2)


def test_rounds_without_a_draft_are_no_drafts():
    counts = AcceptanceCounts.from_rounds([2, 0, 1, 0], [3, 0, 1, 2], 3)

    assert counts == AcceptanceCounts(3, 6, 3, [2, 1, 0], num_rounds=4)
    assert counts.acceptance_length == 2.0
    assert counts.tokens_per_round == 1.75
    assert counts.acceptance_rate == 0.5


def test_distribution_of_accepted_lengths():
    counts = AcceptanceCounts.from_rounds([2, 0, 1, 0, 3, 2], [3, 0, 1, 2, 3, 3], 3)

    assert counts.drafts_per_accepted_length == [1, 1, 2, 1]
    assert AcceptanceCounts().drafts_per_accepted_length == [0]


def test_forwards_are_counted_for_each_row_alone():
    # Row 0: the prompt's forward and three rounds for seven tokens; row 1 ended in its first round.
    result = DecodingResult([[1] * 7, [1] * 3], 4, 3, [[2, 0, 3], [2]])

    assert result.target_forwards == TargetForwards(plain=10, used=6)
    assert (result.target_forwards.saved, result.target_forwards.share_saved) == (4, 0.4)
    assert (result.target_forwards + TargetForwards(5, 5)).share_saved == pytest.approx(4 / 15)
    assert TargetForwards().share_saved == 0.0


def test_a_row_without_a_draft_in_some_rounds():
    result = DecodingResult([[1] * 6], 4, 3, [[0, 2, 0]], [[0, 3, 1]])

    assert result.accepted_per_draft == [[2, 0]]
    assert (result.num_drafts, result.num_accepted_tokens, result.num_rounds) == ([2], [2], 3)
    assert result.acceptance_length == 2.0
    assert result.counts.tokens_per_round == pytest.approx(1 + 2 / 3)


def test_predicted_speedup():
    # A round of 3 tokens takes 1.2 + 0.3 plain steps.
    assert predicted_speedup(3.0, plain_step_cost=10.0, verify_cost=12.0, draft_cost=3.0) == pytest.approx(2.0)
    assert predicted_speedup(1.0, plain_step_cost=10.0, verify_cost=10.0, draft_cost=0.0) == 1.0
