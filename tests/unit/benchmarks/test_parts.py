"""The arithmetic of the benchmarks: what their figures are made of."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from verl_speculator.losses import PackedHiddenStates, speculator_loss
from verl_speculator.models import MLPSpeculator, MLPSpeculatorConfig


def test_spans_are_exclusive_and_add_up_to_the_outermost(benchmark_module) -> None:
    now = SimpleNamespace(seconds=0.0)
    recorder = benchmark_module("spans").SpanRecorder(torch.device("cpu"), clock=lambda: now.seconds)

    def work(seconds: float) -> None:
        now.seconds += seconds

    with recorder.span("step"):
        work(1)
        with recorder.span("outer"):
            work(2)
            with recorder.span("inner"):
                work(4)
            work(8)
        with recorder.span("inner"):
            work(16)
    work(32)
    assert recorder.seconds == {"step": 1, "outer": 10, "inner": 20}


def test_wrapped_calls_are_recorded_inside_of_a_span_until_restored(benchmark_module) -> None:
    class Owner:
        def inherited(self) -> str:
            return "inherited"

    class Part(Owner):
        own = staticmethod(lambda: "own")

    part = Part()
    recorder = benchmark_module("spans").SpanRecorder(torch.device("cpu"))
    recorder.wrap(Part, "inherited", "inherited")
    recorder.wrap(part, "own", "own")
    recorder.wrap(part, "absent", "absent")
    assert part.inherited() == "inherited"
    assert not recorder.seconds, "nothing is recorded between steps"
    with recorder.span("step"):
        assert part.inherited() == "inherited"
        assert part.own() == "own"
    recorder.restore()
    with recorder.span("step"):
        part.inherited()
    assert set(recorder.seconds) == {"step", "inherited", "own"}
    assert "inherited" not in vars(Part)
    assert vars(part) == {}


def test_a_span_ends_with_an_error_inside_of_it(benchmark_module) -> None:
    recorder = benchmark_module("spans").SpanRecorder(torch.device("cpu"), clock=lambda: 0.0)
    with pytest.raises(KeyError), recorder.span("step"):
        raise KeyError
    with recorder.span("next"):
        pass
    assert set(recorder.seconds) == {"step", "next"}


@pytest.mark.parametrize("head_counts", [None, [9, 8, 7]])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_the_stacked_formula_is_the_same_loss(benchmark_module, tie_weights, head_counts) -> None:
    torch.manual_seed(0)
    config = MLPSpeculatorConfig(input_hidden_dim=8, inner_dim=12, vocab_size=30, n_predict=3, tie_weights=tie_weights)
    speculator = MLPSpeculator(config).double()
    packed = PackedHiddenStates(
        hidden_states=torch.randn(17, 8).double(),
        input_ids=torch.randint(30, (17,)),
        loss_mask=torch.tensor([0, 0, 1, 1, 1, 0, 1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 1]),
        cu_seqlens=torch.tensor([0, 7, 8, 17]),
        head_counts=None if head_counts is None else torch.tensor(head_counts),
    )
    stacked = benchmark_module("stacked").stacked_loss(speculator, packed)
    ours = speculator_loss(speculator, packed).loss
    torch.testing.assert_close(stacked, ours)
    parameters = list(speculator.parameters())
    for one, other in zip(torch.autograd.grad(stacked, parameters), torch.autograd.grad(ours, parameters), strict=True):
        torch.testing.assert_close(one, other)


def test_parameters_of_the_layers_are_those_of_the_model(benchmark_module, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    shape = benchmark_module("random_base").BaseShape(vocab=300, hidden=256, layers=2, intermediate=96)
    model = AutoModelForCausalLM.from_pretrained(shape.write(tmp_path / "base", max_length=64))
    matrices = [weight for weight in model.model.layers.parameters() if weight.dim() == 2]
    assert shape.layer_parameters == sum(weight.numel() for weight in matrices)


def test_start_up_logs_are_laid_end_to_end(benchmark_module) -> None:
    logs = [
        {"role": "command", "created": 10.5, "ended": 14.0, "changes": [[11.0, "other"], [12.0, "checks"]]},
        {"role": "torchrun", "created": 10.5, "ended": 99.0, "changes": [[15.0, "other"], [50.0, "torch import"]]},
        {"role": "trainer", "created": 17.0, "ended": 30.0, "changes": [[18.0, "other"], [20.0, "first step"]]},
    ]
    seconds = benchmark_module("bench_startup").sum_up(10.0, logs)
    assert seconds == {
        ("command", "interpreter"): 1,
        ("command", "other"): 1,
        ("command", "checks"): 2,
        ("torchrun", "interpreter"): 1,
        ("torchrun", "other"): 2,
        ("trainer", "interpreter"): 1,
        ("trainer", "other"): 2,
        ("trainer", "first step"): 10,
    }
    assert sum(seconds.values()) == 30.0 - 10.0


def test_figures_of_the_loss_are_medians_of_rounds(benchmark_module) -> None:
    """A ratio and a fraction are of the same round: a machine that slows down moves neither."""
    bench = benchmark_module("bench_loss")
    args = bench.argument_parser(None).parse_args([])
    times = {"stacked": [2.0, 8.0, 4.0], "ours": [1.0, 2.0, 4.0]}
    peaks = [1e9, 2e9, 4e9]
    row = bench.summarise(bench.base_case(args), "ours", times, peaks, products=int(4e9), peak=3 * 2**20)
    assert (row["seconds_min"], row["seconds_median"], row["seconds_max"]) == (1, 2, 4)
    assert (row["ratio_min"], row["ratio_to_stacked"], row["ratio_max"]) == (1, 2, 4)
    assert row["matmul_peak_fraction"] == 1.0  # of 4, 1 and 0.25
    assert (row["matmul_peak_gflops"], row["peak_extra_mb"]) == (2, 3)


def test_the_peak_of_matmuls_counts_two_operations_for_each_product(benchmark_module, monkeypatch) -> None:
    common = benchmark_module("common")
    spent = iter([4.0, 2.0, 8.0, 4.0, 4.0])
    monkeypatch.setattr(common, "seconds", lambda run, device: next(spent))
    assert common.matmul_peak(torch.float32, torch.device("cpu"), 10) == 2 * 10**3 / 2.0
