import pytest

from verl_speculator.decoding import AcceptanceCounts, sum_counts


def test_counts_of_known_drafts():
    counts = AcceptanceCounts.from_drafts([0, 3, 1, 2], num_draft_tokens=3)

    assert counts == AcceptanceCounts(4, 12, 6, [3, 2, 1])
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

    assert total == AcceptanceCounts(2, 4, 4, [2, 1, 1])


def test_no_drafts_means_one_token_per_forward():
    empty = sum_counts([])

    assert (empty.acceptance_length, empty.acceptance_rate, empty.acceptance_rate_per_position) == (1.0, 0.0, [])


@pytest.mark.parametrize("accepted", [[-1], [3]])
def test_impossible_acceptance_is_refused(accepted):
    with pytest.raises(ValueError, match="between 0 and the 2 drafted tokens"):
        AcceptanceCounts.from_drafts(accepted, num_draft_tokens=2)
