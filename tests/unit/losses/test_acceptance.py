"""Acceptance along a text against decoding itself, against sums written out, and on text made for the purpose."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from verl_speculator.decoding import DecodingResult, SamplingParams, generate, speculative_generate
from verl_speculator.losses import PackedHiddenStates, acceptance_metrics, acceptance_sums, rounds_per_sequence
from verl_speculator.models import (
    ArcticLSTMSpeculatorConfig,
    ChainSpeculator,
    ChainSpeculatorConfig,
    MLPSpeculatorConfig,
    Speculator,
)

VOCAB, HIDDEN, PROMPT, NEW_TOKENS = 7, 16, 5, 16
CONFIGS = {
    "mlp": MLPSpeculatorConfig(input_hidden_dim=HIDDEN, inner_dim=12, vocab_size=VOCAB, n_predict=3),
    "sum_lstm": ArcticLSTMSpeculatorConfig(
        input_hidden_dim=HIDDEN,
        inner_dim="12",
        emb_dim="12",
        proj_dim="12",
        vocab_size=VOCAB,
        n_predict=4,
        method="sum_lstm",
    ),
}


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


CONFIGS["sum_lstm_drafts"] = dataclasses.replace(CONFIGS["sum_lstm"], draft_vocab_size=5)


@pytest.fixture(params=sorted(CONFIGS))
def speculator(request: pytest.FixtureRequest) -> Speculator:
    torch.manual_seed(3)
    speculator = Speculator.from_config(CONFIGS[request.param])
    if speculator.draft_ids is not None:
        speculator.set_draft_ids(torch.tensor([0, 1, 2, 4, 6]))
    return speculator


def _packed(target: LlamaForCausalLM, prompts: torch.Tensor, answers: list[list[int]]) -> PackedHiddenStates:
    tokens = torch.cat([prompts, torch.tensor(answers)], dim=1)
    rows, length = tokens.shape
    with torch.no_grad():
        hidden = target.model(input_ids=tokens).last_hidden_state
    mask = torch.zeros_like(tokens)
    mask[:, prompts.shape[1] :] = 1
    return PackedHiddenStates(
        hidden_states=hidden.flatten(0, 1),
        input_ids=tokens.flatten(),
        loss_mask=mask.flatten(),
        cu_seqlens=torch.arange(0, (rows + 1) * length, length),
        lm_head_weight=target.lm_head.weight.detach(),
    )


def _accepted_inside(result: DecodingResult) -> tuple[int, int]:
    """Rounds, and the drafts they kept that are still part of the answer."""
    kept = 0
    for tokens, accepted in zip(result.tokens, result.accepted_per_round, strict=True):
        known = 1
        for length in accepted:
            kept += min(length, len(tokens) - known)
            known += length + 1
    return sum(map(len, result.accepted_per_round)), kept


def test_greedy_rounds_are_those_of_decoding(target, speculator):
    prompts = torch.randint(VOCAB, (32, PROMPT), generator=torch.Generator().manual_seed(2))
    result = speculative_generate(target, speculator, prompts, max_new_tokens=NEW_TOKENS)
    assert 1.1 < result.acceptance_length < 3

    sums = acceptance_sums(speculator, _packed(target, prompts, result.tokens))
    rounds, kept = _accepted_inside(result)
    assert (sums["closed_loop/rounds"].item(), sums["closed_loop/accepted"].item()) == (rounds, kept)
    of_rows = rounds_per_sequence(speculator, _packed(target, prompts, result.tokens))
    assert of_rows[:, 0].tolist() == [len(accepted) for accepted in result.accepted_per_round]
    assert of_rows.sum(dim=0).tolist() == [rounds, kept]

    # Drafts past an answer's end are unknown to the text: at most one round of each row is cut short.
    metrics = acceptance_metrics({name: value.item() for name, value in sums.items()})
    assert metrics["closed_loop_acceptance_length"] == pytest.approx(result.acceptance_length, rel=0.03)
    # Greedy text says nothing of sampling, and is told from sampled text by how likely it is.
    assert metrics["surprise_over_entropy"] < 0.8
    assert not any("sampled" in name for name in metrics)


def test_sampled_acceptance_is_that_of_decoding(target, speculator):
    prompts = torch.randint(VOCAB, (8, PROMPT), generator=torch.Generator().manual_seed(2)).repeat(128, 1)
    settings = {"max_new_tokens": NEW_TOKENS, "sampling": SamplingParams(temperature=1.0)}
    generator = torch.Generator().manual_seed(3)
    text = generate(target, prompts, generator=generator, **settings)
    result = speculative_generate(target, speculator, prompts, draft_sampling="random", generator=generator, **settings)

    sums = {k: v.item() for k, v in acceptance_sums(speculator, _packed(target, prompts, text.tokens)).items()}
    rounds, kept = _accepted_inside(result)
    # 1,024 answers of 16 tokens: over seeds, each of the two spreads by half a percent.
    assert 1 + sums["closed_loop_sampled/accepted"] / sums["closed_loop_sampled/rounds"] == pytest.approx(
        1 + kept / rounds, rel=0.025
    )
    # Everywhere in the text and where decoding has its rounds: different averages, but not far apart here.
    metrics = acceptance_metrics(sums)
    assert metrics["surprise_over_entropy"] == pytest.approx(1, rel=0.03)
    assert metrics["sampled_acceptance_length"] == pytest.approx(result.acceptance_length, rel=0.05)


@torch.no_grad()
def test_overlap_is_the_sum_of_the_smaller_probabilities(target, speculator):
    prompts = torch.randint(VOCAB, (2, PROMPT), generator=torch.Generator().manual_seed(2))
    packed = _packed(target, prompts, torch.randint(VOCAB, (2, 6), generator=torch.Generator().manual_seed(4)).tolist())
    tokens = packed.input_ids.view(2, -1)
    hidden = packed.hidden_states.view(2, -1, HIDDEN)
    length = tokens.shape[1]

    sums = {k: v.item() for k, v in acceptance_sums(speculator, packed).items()}
    for head in range(speculator.n_predict):
        total, count = 0.0, 0
        for row in range(2):
            for position in range(PROMPT - 1, length - 2 - head):
                read = F.pad(tokens[row, position + 1 :], (0, speculator.n_predict))
                drafts = speculator(hidden[row : row + 1, [position]], read[None])
                chance = 1.0
                for i in range(head + 1):
                    q = drafts[i, 0, 0].softmax(-1)
                    p = target.lm_head(hidden[row, position + 1 + i]).softmax(-1)
                    token = tokens[row, position + 2 + i]
                    chance *= torch.minimum(p, q).sum() if i == head else min(1.0, q[token] / p[token])
                total, count = total + float(chance), count + 1
        assert sums[f"overlap_{head}/count"] == count
        assert sums[f"overlap_{head}/sum"] == pytest.approx(total, rel=1e-5)
    assert ("text/mass_outside" in sums) == (speculator.draft_ids is not None)
    if speculator.draft_ids is not None:
        known = [hidden[row, position + 1] for row in range(2) for position in range(PROMPT - 1, length - 2)]
        outside = sum(target.lm_head(state).softmax(-1)[[3, 5]].sum() for state in known)
        assert sums["text/mass_outside"] == pytest.approx(float(outside), rel=1e-5)


class _Recites(ChainSpeculator):
    """Drafts the tokens that follow in a text with different tokens, except where it is told to be wrong."""

    def __init__(self, text: list[int], wrong: set[tuple[int, int]]) -> None:
        super().__init__(ChainSpeculatorConfig(input_hidden_dim=1, vocab_size=64, n_predict=3))
        self.text, self.wrong = text, wrong
        self.head = torch.nn.ModuleList([torch.nn.Linear(64, 64, bias=False)])
        torch.nn.init.eye_(self.head[0].weight)

    def begin(self, hidden_states):
        return (hidden_states[:, 0].long(),)

    def embed(self, tokens, head_index):
        return tokens

    def step(self, state, embedded, head_index):
        (position,) = state
        outputs = torch.zeros(len(position), 64)
        for row, start in enumerate(position.tolist()):
            target = self.text[min(start + 2 + head_index, len(self.text) - 1)]
            outputs[row, 63 if (start, head_index) in self.wrong else target] = 1.0
        return (position,), outputs

    def init_std(self, weight):
        return 1.0


def _recited(wrong: set[tuple[int, int]], loss_mask: list[int], cu_seqlens: list[int]) -> tuple[float, float]:
    length = len(loss_mask)
    packed = PackedHiddenStates(
        hidden_states=torch.arange(length).float()[:, None],
        input_ids=torch.arange(length),
        loss_mask=torch.tensor(loss_mask),
        cu_seqlens=torch.tensor(cu_seqlens),
    )
    sums = acceptance_sums(_Recites(list(range(length)), wrong), packed)
    assert set(sums) == {"closed_loop/rounds", "closed_loop/accepted"}
    return sums["closed_loop/rounds"].item(), sums["closed_loop/accepted"].item()


def test_rounds_jump_over_what_they_keep():
    # Prompt 0 1, answer 2 to 11. All right: rounds at 1 (keeps 3 4 5, adds 6), at 5 (7 8 9, adds 10) and at 9 (11).
    mask = [0, 0, *[1] * 10]
    assert _recited(set(), mask, [0, 12]) == (3, 7)
    # Wrong in the first round's second draft: keeps 3, adds 4; then from 3: 5 6 7, adds 8; from 7: 9 10 11.
    assert _recited({(1, 1)}, mask, [0, 12]) == (3, 7)
    # Wrong where no round starts changes nothing, and a first draft that is wrong leaves only the target's own token.
    assert _recited({(2, 0), (3, 0)}, mask, [0, 12]) == (3, 7)
    assert _recited({(t, 0) for t in range(12)}, mask, [0, 12]) == (9, 0)


def test_every_answer_starts_anew():
    # Two sequences, the second with two answers: 3 to 5; 7 to 9 and 12 to 13.
    mask = [0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1]
    # Rounds at 2 (keeps 4 5), at 6 (8 9) and at 11 (13).
    assert _recited(set(), mask, [0, 6, 14]) == (3, 5)


@pytest.mark.parametrize("mask", [[], [0, 0, 0], [0, 0, 1], [1, 0, 1, 0]])
def test_nothing_to_draft(mask):
    assert _recited(set(), mask, [0, len(mask)]) == (0, 0)
    assert acceptance_metrics({"closed_loop/rounds": 0.0, "closed_loop/accepted": 0.0}) == {}


def test_sums_of_parts_add_up(target, speculator):
    prompts = torch.randint(VOCAB, (4, PROMPT), generator=torch.Generator().manual_seed(2))
    answers = torch.randint(VOCAB, (4, 9), generator=torch.Generator().manual_seed(5)).tolist()
    whole = acceptance_sums(speculator, _packed(target, prompts, answers))
    parts = [acceptance_sums(speculator, _packed(target, prompts[i : i + 2], answers[i : i + 2])) for i in (0, 2)]
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value)


def test_rows_go_through_in_chunks(target, speculator, monkeypatch):
    prompts = torch.randint(VOCAB, (4, PROMPT), generator=torch.Generator().manual_seed(2))
    packed = _packed(target, prompts, torch.randint(VOCAB, (4, 9), generator=torch.Generator().manual_seed(5)).tolist())
    whole = acceptance_sums(speculator, packed)
    monkeypatch.setattr("verl_speculator.losses.acceptance._CHUNK_ROWS", 5)
    for name, value in acceptance_sums(speculator, dataclasses.replace(packed)).items():
        torch.testing.assert_close(value, whole[name])
