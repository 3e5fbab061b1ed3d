"""Second implementations, written for clarity alone, of what the tests check."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def next_token_distribution(logits: list[float], temperature: float, top_p: float, top_k: int) -> list[float]:
    """Temperature, then the k most likely tokens, then the fewest that together reach p of what is left."""
    scaled = [value / temperature for value in logits]
    ranked = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    if top_k:
        ranked = ranked[:top_k]
    weights = {token: math.exp(scaled[token] - scaled[ranked[0]]) for token in ranked}
    total = sum(weights.values())
    kept, mass = [], 0.0
    for token in ranked:
        if mass >= top_p:
            break
        kept.append(token)
        mass += weights[token] / total
    kept_total = sum(weights[token] for token in kept)
    return [weights[token] / kept_total if token in kept else 0.0 for token in range(len(logits))]


@torch.no_grad()
def sequence_distribution(model, prompt: list[int], num_tokens: int, **sampling) -> Tensor:
    """The exact probability of every continuation of `num_tokens` tokens: `[V^num_tokens]`, first token major.

    Each continuation goes through the model whole, without a cache.
    """
    vocab_size = model.get_output_embeddings().weight.size(0)
    prefixes, probabilities = torch.tensor([prompt]), torch.ones(1, dtype=torch.float64)
    for _ in range(num_tokens):
        logits = model(prefixes).logits[:, -1].double().tolist()
        following = torch.tensor([next_token_distribution(row, **sampling) for row in logits], dtype=torch.float64)
        probabilities = (probabilities[:, None] * following).flatten()
        prefixes = torch.cat(
            [
                prefixes.repeat_interleave(vocab_size, 0),
                torch.arange(vocab_size).repeat(len(prefixes))[:, None],
            ],
            dim=1,
        )
    return probabilities


def count_sequences(rows: list[list[int]], vocab_size: int) -> Tensor:
    """How often each continuation occurred, in the order of `sequence_distribution`."""
    tokens = torch.tensor(rows)
    places = torch.zeros(len(rows), dtype=torch.long)
    for column in tokens.T:
        places = places * vocab_size + column
    return torch.bincount(places, minlength=vocab_size ** tokens.size(1))


def goodness_of_fit(counts: list[Tensor], probabilities: list[Tensor]) -> float:
    """The p-value of Pearson's chi-square test of several independent `counts`, each against its `probabilities`.

    Cells with fewer than 5 expected counts are pooled, from the rarest on, as the chi-square distribution needs. A
    count where nothing is possible is no question of chance: its p-value is 0.
    """
    statistic, freedom = 0.0, 0
    for seen, exact in zip(counts, probabilities, strict=True):
        if seen[exact == 0].sum() > 0:
            return 0.0
        cells = _pool((exact * seen.sum()).tolist(), seen.tolist())
        statistic += sum((seen_in_cell - wanted) ** 2 / wanted for wanted, seen_in_cell in cells)
        freedom += len(cells) - 1
    return float(torch.special.gammaincc(*torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)))


def _pool(expected: list[float], seen: list[int]) -> list[tuple[float, int]]:
    cells, wanted, found = [], 0.0, 0
    for more_wanted, more_found in sorted(zip(expected, seen, strict=True)):
        wanted, found = wanted + more_wanted, found + more_found
        if wanted >= 5:
            cells.append((wanted, found))
            wanted, found = 0.0, 0
    return [*cells[:-1], (cells[-1][0] + wanted, cells[-1][1] + found)]


def prompt_lookup(text: list[int], num_tokens: int, max_ngram: int, min_ngram: int) -> list[int]:
    """What followed the first earlier occurrence of the longest ending of `text` that occurred before."""
    for size in range(max_ngram, min_ngram - 1, -1):
        for start in range(len(text) - size):
            if text[start : start + size] == text[-size:]:
                return text[start + size : start + size + num_tokens]
    return []


def all_texts(vocab_size: int, length: int) -> list[list[int]]:
    return [list(text) for text in itertools.product(range(vocab_size), repeat=length)]
