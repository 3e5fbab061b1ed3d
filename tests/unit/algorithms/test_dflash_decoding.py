"""Decoding with DFlash: the target's own text, and drafts that are those of a model without any cache."""

from __future__ import annotations

import pytest
import torch

from tests.support.dflash_reference import Reference
from tests.unit.algorithms.test_eagle3_decoding import VOCAB_SIZE, states
from tests.unit.decoding.reference import count_sequences, goodness_of_fit, sequence_distribution
from tests.unit.decoding.support import build_model, greedy_by_transformers, pad_left, random_prompts
from verl_speculator.algorithms.dflash import DFlashSpeculator
from verl_speculator.algorithms.dflash.drafter import DFlashDrafter
from verl_speculator.decoding import SamplingParams, StatefulDrafter, speculative_generate


def build(model, **arguments) -> DFlashSpeculator:
    torch.manual_seed(0)
    arguments = {"target_layer_ids": [0, 1, 2], "block_size": 4, "num_layers": 2, "mask_token_id": 1, **arguments}
    speculator = DFlashSpeculator.from_training_args(model.config, **arguments)
    speculator.load_verifier_weights(model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    with torch.no_grad():
        for parameter in speculator.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return speculator.to(model.dtype).eval()


@pytest.fixture(scope="module")
def model():
    return build_model("llama", vocab_size=VOCAB_SIZE).double()


class Recording(DFlashDrafter):
    """Remembers what each row knew, and what was drafted for it."""

    rounds: list[tuple[list[int], list[int]]]

    def propose(self, context, num_tokens, generator):
        draft = super().propose(context, num_tokens, generator)
        for row, length, drafts in zip(context.tokens.tolist(), context.lengths.tolist(), draft.tokens, strict=True):
            self.rounds.append((row[-length:], drafts.tolist()))
        return draft


@pytest.mark.parametrize(("arguments", "count"), [({}, 3), ({"t2d": torch.arange(VOCAB_SIZE) != 4}, 2)], ids=str)
def test_greedy_text_is_the_targets_and_drafts_are_those_without_a_cache(model, arguments, count) -> None:
    speculator = build(model, **arguments)
    assert isinstance(speculator.make_drafter(), StatefulDrafter)
    prompts = random_prompts(VOCAB_SIZE, (4, 1, 11, 7))
    drafter = Recording(speculator)
    drafter.rounds = []
    result = speculative_generate(model, drafter, *pad_left(prompts), max_new_tokens=30, num_draft_tokens=count)
    assert result.tokens == greedy_by_transformers(model, prompts, 30)
    assert {accepted for row in result.accepted_per_round for accepted in row} >= {0, 1}, "rows have to part"

    reference = Reference(speculator)
    for known, drafts in drafter.rounds:
        aux = states(model, known[:-1], speculator.target_layer_ids)
        with torch.no_grad():
            assert drafts == reference.greedy_drafts(aux, torch.tensor(known), count)
    assert len(drafter.rounds) == sum(len(row) for row in result.accepted_per_round)


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
