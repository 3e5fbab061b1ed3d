from __future__ import annotations

import json

import pytest
import torch

from verl_speculator.engine.paired_monitor import Adaptation, paired_lengths


def found(rows: torch.Tensor) -> dict[str, float]:
    return paired_lengths(len(rows), rows.sum(dim=0), rows.T @ rows)


def sequences(count: int, seed: int, gain: float) -> torch.Tensor:
    """[count, 4]: both write the same answer, easy or hard, the live one in a few rounds less."""
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(20, 60, (count,), generator=generator).double()
    ease = 1 + 2 * torch.rand(count, generator=generator).double()
    noise = 1 + 0.05 * torch.randn(2, count, generator=generator).double()
    live, frozen = length / (ease * noise[0] + gain), length / (ease * noise[1])
    return torch.stack([live, length - live, frozen, length - frozen], dim=1)


def test_lengths_and_interval_are_those_of_a_bootstrap_over_sequences():
    rows = sequences(300, seed=0, gain=0.1)
    metrics = found(rows)

    generator = torch.Generator().manual_seed(1)
    drawn = rows[torch.randint(len(rows), (4000, len(rows)), generator=generator)].sum(dim=1)
    lengths = 1 + drawn[:, [1, 3]] / drawn[:, [0, 2]]
    spread = (lengths[:, 0] - lengths[:, 1]).std().item()
    total = rows.sum(dim=0)
    assert metrics["live_acceptance_length"] == pytest.approx(float(1 + total[1] / total[0]))
    assert metrics["frozen_acceptance_length"] == pytest.approx(float(1 + total[3] / total[2]))
    width = metrics["acceptance_length_difference_high"] - metrics["acceptance_length_difference_low"]
    assert width == pytest.approx(2 * 1.96 * spread, rel=0.05)
    # Far less than either alone: answers differ more than the two speculators do.
    assert spread < 0.3 * lengths[:, 0].std().item()


def test_what_is_the_same_differs_by_nothing():
    rows = sequences(50, seed=2, gain=0.0)
    rows[:, 2:] = rows[:, :2]
    metrics = found(rows)

    assert metrics["acceptance_length_difference"] == 0
    assert metrics["acceptance_length_difference_high"] == pytest.approx(0, abs=1e-6)


def note(adaptation: Adaptation, difference: float, half: float = 0.02) -> None:
    adaptation.note(
        {"acceptance_length_difference": difference, "acceptance_length_difference_high": difference + half}
    )


def test_it_stops_within_noise_probes_and_goes_on_when_the_difference_opens():
    adaptation = Adaptation()
    for _ in range(Adaptation.WINDOW - 1):
        note(adaptation, 0.0)
        assert adaptation.is_on, "too early to tell"
    note(adaptation, 0.001)
    assert not adaptation.is_on
    assert [step for step in range(24) if adaptation.learns(step)] == [0, 8, 16]
    while not adaptation.is_on:
        note(adaptation, 0.05)
    assert all(adaptation.learns(step) for step in range(24))


def test_a_step_in_which_nothing_was_measured_changes_nothing():
    adaptation = Adaptation()
    adaptation.note({})
    assert adaptation.state_dict() == Adaptation().state_dict()


def test_it_goes_on_as_it_was_saved():
    one, other = Adaptation(), Adaptation()
    for step in range(12):
        note(one, 0.003 * step)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for step in range(8):
        note(one, -0.004 * step)
        note(other, -0.004 * step)
        assert one.is_on == other.is_on
    assert not one.is_on
