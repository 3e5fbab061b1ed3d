import pytest
import torch
from torch import nn

from verl_speculator.decoding.few_rows import fast_few_rows


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5, bias=False))


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (1, 4), (2, 2), (5,), (2, 3, 7), (0, 1)])
def test_outputs_are_those_of_the_layers_whatever_the_number_of_rows(model: nn.Module, shape: tuple[int, ...]) -> None:
    states = torch.randn(*shape, 6)
    expected = model.double()(states.double()).float()
    model.float()
    with torch.inference_mode(), fast_few_rows(model):
        output = model(states)
    assert output.shape == expected.shape
    assert output.is_contiguous()
    torch.testing.assert_close(output, expected)


def test_two_to_four_rows_multiply_the_weight_from_the_left(model: nn.Module) -> None:
    def first_factors(rows: int) -> set[tuple[int, ...]]:
        with torch.profiler.profile(record_shapes=True) as profile, fast_few_rows(model):
            model(torch.randn(rows, 6))
        return {tuple(event.input_shapes[0]) for event in profile.events() if event.name == "aten::mm"}

    assert [rows for rows in range(1, 7) if (10, 6) in first_factors(rows)] == [2, 3, 4]


def test_afterwards_and_elsewhere_nothing_is_changed(model: nn.Module) -> None:
    class Special(nn.Linear):
        pass

    def replaced(states: torch.Tensor) -> torch.Tensor:
        return states

    model.append(Special(5, 5)).append(nn.Linear(5, 5).double())
    model[0].forward = replaced
    with fast_few_rows(model):
        assert [("forward" in vars(layer)) for layer in model] == [True, False, True, False, False]
        assert model[0].forward is replaced
    assert [("forward" in vars(layer)) for layer in model] == [True, False, False, False, False]
