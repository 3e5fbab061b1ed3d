import math

import pytest
import torch

from tests.unit.decoding.reference import next_token_distribution
from verl_speculator.decoding import SamplingParams
from verl_speculator.decoding.sampling import sample
from verl_speculator.errors import ConfigError


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    return 3 * torch.randn(4, 5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 1.8])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
@pytest.mark.parametrize("top_k", [0, 1, 7, 40, 100])
def test_probabilities_are_those_of_the_definition(logits, temperature, top_p, top_k):
    params = SamplingParams(temperature, top_p, top_k)

    found = params.probabilities(logits)

    wanted = [next_token_distribution(row, temperature, top_p, top_k) for row in logits.flatten(0, 1).tolist()]
    torch.testing.assert_close(found.flatten(0, 1), torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("dtype", "wanted"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")])
def test_probabilities_are_at_least_float32(logits, dtype, wanted):
    found = SamplingParams(0.8, top_p=0.9).probabilities(logits.to(getattr(torch, dtype)))

    assert found.dtype == getattr(torch, wanted)
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))


def test_top_k_comes_before_top_p():
    # Of the two tokens that top_k leaves, the first has 0.4 / 0.7 of the mass: enough for top_p only after top_k.
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()

    assert SamplingParams(1.0, top_p=0.55).probabilities(logits).count_nonzero() == 2
    assert SamplingParams(1.0, top_p=0.55, top_k=2).probabilities(logits).count_nonzero() == 1


def test_tokens_that_tie_with_the_last_kept_one_are_kept():
    found = SamplingParams(1.0, top_k=2).probabilities(torch.tensor([1.0, 3.0, 1.0, 0.0]))

    assert found.count_nonzero() == 3


def test_temperature_zero_is_the_most_likely_token_whatever_the_filters(logits):
    found = SamplingParams(0.0, top_p=0.3, top_k=5).probabilities(logits)

    assert torch.equal(found.argmax(-1), logits.argmax(-1))
    assert torch.equal(found.sum(-1), torch.ones(4, 5, dtype=torch.float64))


def test_tiny_temperatures_and_impossible_tokens_are_no_trouble():
    logits = torch.tensor([[50.0, 49.0, -math.inf], [-math.inf, 1.0, 0.0]])

    found = SamplingParams(1e-30).probabilities(logits)

    assert found.tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


def test_a_generator_makes_samples_reproducible_and_impossible_tokens_never_come():
    weights = torch.tensor([[0.0, 3.0, 1.0]]).expand(4000, 3)

    first, second = (sample(weights, torch.Generator().manual_seed(7)) for _ in range(2))

    assert torch.equal(first, second)
    counts = first.bincount(minlength=3).tolist()
    assert counts[0] == 0
    assert abs(counts[1] - 3000) < 5 * math.sqrt(4000 * 0.75 * 0.25)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "1"},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": True},
        {"top_k": -1},
        {"top_k": 2.0},
    ],
)
def test_values_that_cannot_work_are_refused_by_name(wrong):
    (name,) = wrong

    with pytest.raises(ConfigError, match=f"^{name} must be"):
        SamplingParams(**wrong)
