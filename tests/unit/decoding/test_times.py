"""The split of the time: a slow part must show where it belongs, and nowhere else."""

import time

import pytest
import torch

from tests.unit.decoding.support import RandomDrafter, build_model
from verl_speculator.decoding import DecodingTimes, generate, speculative_generate

PAUSE = 0.02


class SlowDrafter(RandomDrafter):
    def draft(self, hidden_states, last_token, num_tokens):
        time.sleep(PAUSE)
        return super().draft(hidden_states, last_token, num_tokens)


@pytest.fixture(scope="module")
def model():
    return build_model("llama")


def slowed(model, pause_for_width):
    """A hook that makes a forward pass of so many tokens wait."""

    def wait(module, args, kwargs):
        time.sleep(pause_for_width(kwargs["input_ids"].size(1)))

    return model.register_forward_pre_hook(wait, with_kwargs=True)


def test_drafting_and_target_are_told_apart(model):
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    hook = slowed(model, lambda width: 3 * PAUSE if width == 7 else 2 * PAUSE)
    try:
        start = time.perf_counter()
        result = speculative_generate(model, SlowDrafter(61, 3), ids, max_new_tokens=5)
        wall = time.perf_counter() - start
    finally:
        hook.remove()

    times, rounds = result.times, result.num_rounds
    assert times.draft >= rounds * PAUSE
    assert times.verify >= rounds * 2 * PAUSE
    assert times.prefill >= 3 * PAUSE
    slept = rounds * 3 * PAUSE + 3 * PAUSE
    assert slept <= times.total <= wall
    assert times.other <= wall - slept


def test_plain_decoding_has_no_drafting(model):
    hook = slowed(model, lambda width: PAUSE if width == 1 else 0)
    try:
        result = generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=5)
    finally:
        hook.remove()

    assert result.times.draft == 0.0
    assert result.times.verify >= 4 * PAUSE
    assert result.num_rounds == 4


def test_times_add_up():
    first, second = DecodingTimes(1.0, 2.0, 3.0, 4.0), DecodingTimes(0.5, 0.5, 0.5, 0.5)

    assert first + second == DecodingTimes(1.5, 2.5, 3.5, 4.5)
    assert first.total == 10.0
