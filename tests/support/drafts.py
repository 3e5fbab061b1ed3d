"""A speculator that has learnt a tiny base model's own text, and a count of its acceptance without our decoding."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from verl_speculator.models import ArcticLSTMSpeculatorConfig, Speculator


def greedy_text(model, prompt: list[int], length: int, stop: int) -> list[int]:
    """Greedy tokens by whole forwards, without a cache."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + length:
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == stop:
            break
    return tokens[len(prompt) :]


def last_hidden_states(model, tokens: list[int]) -> Tensor:
    """`[S, H]`, after the final norm."""
    return model.model(input_ids=torch.tensor([tokens])).last_hidden_state[0]


def train_speculator(model, prompts: list[list[int]], folder: Path, *, n_predict: int, stop: int, steps: int) -> Path:
    """Train on the base's own answers until it drafts some of them right, and save it."""
    torch.manual_seed(0)
    config = ArcticLSTMSpeculatorConfig(
        input_hidden_dim=model.config.hidden_size, vocab_size=model.config.vocab_size, n_predict=n_predict,
        inner_dim="32", emb_dim="32", proj_dim="32", scale_input=True,
    )  # fmt: skip
    speculator = Speculator.from_config(config)
    with torch.no_grad():
        texts = [[*prompt, *greedy_text(model, prompt, 24, stop)] for prompt in prompts]
        hidden = [last_hidden_states(model, text) for text in texts]
    optimizer = torch.optim.Adam(speculator.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = torch.zeros(())
        for text, states in zip(texts, hidden, strict=True):
            rows = len(text) - 1 - n_predict
            logits = speculator(states[None, :rows], torch.tensor([text[1:]]))
            for head in range(n_predict):
                targets = torch.tensor(text[2 + head : 2 + head + rows])
                loss = loss + torch.nn.functional.cross_entropy(logits[head, 0], targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    speculator.save_pretrained(folder)
    return folder


@torch.no_grad()
def accepted_drafts(model, speculator: Speculator, prompt: list[int], output: list[int]) -> list[int]:
    """How many drafts each round of greedy speculative decoding of this prompt accepts, its output being known."""
    accepted_per_round, position = [], 1
    k = speculator.n_predict
    while position < len(output):
        known = [*prompt, *output[:position]]
        # The state that predicted the last known token is that of the token before it.
        state = last_hidden_states(model, known)[-2]
        drafts = speculator.draft(state[None], torch.tensor([known[-1]]), k)[0].tolist()
        truth = greedy_text(model, known, k, stop=-1)
        accepted = next((i for i in range(k) if drafts[i] != truth[i]), k)
        accepted_per_round.append(accepted)
        position += accepted + 1
    return accepted_per_round
