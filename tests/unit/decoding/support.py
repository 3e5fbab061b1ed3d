"""Tiny random models and drafters, and what transformers makes of the models without any of our code."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from verl_speculator.models import ArcticLSTMSpeculatorConfig, MLPSpeculatorConfig, Speculator

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,  # with the usual 0.02 a random model repeats one token
    "tie_word_embeddings": False,  # tied, it does so too
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def build_model(family: str, *, seed: int = 3, **changes):
    """A causal model of transformers with random weights, in float32 and eval mode."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **SIZES | changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def build_speculator(kind: str, model, n_predict: int = 3, seed: int = 0, **settings) -> Speculator:
    vocab_size, hidden_size = model.get_output_embeddings().weight.shape
    common = {"input_hidden_dim": hidden_size, "vocab_size": vocab_size, "n_predict": n_predict, **settings}
    if kind == "mlp":
        config = MLPSpeculatorConfig(**common, inner_dim=16)
    else:
        config = ArcticLSTMSpeculatorConfig(**common, inner_dim=16, emb_dim=16, proj_dim=16, method=kind)
    speculator = Speculator.from_config(config)
    speculator.reset_parameters(torch.Generator().manual_seed(seed))
    return speculator.to(model.dtype).eval()


def pad_left(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def greedy_by_transformers(model, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Each row alone and without padding."""
    rows = []
    for prompt in prompts:
        output = model.generate(torch.tensor([prompt]), max_new_tokens=max_new_tokens, do_sample=False)
        rows.append(output[0, len(prompt) :].tolist())
    assert all(len(set(row)) > 3 for row in rows), "a model that repeats itself cannot tell right from wrong"
    return rows


def random_prompts(vocab_size: int, lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


class RandomDrafter:
    """Guesses that are almost always wrong, sometimes right by chance in a small vocabulary."""

    def __init__(self, vocab_size: int, n_predict: int) -> None:
        self.vocab_size, self.n_predict = vocab_size, n_predict
        self.generator = torch.Generator().manual_seed(0)

    def draft(self, hidden_states: Tensor, last_token: Tensor, num_tokens: int) -> Tensor:
        return torch.randint(self.vocab_size, (len(last_token), num_tokens), generator=self.generator)


class KnowingDrafter:
    """Knows each row's continuation and finds its place by the hidden state it is handed.

    `rows` are whole sequences (prompt and greedy continuation). The place is looked up among the hidden states of a
    forward over the whole sequence without a cache, so a wrong hidden state (another position, another row) draws the
    wrong continuation, and the tests see a lower acceptance. `num_right(place)` says how many drafts to get right.
    """

    def __init__(self, model, rows: list[list[int]], n_predict: int, num_right=lambda place: 1_000) -> None:
        self.rows, self.n_predict, self.num_right = rows, n_predict, num_right
        self.vocab_size = model.get_output_embeddings().weight.size(0)
        with torch.no_grad():
            self.hidden = [model.get_decoder()(input_ids=torch.tensor([row])).last_hidden_state[0] for row in rows]

    def draft(self, hidden_states: Tensor, last_token: Tensor, num_tokens: int) -> Tensor:
        return torch.stack([self._draft(h, int(t), num_tokens) for h, t in zip(hidden_states, last_token, strict=True)])

    def _draft(self, hidden: Tensor, last_token: int, num_tokens: int) -> Tensor:
        distances = [(states - hidden).abs().amax(-1).min(0) for states in self.hidden]
        row = min(range(len(distances)), key=lambda i: float(distances[i].values))
        place = int(distances[row].indices)  # of the token whose hidden state this is
        assert distances[row].values < 1e-3, "the hidden state belongs to no position of any sequence"
        assert self.rows[row][place + 1] == last_token, "the hidden state did not predict the last token"
        drafts = torch.tensor(self.rows[row][place + 2 : place + 2 + num_tokens])
        right = self.num_right(place)
        drafts[right:] = (drafts[right:] + 1) % self.vocab_size
        return drafts


def sometimes_right(place: int) -> int:
    """Between none and four right drafts, differently at every place."""
    return (0, 3, 1, 4, 2, 0, 4)[place % 7]


def build_noisy_model(family: str, *, seed: int = 3):
    """`build_model` with some noise: as a draft it agrees with that one now and then."""
    model = build_model(family, seed=seed)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.08 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
    return model
