from __future__ import annotations

import torch

from verl_speculator.engine.kept_steps import KeptSteps
from verl_speculator.losses import PackedHiddenStates


def batch(mark: int, masks: list[list[int]]) -> PackedHiddenStates:
    lengths = torch.tensor([0, *map(len, masks)])
    total = int(lengths.sum())
    return PackedHiddenStates(
        hidden_states=torch.full((total, 2), float(mark)),
        input_ids=torch.arange(total),
        loss_mask=torch.tensor([one for mask in masks for one in mask]),
        cu_seqlens=lengths.cumsum(dim=0),
        head_counts=torch.tensor([float(mark)]),
    )


def kept(replay_steps: int, trainer_steps: int) -> KeptSteps:
    steps = KeptSteps(replay_steps)
    for mark in range(trainer_steps):
        steps.begin_trainer_step()
        steps.begin_step()
        steps.keep(batch(mark, [[0, 1, 1], [0, 0], [0, 1]]))
        steps.keep(batch(mark, [[0, 1]]))
    return steps


def marks(steps: KeptSteps, count: int = 50) -> set[int]:
    return {int(step[0].head_counts[0]) for step in steps.draw(count, "seed", "cpu")}


def test_so_many_trainer_steps_are_kept_beside_the_present_one():
    assert marks(kept(0, 5)) == {4}
    assert marks(kept(2, 5)) == {2, 3, 4}
    assert marks(kept(9, 3)) == {0, 1, 2}


def test_a_step_comes_back_whole_without_what_trains_nothing():
    (first, second), *_ = kept(0, 1).draw(1, "seed", "cpu")

    assert first.input_ids.tolist() == [0, 1, 2, 5, 6]
    assert first.loss_mask.tolist() == [0, 1, 1, 0, 1]
    assert first.cu_seqlens.tolist() == [0, 3, 5]
    assert second.input_ids.tolist() == [0, 1]


def test_ranks_that_agree_on_the_seed_draw_the_same():
    one, other = kept(3, 4), kept(3, 4)

    def drawn(steps: KeptSteps, seed: str) -> list[int]:
        return [int(step[0].head_counts[0]) for step in steps.draw(20, seed, "cpu")]

    assert drawn(one, "a") == drawn(other, "a") != drawn(one, "b")
