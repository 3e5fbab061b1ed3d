"""Decoding with EAGLE-3: the target's own text, and drafts that are those of a model without any cache."""

from __future__ import annotations

import pytest
import torch

from tests.support.eagle3_reference import Reference
from tests.unit.decoding.reference import count_sequences, goodness_of_fit, sequence_distribution
from tests.unit.decoding.support import build_model, greedy_by_transformers, pad_left, random_prompts
from verl_speculator.algorithms.eagle3 import Eagle3Speculator
from verl_speculator.algorithms.eagle3.drafter import Eagle3Drafter
from verl_speculator.decoding import SamplingParams, StatefulDrafter, speculative_generate
from verl_speculator.errors import ConfigError

VOCAB_SIZE = 9  # so small that drafts of random weights are right now and then


def build(model, **arguments) -> Eagle3Speculator:
    torch.manual_seed(0)
    arguments = {"target_layer_ids": [0, 1, 2], "ttt_steps": 3, **arguments}
    speculator = Eagle3Speculator.from_training_args(model.config, **arguments)
    speculator.load_verifier_weights(model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    with torch.no_grad():
        for parameter in speculator.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return speculator.to(model.dtype).eval()


@pytest.fixture(scope="module")
def model():
    return build_model("llama", vocab_size=VOCAB_SIZE).double()


def states(model, tokens: list[int], layer_ids: list[int]) -> torch.Tensor:
    """[S, A * H] by one whole forward, without hooks of ours."""
    after_last = []
    hook = model.model.layers[-1].register_forward_hook(lambda module, args, output: after_last.append(output))
    with torch.no_grad():
        layers = [*model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[:-1], *after_last]
    hook.remove()
    return torch.cat([layers[i][0] for i in layer_ids], dim=-1)


class Recording(Eagle3Drafter):
    """Remembers what each row knew, and what was drafted for it."""

    rounds: list[tuple[list[int], list[int]]]

    def propose(self, context, num_tokens, generator):
        draft = super().propose(context, num_tokens, generator)
        for row, length, drafts in zip(context.tokens.tolist(), context.lengths.tolist(), draft.tokens, strict=True):
            self.rounds.append((row[-length:], drafts.tolist()))
        return draft


CASES = {
    "plain": {},
    "two layers": {"num_layers": 2, "norm_before_residual": False, "norm_before_fc": False, "norm_output": False},
    "qwen3, draft vocabulary": {
        "draft_arch": "qwen3",
        "fc_norm": True,
        "norm_before_fc": False,
        "t2d": torch.arange(VOCAB_SIZE) != 4,
        "num_layers": 2,
    },
}


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES.keys())
def test_greedy_text_is_the_targets_and_drafts_are_those_without_a_cache(model, arguments) -> None:
    speculator = build(model, **arguments)
    prompts = random_prompts(VOCAB_SIZE, (4, 1, 11, 7))
    drafter = Recording(speculator)
    drafter.rounds = []
    result = speculative_generate(model, drafter, *pad_left(prompts), max_new_tokens=30)
    assert result.tokens == greedy_by_transformers(model, prompts, 30)
    assert {accepted for row in result.accepted_per_round for accepted in row} >= {0, 1, 2}, "rows have to part"

    reference = Reference(speculator)
    for known, drafts in drafter.rounds:
        aux = states(model, known[:-1], speculator.target_layer_ids)
        with torch.no_grad():
            assert drafts == reference.greedy_drafts(aux, torch.tensor(known), 3)
    assert len(drafter.rounds) == sum(len(row) for row in result.accepted_per_round)


def test_a_speculator_is_given_as_it_is(model) -> None:
    """Rows that end early, a stop token, and fewer drafts; batched and alone are the same."""
    speculator = build(model)
    assert isinstance(speculator.make_drafter(), StatefulDrafter)
    prompts = random_prompts(VOCAB_SIZE, (3, 9, 5))
    settings = {"max_new_tokens": 25, "num_draft_tokens": 2, "eos_token_id": 2}
    together = speculative_generate(model, speculator, *pad_left(prompts), **settings)
    for row, prompt in enumerate(prompts):
        alone = speculative_generate(model, speculator, torch.tensor([prompt]), **settings)
        assert together.tokens[row] == alone.tokens[0]
        assert together.accepted_per_round[row] == alone.accepted_per_round[0]
    assert len({len(tokens) for tokens in together.tokens}) > 1


@pytest.mark.parametrize("draft_sampling", ["greedy", "random"])
def test_sampled_text_has_the_targets_distribution(draft_sampling) -> None:
    sizes = {"vocab_size": 6, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    target = build_model("llama", seed=1, **sizes, num_key_value_heads=1, num_hidden_layers=1)
    speculator = build(target, target_layer_ids=[0, 1], t2d=torch.arange(6) != 3)
    sampling = {"temperature": 1.3, "top_p": 0.9, "top_k": 5}
    prompts, rows = [[3], [1, 5, 2, 1, 5]], 4_000
    result = speculative_generate(
        target,
        speculator,
        *pad_left(prompts * rows),
        max_new_tokens=4,
        sampling=SamplingParams(**sampling),
        draft_sampling=draft_sampling,
        generator=torch.Generator().manual_seed(7),
    )
    exact = [sequence_distribution(target, prompt, 4, **sampling) for prompt in prompts]
    counts = [count_sequences(result.tokens[i::2], 6) for i in range(2)]
    assert goodness_of_fit(counts, exact) > 1e-4
    assert 0 < result.counts.acceptance_rate < 1


def test_a_base_with_too_few_layers(model) -> None:
    speculator = build(model)
    speculator.config.eagle_aux_hidden_state_layer_ids[-1] = 5
    with pytest.raises(ConfigError, match="reads the states after layer 5, and the base model has 2 layers"):
        speculative_generate(model, speculator, torch.tensor([[1]]), max_new_tokens=2)
    assert not model.get_output_embeddings()._forward_pre_hooks, "no hook may stay behind"
