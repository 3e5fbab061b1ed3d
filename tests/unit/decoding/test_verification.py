"""The algebra of verification: whatever is drafted, a token comes out with exactly the target's probability."""

import pytest
import torch

from verl_speculator.decoding import Draft, SamplingParams
from verl_speculator.decoding.verification import acceptance_probability, residual, verify

VOCAB_SIZE = 9


def random_distributions(count: int, seed: int) -> torch.Tensor:
    logits = 2 * torch.randn(count, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return SamplingParams(1.0, top_k=6).probabilities(logits)


def outcome(target: torch.Tensor, draft: torch.Tensor, q: torch.Tensor | None) -> torch.Tensor:
    """The distribution `[B, V]` of the token kept, when each token is drafted with the chance in `draft [B, V]`."""
    total = torch.zeros_like(target)
    for token in range(VOCAB_SIZE):
        tokens = torch.full((len(target),), token)
        certain = None if q is None else q[:, None]
        chance = acceptance_probability(Draft(tokens[:, None], probabilities=certain), target[:, None])[:, 0]
        rest = residual(target, tokens, q)
        rejected = rest / rest.sum(-1, keepdim=True) * (1 - chance)[:, None]
        rejected[:, token] += chance
        total += torch.nan_to_num(draft[:, token : token + 1] * rejected)
    return total


def test_sampled_drafts_leave_the_targets_distribution():
    target, q = random_distributions(50, seed=0), random_distributions(50, seed=1)

    torch.testing.assert_close(outcome(target, q, q), target)


def test_certain_drafts_leave_it_too_however_they_were_chosen():
    target, chosen = random_distributions(50, seed=0), random_distributions(50, seed=1)

    torch.testing.assert_close(outcome(target, chosen, None), target)


def test_a_drafter_as_good_as_the_target_is_always_believed():
    target = random_distributions(50, seed=0)
    tokens = target.argmax(-1, keepdim=True)

    assert acceptance_probability(Draft(tokens, probabilities=target[:, None]), target[:, None]).eq(1).all()
    # A rejection could then only come from rounding; the target's own distribution is the right answer to it.
    assert torch.equal(residual(target, tokens[:, 0], target), target)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_after_the_first_rejection_or_the_end_of_a_draft_counts(temperature):
    # The target always says 1, 2, 3, 4, ... ; 50 is certain enough for sampling.
    logits = 50 * torch.nn.functional.one_hot(torch.tensor([[1, 2, 3, 4]] * 5), VOCAB_SIZE).double()
    tokens = torch.tensor([[1, 2, 3], [1, 5, 3], [7, 2, 3], [1, 2, 3], [1, 2, 3]])
    draft = Draft(tokens, lengths=torch.tensor([3, 3, 3, 1, 0]))

    chosen, accepted = verify(draft, logits, SamplingParams(temperature), torch.Generator().manual_seed(0))

    assert accepted.tolist() == [3, 1, 0, 1, 0]
    kept = [row[: length + 1] for row, length in zip(chosen.tolist(), accepted.tolist(), strict=True)]
    assert kept == [[1, 2, 3, 4], [1, 2], [1], [1, 2], [1]]
