"""Sampled speculative decoding against the exact distribution over all continuations, and against wrong variants.

With a vocabulary of 6 every continuation of 4 tokens can be enumerated, and thousands of rows decoded as one batch.
Good variants must not be rejected at 1e-4 (fixed seeds, so this never flickers), wrong ones must be below 1e-10.
"""

import pytest
import torch

from tests.unit.decoding.reference import (
    count_sequences,
    goodness_of_fit,
    next_token_distribution,
    sequence_distribution,
)
from tests.unit.decoding.support import RandomDrafter, build_model, build_speculator, pad_left
from verl_speculator.decoding import NgramDrafter, SamplingParams, generate, speculative_generate, verification
from verl_speculator.errors import ConfigError

VOCAB_SIZE = 6
NUM_TOKENS = 4
NUM_ROWS = 6_000  # for each of the two prompts
PROMPTS = [[3], [1, 5, 2, 1, 5]]  # side by side in a batch; the second repeats itself, for the n-gram drafter
GOOD, WRONG = 1e-4, 1e-10
SAMPLINGS = {
    "warm": {"temperature": 1.0, "top_p": 1.0, "top_k": 0},
    "hot": {"temperature": 1.5, "top_p": 1.0, "top_k": 0},
    "cool": {"temperature": 0.6, "top_p": 1.0, "top_k": 0},
    "top_p": {"temperature": 0.9, "top_p": 0.8, "top_k": 0},
    "top_k": {"temperature": 1.2, "top_p": 1.0, "top_k": 3},
    "all": {"temperature": 1.3, "top_p": 0.9, "top_k": 5},
}


def tiny_model(family: str = "llama", **changes):
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return build_model(family, seed=1, **sizes | changes)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def exact(model):
    cache = {}

    def distributions(name: str):
        if name not in cache:
            cache[name] = [sequence_distribution(model, prompt, NUM_TOKENS, **SAMPLINGS[name]) for prompt in PROMPTS]
        return cache[name]

    return distributions


def decode(model, drafter, sampling: dict, seed: int = 0, **kwargs):
    ids, mask = pad_left([prompt for prompt in PROMPTS for _ in range(NUM_ROWS)])
    return speculative_generate(
        model,
        drafter,
        ids,
        mask,
        max_new_tokens=NUM_TOKENS,
        sampling=SamplingParams(**sampling),
        generator=torch.Generator().manual_seed(seed),
        **kwargs,
    )


def p_value(tokens: list[list[int]], distributions: list[torch.Tensor]) -> float:
    """Of both prompts' continuations together."""
    halves = [tokens[:NUM_ROWS], tokens[NUM_ROWS:]]
    return goodness_of_fit([count_sequences(rows, VOCAB_SIZE) for rows in halves], distributions)


@pytest.mark.parametrize(
    ("kind", "name"), [*(("mlp", name) for name in SAMPLINGS), ("sum_lstm", "hot"), ("sum_lstm", "all")]
)
@pytest.mark.parametrize("draft_sampling", ["greedy", "random"])
def test_output_has_the_targets_distribution(model, exact, kind, draft_sampling, name):
    speculator = build_speculator(kind, model, n_predict=2)

    result = decode(model, speculator, SAMPLINGS[name], draft_sampling=draft_sampling)

    assert p_value(result.tokens, exact(name)) > GOOD
    assert 0 < result.counts.acceptance_rate < 1  # or the test would not see both acceptance and rejection


@pytest.mark.parametrize("name", ["warm", "all"])
@pytest.mark.parametrize("draft_sampling", ["greedy", "random"])
def test_a_draft_vocabulary_leaves_the_distribution_alone(model, exact, draft_sampling, name):
    speculator = build_speculator("mlp", model, n_predict=2, draft_vocab_size=4)
    speculator.set_draft_ids(torch.tensor([0, 2, 3, 5]))

    result = decode(model, speculator, SAMPLINGS[name], draft_sampling=draft_sampling)

    assert p_value(result.tokens, exact(name)) > GOOD
    assert 0 < result.counts.acceptance_rate < 1


@pytest.mark.parametrize("name", ["warm", "all"])
def test_copied_drafts_of_different_lengths_are_exact_too(model, exact, name):
    result = decode(model, NgramDrafter(2), SAMPLINGS[name])

    assert p_value(result.tokens, exact(name)) > GOOD
    assert {0, 1, 2} == {length for row in result.drafted_per_round for length in row}


@pytest.mark.parametrize("name", ["warm", "all"])
def test_plain_sampling_is_exact(model, exact, name):
    ids, mask = pad_left([prompt for prompt in PROMPTS for _ in range(NUM_ROWS)])

    result = generate(
        model,
        ids,
        mask,
        max_new_tokens=NUM_TOKENS,
        sampling=SamplingParams(**SAMPLINGS[name]),
        generator=torch.Generator().manual_seed(0),
    )

    assert p_value(result.tokens, exact(name)) > GOOD


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": 1.0, "head_dim": 8, "query_pre_attn_scalar": 8}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
    ],
)
def test_what_a_model_does_to_its_logits_counts(family, changes):
    """Soft caps and scales leave the most likely token alone, but not the distribution."""
    model = tiny_model(family, **changes)
    speculator = build_speculator("mlp", model, n_predict=2)
    with_changes = [sequence_distribution(model, prompt, NUM_TOKENS, **SAMPLINGS["warm"]) for prompt in PROMPTS]

    result = decode(model, speculator, SAMPLINGS["warm"], draft_sampling="random")

    assert p_value(result.tokens, with_changes) > GOOD
    model.lm_head.weight.data *= 2  # the test would see the difference: this is what forgetting the scale does
    scaled = [sequence_distribution(model, prompt, NUM_TOKENS, **SAMPLINGS["warm"]) for prompt in PROMPTS]
    assert p_value(result.tokens, scaled) < WRONG


def test_float64_is_exact():
    model = tiny_model().double()
    distributions = [sequence_distribution(model, prompt, NUM_TOKENS, **SAMPLINGS["hot"]) for prompt in PROMPTS]

    result = decode(model, build_speculator("sum_rnn", model, 2), SAMPLINGS["hot"], draft_sampling="random")

    assert p_value(result.tokens, distributions) > GOOD


def from_the_target_again(target, token, draft):
    return target


def without_the_draft_only(target, token, draft):
    return target.scatter(-1, token[:, None], 0.0)


def as_if_certain(draft, target):
    return target.gather(-1, draft.tokens[..., None]).squeeze(-1)


def if_likely_enough(draft, target):
    """Typical acceptance: not lossless, and often proposed."""
    return (as_if_certain(draft, target) > 0.15).to(target.dtype)


@pytest.mark.parametrize(
    ("draft_sampling", "function", "wrong"),
    [
        ("greedy", "residual", from_the_target_again),
        ("random", "residual", from_the_target_again),
        ("random", "residual", without_the_draft_only),
        ("random", "acceptance_probability", as_if_certain),
        ("greedy", "acceptance_probability", if_likely_enough),
        ("random", "acceptance_probability", if_likely_enough),
    ],
)
def test_wrong_verification_is_caught(model, exact, monkeypatch, draft_sampling, function, wrong):
    monkeypatch.setattr(verification, function, wrong)

    result = decode(model, build_speculator("mlp", model, 2), SAMPLINGS["all"], draft_sampling=draft_sampling)

    assert p_value(result.tokens, exact("all")) < WRONG


def test_wrong_draft_probabilities_are_caught(model, exact, monkeypatch):
    """The drafts' own distribution must be the one they were sampled from."""
    speculator = build_speculator("mlp", model, 2)
    colder = SamplingParams(temperature=0.5)
    probabilities = SamplingParams.probabilities
    monkeypatch.setattr(
        "verl_speculator.decoding.drafters.sample",
        lambda weights, generator: verification.sample(probabilities(colder, weights.log()), generator),
    )

    result = decode(model, speculator, SAMPLINGS["warm"], draft_sampling="random")

    assert p_value(result.tokens, exact("warm")) < WRONG


def test_the_test_itself_raises_no_false_alarms(exact):
    """True samples: the p-values must be uniform, so the share below 0.1 is 0.1 ± 4 standard deviations."""
    generator = torch.Generator().manual_seed(0)
    distribution = exact("warm")[0]

    found = []
    for _ in range(100):
        drawn = torch.multinomial(distribution, NUM_ROWS, replacement=True, generator=generator)
        found.append(goodness_of_fit([drawn.bincount(minlength=len(distribution))], [distribution]))

    assert sum(p < 0.1 for p in found) / 100 == pytest.approx(0.1, abs=4 * (0.1 * 0.9 / 100) ** 0.5)
    assert min(found) > GOOD


@pytest.mark.parametrize("draft_sampling", ["greedy", "random"])
def test_drafts_are_accepted_as_often_as_theory_allows(model, draft_sampling):
    """Rejecting too much would be just as lossless: the first draft's rate is p(argmax q), or sum of min(p, q)."""
    sampling = SAMPLINGS["all"]
    speculator = build_speculator("mlp", model, n_predict=2)
    result = decode(model, speculator, sampling, draft_sampling=draft_sampling)

    for prompt, rows in zip(PROMPTS, (slice(0, NUM_ROWS), slice(NUM_ROWS, None)), strict=True):
        accepted = sum(rounds[0] > 0 for rounds in result.accepted_per_round[rows])
        wanted = first_acceptance(model, speculator, prompt, draft_sampling, **sampling)
        assert accepted / NUM_ROWS == pytest.approx(wanted, abs=4 * (wanted * (1 - wanted) / NUM_ROWS) ** 0.5)


@torch.no_grad()
def first_acceptance(model, speculator, prompt, draft_sampling: str, **sampling) -> float:
    hidden = model.model(torch.tensor([prompt])).last_hidden_state[:, -1]
    first = next_token_distribution(model.lm_head(hidden)[0].tolist(), **sampling)
    total = 0.0
    for token, chance in enumerate(first):
        if chance:
            p = next_token_distribution(model(torch.tensor([[*prompt, token]])).logits[0, -1].tolist(), **sampling)
            logits = speculator(hidden[:, None], torch.tensor([[token] * 4]))[0, 0, 0]
            q = next_token_distribution(logits.tolist(), **sampling)
            greedy = p[int(logits.argmax())]
            total += chance * (greedy if draft_sampling == "greedy" else sum(map(min, p, q)))
    return total


def test_a_generator_makes_it_reproducible(model):
    speculator, (ids, mask) = build_speculator("mlp", model, n_predict=2), pad_left(PROMPTS * 20)

    first, again, other = (
        speculative_generate(
            model,
            speculator,
            ids,
            mask,
            max_new_tokens=NUM_TOKENS,
            sampling=SamplingParams(1.0),
            draft_sampling="random",
            generator=torch.Generator().manual_seed(seed),
        ).tokens
        for seed in (1, 1, 2)
    )

    assert first == again
    assert first != other


def test_random_drafts_need_a_distribution(model):
    sampling = {"temperature": 1.0}
    for drafter in (NgramDrafter(2), RandomDrafter(VOCAB_SIZE, 2)):
        with pytest.raises(ConfigError, match=f'"random" needs a Speculator, and a {type(drafter).__name__} is none'):
            decode(model, drafter, sampling, draft_sampling="random")
    with pytest.raises(ConfigError, match='must be "greedy" or "random", not "beam"'):
        decode(model, build_speculator("mlp", model, 2), sampling, draft_sampling="beam")
