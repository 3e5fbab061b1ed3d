from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from verl_speculator.engine.response_tokens import at_most, response_mask

# Two turns of the policy with a tool's answer between them, and one turn.
PROMPTS = [[5, 6], [7, 8, 9]]
RESPONSES = [[1, 2, 3, 4], [1, 2]]
MASKS = [[1, 0, 0, 1], [1, 1]]
EXPECTED = [[0, 0, 1, 0, 0, 1], [0, 0, 0, 1, 1]]


def nested(rows):
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


def test_the_mask_of_a_response_lies_at_the_end_of_its_sequence():
    input_ids = nested([prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)])
    data = TensorDict({"input_ids": input_ids, "prompts": nested(PROMPTS), "loss_mask": nested(MASKS)}, batch_size=[2])

    assert [row.tolist() for row in response_mask(data).unbind()] == EXPECTED


def test_the_same_from_padded_prompts_and_masks():
    input_ids = nested([prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)])
    data = TensorDict(
        {
            "input_ids": input_ids,
            "prompts": torch.tensor([[0, 5, 6], [7, 8, 9]]),
            "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]),
            "loss_mask": torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0]]),
        },
        batch_size=[2],
    )

    assert [row.tolist() for row in response_mask(data).unbind()] == EXPECTED


@pytest.mark.parametrize("limit", [0, 1, 7, 20, 100])
def test_at_most_takes_whole_rows_and_cuts_the_last(limit):
    rows = [[0] + [1] * length for length in (4, 6, 3, 7)]
    kept = at_most(nested(rows), limit, torch.Generator().manual_seed(0)).unbind()

    sums = [int(row.sum()) for row in kept]
    assert sum(sums) == min(limit, 20)
    assert sum(0 < found < sum(row) for found, row in zip(sums, rows, strict=True)) <= 1
    for row, found in zip(kept, sums, strict=True):
        assert row.tolist() == [0] + [1] * found + [0] * (len(row) - 1 - found)


def test_another_step_takes_other_rows():
    mask = nested([[1] * 5] * 12)
    chosen = {str(at_most(mask, 10, torch.Generator().manual_seed(seed)).values().tolist()) for seed in range(8)}

    assert len(chosen) > 4
