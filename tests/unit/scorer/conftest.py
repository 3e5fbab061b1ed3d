"""A small target, a draft that agrees with it now and then, and questions about nothing."""

from __future__ import annotations

import pytest
import torch

from tests.unit.decoding.support import build_model, build_noisy_model
from verl_speculator.base_model.loading import Target
from verl_speculator.decoding import DraftModel
from verl_speculator.scorer.answers import AnswerCheck
from verl_speculator.scorer.data import Question

NUM_DRAFTS, NEW = 3, 16


class NumberTokenizer:
    """Every token is a number, its own."""

    pad_token_id = 0

    def batch_decode(self, rows, skip_special_tokens=True):
        return [" ".join(map(str, row)) for row in rows]

    def decode(self, row, skip_special_tokens=True):
        return self.batch_decode([row])[0]


@pytest.fixture(scope="session")
def target():
    model = build_model("llama", seed=3)
    return Target(model, NumberTokenizer(), (0,), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def draft_model(target):
    return build_noisy_model("llama", seed=3)


@pytest.fixture
def drafter(draft_model):
    return DraftModel(draft_model, NUM_DRAFTS)


@pytest.fixture(scope="session")
def check():
    """The answer is the last number but one, so that the end of a text decides."""
    return AnswerCheck(r"(\d+) \d+$")


@pytest.fixture(scope="session")
def questions():
    generator = torch.Generator().manual_seed(7)
    return [
        Question(torch.randint(1, 61, (length,), generator=generator).tolist(), f"question {length}", str(length))
        for length in (2, 5, 3, 8, 4, 6)
    ]
